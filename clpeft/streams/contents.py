"""What a stream's splits hold: what makes two examples the same, and digests of them."""

from __future__ import annotations

import hashlib
import json
import logging
import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clpeft.config import ConfigError

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

_NOT_ALPHANUMERIC = "".join(
    chr(code) for code in range(128) if chr(code) not in string.ascii_letters + string.digits
).encode()


def normalise(text: str) -> str:
    """A text's lower-cased letters and digits; the text itself where it has none of them.

    Two copies of a text that differ in case, white space or punctuation are one content.
    """
    lowered = text.lower()
    if lowered.isascii():
        kept = lowered.encode().translate(None, _NOT_ALPHANUMERIC).decode()
    else:
        kept = "".join(filter(str.isalnum, lowered))
    return kept or text


def content_digest(*parts: str) -> bytes:
    """The digest of an example's normalised parts: 16 bytes."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def digest_of(text: str) -> str:
    """32 hexadecimal digits that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def content_digests(table: pyarrow.Table) -> list[bytes]:
    """The digest of every row's content: its text and its pair, or its input."""
    if "input" in table.column_names:
        return [content_digest(normalise(text)) for text in table["input"].to_pylist()]
    texts = table["text"].to_pylist()
    if "text_pair" not in table.column_names:
        return [content_digest(normalise(text)) for text in texts]
    return [
        content_digest(normalise(text), normalise(pair))
        for text, pair in zip(texts, table["text_pair"].to_pylist(), strict=True)
    ]


class Contents:
    """The digests of what a stream's splits hold.

    Attributes:
        seen: Of every example of the full splits, as one text.
        splits: Of each task's split as it is trained or tested on, by the split's name.
    """

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.splits: dict[str, list[str]] = {}
        self._all = hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> str:
        """Of all splits of all tasks."""
        return self._all.hexdigest()

    def add_full_split(self, table: pyarrow.Table, digests: list[bytes]) -> None:
        """Remembers what must not come up as neutral text, where pairs are one text."""
        if "text_pair" not in table.column_names:
            self.seen.update(digests)
            return
        rows = zip(table["text"].to_pylist(), table["text_pair"].to_pylist(), strict=True)
        self.seen.update(content_digest(normalise(f"{text}\n{pair}")) for text, pair in rows)

    def add_split(self, name: str, table: pyarrow.Table) -> str:
        """Takes in what is trained or tested on; returns its digest."""
        digest = hashlib.blake2b(digest_size=16)
        for column in table.column_names:
            values = json.dumps(table[column].to_pylist(), ensure_ascii=False)
            digest.update(f"{column}\0{values}\0".encode())
        self._all.update(digest.digest())
        self.splits.setdefault(name, []).append(digest.hexdigest())
        return digest.hexdigest()


def check_disjoint(
    task: str, digests: Mapping[str, list[bytes]], texts: Mapping[str, Any], allow: bool
) -> None:
    """Makes sure that no content is in two splits of a task.

    Args:
        task: The task's name.
        digests: The content digest of every row, by split.
        texts: The first text column of each split, to quote from.
        allow: Whether an overlap is only warned about.

    Raises:
        ConfigError: If two splits share content and that is not allowed.
    """
    splits = list(digests)
    for position, first in enumerate(splits):
        known = set(digests[first])
        for second in splits[position + 1 :]:
            shared = [row for row, digest in enumerate(digests[second]) if digest in known]
            if not shared:
                continue
            example = texts[second][shared[0]].as_py()
            found = (
                f"{len(shared)} of the {len(digests[second])} {second} rows of task '{task}' are "
                f"in its {first} split too, for example {example[:60]!r}"
            )
            if not allow:
                raise ConfigError(
                    f"{found}; remove them from one of the two, or set stream.allow_overlap=true "
                    "to go on with a warning."
                )
            logger.warning("%s; going on because stream.allow_overlap is true.", found)
