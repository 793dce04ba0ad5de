"""Files of rows, as CSV, JSON lines or Parquet: found, read, and a validation part split off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clpeft.config import ConfigError
from clpeft.streams.contents import content_digests
from clpeft.streams.draw import rank_within

if TYPE_CHECKING:
    import pyarrow

ENDINGS = (".csv", ".jsonl", ".parquet")
COLUMNS = ("text", "text_pair", "label", "instruction", "input", "output", "references")
# The part of the training rows that becomes the validation split where there is none.
VALIDATION_SHARE = 0.1


def split_file(folder: Path, split: str) -> Path | None:
    """The one file of a split, or None.

    Raises:
        ConfigError: If there are two.
    """
    found = [path for ending in ENDINGS if (path := folder / f"{split}{ending}").is_file()]
    if len(found) > 1:
        raise ConfigError(
            f"{folder} holds both {found[0].name} and {found[1].name}; leave one of them."
        )
    return found[0] if found else None


def read_rows(path: Path) -> pyarrow.Table:
    """The columns of a file that mean something here.

    Args:
        path: A .csv, .jsonl or .parquet file.

    Returns:
        The table; in CSV every value is a string.

    Raises:
        ConfigError: If the file cannot be read.
    """
    import pyarrow

    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        return readers[path.suffix](path)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{path} cannot be read as {path.suffix[1:]}: {reason}.") from error


def _read_csv(path: Path) -> pyarrow.Table:
    from pyarrow import csv, string

    return csv.read_csv(
        path,
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types={name: string() for name in COLUMNS}, strings_can_be_null=False
        ),
    )


def _read_jsonl(path: Path) -> pyarrow.Table:
    import pyarrow

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path} line {number} is not valid JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ConfigError(f'{path} line {number} must be a JSON object such as {{"text": ..}}.')
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pyarrow.table({name: [row.get(name) for row in rows] for name in names})


def _read_parquet(path: Path) -> pyarrow.Table:
    from pyarrow import parquet

    return parquet.read_table(path)


def split_off(train: pyarrow.Table, path: Path, seed: int) -> tuple[pyarrow.Table, pyarrow.Table]:
    """Takes a tenth of the training rows for validation, of every label about a tenth.

    Rows of one content go together, so that the two splits share none.

    Args:
        train: The training rows.
        path: The file they are from.
        seed: Of the choice.

    Returns:
        The rest and the validation rows, both in their old order.

    Raises:
        ConfigError: If there are fewer than two different rows.
    """
    digests = content_digests(train)
    first_rows = list({digest: row for row, digest in reversed(list(enumerate(digests)))}.values())
    if len(first_rows) < 2:
        raise ConfigError(
            f"{path} has {len(first_rows)} different rows, too few to split a validation set off; "
            f"add more or a validation file beside it."
        )
    rows = np.sort(np.array(first_rows))
    draw = np.random.default_rng([seed, len(rows)]).random(len(rows))
    labels = np.zeros(len(rows), dtype=np.int64)
    if "label" in train.column_names:
        labels = train["label"].to_numpy()[rows]
    counts = np.bincount(labels)[labels]
    quantile = (rank_within(labels, draw) + 0.5) / counts
    size = max(1, round(VALIDATION_SHARE * len(rows)))
    chosen = rows[np.lexsort((draw, quantile))[:size]]
    taken = {digests[row] for row in chosen}
    mask = np.array([digest in taken for digest in digests])
    return train.filter(~mask), train.filter(mask)
