"""A stream as token ids: encoded once per tokenizer, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpeft.streams.base import SPLITS, Stream, Task
from clpeft.streams.batching import Columns
from clpeft.streams.prompts import PROMPT_VERSION
from clpeft.streams.tokenize import Encoder, label_answers

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A part of every cache key: to be raised whenever the stored columns change.
ENCODING_VERSION = 1


@dataclass(frozen=True)
class EncodedTask:
    """A task and its splits as token ids."""

    task: Task
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset

    def split(self, name: str) -> datasets.Dataset:
        """One of the three splits by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def index(self) -> int:
        """The task's place in the stream, from 0."""
        return self.task.index


@dataclass(frozen=True)
class EncodedStream:
    """A stream as a model of one type reads it.

    Args:
        stream: What was encoded.
        task_type: sequence_classification, causal_lm or seq2seq_lm.
        tasks: Its tasks, in order.
        answers: The token ids of each global label's answer, with the end-of-sequence token; empty
            tuples for a classifier.
    """

    stream: Stream
    task_type: str
    tasks: tuple[EncodedTask, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest input of any split."""
        splits = [task.split(name) for task in self.tasks for name in SPLITS]
        return max(int(Columns(split).lengths.max(initial=0)) for split in splits)


def encode_stream(
    stream: Stream, tokenizer: PreTrainedTokenizerBase, task_type: str, *, cache_dir: str
) -> EncodedStream:
    """Tokenizes every split of a stream, or reads what an earlier call left in the cache.

    Columns: `input_ids` (list of int32), `task_id`, `example_id`, `label` (int64, global; -1 for
    generation); for a classifier also `token_type_ids` where the tokenizer has them; for a causal
    model `input_ids` is prompt, answer and end, with `prompt_length` (int32); for a sequence to
    sequence model `labels` (list of int32) is answer and end.

    Args:
        stream: What to encode.
        tokenizer: The model's.
        task_type: sequence_classification, causal_lm or seq2seq_lm.
        cache_dir: Encoded streams are kept in its sub-directory `tokenized`.

    Returns:
        The stream, its data sets mapped from disk.

    Raises:
        ConfigError: If a prompt without its input does not fit into `stream.max_length`, two
            answers of a task are the same tokens, or the model's type cannot do a task.
    """
    import datasets

    answers = label_answers(stream, tokenizer, task_type)
    directory = Path(cache_dir) / "tokenized" / _cache_key(stream, tokenizer, task_type)
    if not _is_whole(directory, stream):
        if directory.exists():
            logger.warning("The encoded stream in %s is damaged; encoding it again.", directory)
        encoder = Encoder(stream, tokenizer, task_type, answers)
        _write_aside(directory, encoder)
    encoded = []
    for task in stream.tasks:
        splits = {
            split: datasets.Dataset.from_file(str(directory / _file_name(task, split)))
            for split in SPLITS
        }
        encoded.append(EncodedTask(task, splits["train"], splits["validation"], splits["test"]))
    return EncodedStream(stream, task_type, tuple(encoded), answers)


def _cache_key(stream: Stream, tokenizer: PreTrainedTokenizerBase, task_type: str) -> str:
    facts = [
        stream.fingerprint,
        tokenizer_fingerprint(tokenizer),
        task_type,
        PROMPT_VERSION,
        ENCODING_VERSION,
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of what a tokenizer does, whatever it is called and wherever it came from."""
    facts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "inputs": list(tokenizer.model_input_names),
        "truncation_side": tokenizer.truncation_side,
    }
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # left over from whoever called it last, and set anew at every call
        content["truncation"] = content["padding"] = None
        facts["content"] = content
    else:
        facts["content"] = [
            sorted(tokenizer.get_vocab().items()),
            sorted((key, str(value)) for key, value in tokenizer.init_kwargs.items()),
        ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _file_name(task: Task, split: str) -> str:
    return f"{task.index}-{split}.arrow"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _is_whole(directory: Path, stream: Stream) -> bool:
    """Whether a cache entry is there and holds, byte for byte, what was written."""
    expected = {_file_name(task, split) for task in stream.tasks for split in SPLITS}
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        return manifest.keys() == expected and all(
            _digest(directory / name) == known for name, known in manifest.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _write_aside(directory: Path, encoder: Encoder) -> None:
    """Fills a cache entry so that it is either whole or not there, whoever else writes it too."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        written = aside / "entry"
        written.mkdir()
        manifest = {}
        for task in encoder.stream.tasks:
            for split in SPLITS:
                path = written / _file_name(task, split)
                rows = task.split(split).with_format("arrow")[:]
                _write_table(encoder.encode(task, rows, split), path)
                manifest[path.name] = _digest(path)
        (written / "manifest.json").write_text(json.dumps(manifest))
        try:
            written.rename(directory)
        except OSError:
            # someone was faster, or a damaged entry is in the way
            if not _is_whole(directory, encoder.stream):
                directory.rename(aside / "damaged")
                written.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_table(table: pyarrow.Table, path: Path) -> None:
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
