"""The folder stream: your own data, one sub-folder per task, as CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from clpeft.config import ConfigError, nearest
from clpeft.registry import STREAMS
from clpeft.streams.base import (
    SPLITS,
    LoadedTask,
    StreamBuilder,
    StreamConfig,
    rank_within,
)
from clpeft.streams.contents import content_digests
from clpeft.streams.prompts import prompt_form
from clpeft.streams.toy import toy_neutral_text

if TYPE_CHECKING:
    import pyarrow

ENDINGS = (".csv", ".jsonl", ".parquet")
COLUMNS = ("text", "text_pair", "label", "instruction", "input", "output", "references")
LABELS_FILE = "labels.json"

# The part of the training rows that becomes the validation split where there is none.
VALIDATION_SHARE = 0.1

# Texts handed to the warm-up of a generated base model.
NEUTRAL_TEXTS = 6000


@dataclass
class FolderConfig(StreamConfig):
    """Your own tasks, read from a folder."""

    path: str | None = None  # holds <task>/{train,validation,test}.{csv,jsonl,parquet}; required
    # how tasks with `output` are scored, where their labels.json does not say
    metric: str = field(default="rougeL", metadata={"options": ("rougeL", "exact_match")})


@dataclass(frozen=True)
class Facts:
    """What a labels.json tells about a task."""

    source: Path
    label_names: tuple[str, ...] = ()
    answer_words: tuple[str, ...] = ()
    instruction: str | None = None
    input_template: str | None = None
    metric: str | None = None


@STREAMS.register("folder", config=FolderConfig)
class FolderStream(StreamBuilder):
    """Reads `<path>/<task>/{train,validation,test}.{csv,jsonl,parquet}`.

    Rows have `text`, optionally `text_pair`, and `label` (classification), or `input`, `output`
    and optionally `instruction` and `references` (generation). An optional labels.json, beside
    the splits or for all tasks in `<path>`, holds `label_names`, `answer_words`, `instruction`,
    `input_template` and `metric`. A missing validation split is a tenth of the training rows,
    chosen by `stream.seed`.
    """

    config: FolderConfig

    def root(self) -> Path:
        """The folder whose sub-folders are tasks.

        Raises:
            ConfigError: If it does not exist.
        """
        expected = (
            "a folder that holds a sub-folder per task with train, validation and test as .csv, "
            ".jsonl or .parquet"
        )
        if self.config.path is None:
            raise ConfigError(
                f"The stream '{self.config.name}' needs stream.path=<folder>: {expected}."
            )
        root = Path(self.config.path).expanduser()
        if not root.is_dir():
            raise ConfigError(
                f"stream.path={self.config.path} is not a folder; it must be {expected}."
            )
        return root

    def task_names(self) -> list[str]:
        """The tasks listed, or all sub-folders by name."""
        root = self.root()
        self.refuse_order()
        names = self.config.tasks
        if names is None:
            names = task_folders(root)
            if not names:
                raise ConfigError(
                    f"No sub-folder of {root} holds a file train.csv, train.jsonl or "
                    "train.parquet, so there is no task to learn."
                )
        for name in names:
            self._check_files(root, name)
        return list(names)

    def labels_of(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """What labels.json says, where there is one that names labels."""
        facts = read_facts(self.root(), name)
        return (facts.label_names, facts.answer_words) if facts.label_names else None

    def load(self, name: str) -> LoadedTask:
        """One task's files, read and checked."""
        root = self.root()
        files = {split: split_file(root / name, split) for split in SPLITS}
        tables = {split: read_rows(path) for split, path in files.items() if path is not None}
        facts = read_facts(root, name)
        paths = {split: path for split, path in files.items() if path is not None}
        kind = _kind(tables, paths)
        if kind == "classification":
            loaded = _classification(name, tables, paths, facts)
        else:
            loaded = _generation(name, tables, paths, facts, facts.metric or self.config.metric)
        if "validation" in loaded.splits:
            return loaded
        train, validation = split_off(loaded.splits["train"], paths["train"], self.config.seed)
        splits = {"train": train, "validation": validation, "test": loaded.splits["test"]}
        return LoadedTask(
            name=name,
            splits=splits,
            metric=loaded.metric,
            labels=loaded.labels,
            answer_words=loaded.answer_words,
            instruction=loaded.instruction,
            input_template=loaded.input_template,
        )

    def neutral_text(self, seed: int) -> list[str]:
        """Training texts of the folder's tasks that are not in the stream; else the toy's."""
        root = self.root()
        chosen = set(self.task_names())
        others = [name for name in task_folders(root) if name not in chosen]
        if not others:
            return toy_neutral_text(seed)
        generator = Random(f"{seed}/neutral")
        texts: list[str] = []
        for name in others:
            path = split_file(root / name, "train")
            assert path is not None, "a task folder has a train file"
            known = _texts(read_rows(path), path)
            texts += generator.sample(known, min(len(known), NEUTRAL_TEXTS // len(others)))
        generator.shuffle(texts)
        return texts

    def _check_files(self, root: Path, name: str) -> None:
        if name not in {path.name for path in root.iterdir() if path.is_dir()}:
            raise ConfigError(
                f"The stream '{self.config.name}' has no task '{name}' in {root}."
                + nearest(name, task_folders(root))
            )
        for split in ("train", "test"):
            if split_file(root / name, split) is None:
                there = ", ".join(sorted(path.name for path in (root / name).iterdir()))
                raise ConfigError(
                    f"The task '{name}' has no {split}.csv, {split}.jsonl or {split}.parquet in "
                    f"{root / name}, which holds {there or 'nothing'}."
                )


def task_folders(root: Path) -> list[str]:
    """The names of the sub-folders that hold a training split, in alphabetical order."""
    return sorted(
        path.name
        for path in root.iterdir()
        if any((path / f"train{ending}").is_file() for ending in ENDINGS)
    )


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


def read_facts(root: Path, name: str) -> Facts:
    """What the task's labels.json says, or else the one for all tasks, or else nothing.

    Raises:
        ConfigError: If it is not what a labels.json must be.
    """
    source = root / name / LABELS_FILE
    if not source.is_file():
        source = root / LABELS_FILE
    if not source.is_file():
        return Facts(source)
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{source} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f'{source} must hold one JSON object, such as {{"label_names": []}}.')
    names = _strings(source, content, "label_names")
    words = _strings(source, content, "answer_words") or names
    if len(words) != len(names):
        raise ConfigError(
            f"{source} has {len(words)} answer_words for {len(names)} label_names; there must be "
            "one for each."
        )
    for key in ("instruction", "input_template", "metric"):
        if not isinstance(content.get(key, ""), str):
            raise ConfigError(f"{source}: {key} must be a string.")
    template = content.get("input_template")
    if template is not None:
        try:
            prompt_form("", (), template)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
    if content.get("metric") not in (None, "accuracy", "rougeL", "exact_match"):
        raise ConfigError(
            f"{source}: the metric '{content['metric']}' is not one of accuracy, exact_match, "
            "rougeL."
        )
    return Facts(
        source,
        label_names=names,
        answer_words=words,
        instruction=content.get("instruction"),
        input_template=template,
        metric=content.get("metric"),
    )


def _strings(source: Path, content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of strings in a JSON object, all different; empty where there is none."""
    value = content.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{source}: {key} must be a list of strings.")
    if len(set(value)) < len(value):
        twice = next(item for item in value if value.count(item) > 1)
        raise ConfigError(f"{source}: {key} lists '{twice}' twice.")
    return tuple(value)


# Reading files.


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


def _kind(tables: Mapping[str, pyarrow.Table], paths: Mapping[str, Path]) -> str:
    """Whether the files hold classification or generation; the same in every split."""
    kind = None
    for split, table in tables.items():
        columns = set(table.column_names)
        if kind != "generation" and {"text", "label"} <= columns:
            kind = "classification"
        elif kind != "classification" and {"input", "output"} <= columns:
            kind = "generation"
        else:
            needed = {
                None: "text and label, or input and output",
                "classification": "text and label as the training file",
                "generation": "input and output as the training file",
            }[kind]
            raise ConfigError(
                f"{paths[split]} has the columns {', '.join(table.column_names) or 'none'}, but "
                f"must have {needed}."
            )
    assert kind is not None, "there is a training file"
    return kind


def _text_column(table: pyarrow.Table, name: str, path: Path, *, empty: bool = False) -> Any:
    """A column of strings, none of them missing, and none empty unless `empty`."""
    import pyarrow
    import pyarrow.compute

    column = table[name]
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ConfigError(f"The column '{name}' of {path} holds {kind}; it must hold text.")
    column = column.cast(pyarrow.string()).combine_chunks()
    missing = pyarrow.compute.is_null(column)
    if not empty:
        trimmed = pyarrow.compute.utf8_trim_whitespace(column)
        missing = pyarrow.compute.fill_null(pyarrow.compute.equal(trimmed, ""), True)
    rows = np.flatnonzero(missing.to_numpy(zero_copy_only=False))
    if len(rows):
        raise ConfigError(
            f"The column '{name}' of {path} is empty in {len(rows)} rows (row {rows[0]} is the "
            "first, counted from 0); fill or remove them."
        )
    return column


def _texts(table: pyarrow.Table, path: Path) -> list[str]:
    """The texts of a file, pairs joined; none where it has neither `text` nor `input`."""
    columns = [name for name in ("input", "text", "text_pair") if name in table.column_names]
    parts = [_text_column(table, name, path, empty=True).to_pylist() for name in columns]
    return ["\n".join(row) for row in zip(*parts, strict=True)]


# Classification.


def _classification(
    name: str, tables: Mapping[str, pyarrow.Table], paths: Mapping[str, Path], facts: Facts
) -> LoadedTask:
    import pyarrow

    has_pair = "text_pair" in tables["train"].column_names
    labels, label_names = _labels(tables, paths, facts)
    splits = {}
    for split, table in tables.items():
        columns = {"text": _text_column(table, "text", paths[split])}
        if has_pair != ("text_pair" in table.column_names):
            raise ConfigError(
                f"{paths['train']} {'has' if has_pair else 'lacks'} the column text_pair and "
                f"{paths[split]} {'lacks' if has_pair else 'has'} it; all splits must agree."
            )
        if has_pair:
            columns["text_pair"] = _text_column(table, "text_pair", paths[split], empty=True)
        columns["label"] = pyarrow.array(labels[split], pyarrow.int64())
        columns["example_id"] = pyarrow.array(np.arange(len(table)))
        splits[split] = pyarrow.table(columns)
    template = facts.input_template or ("{text}\n{text_pair}" if has_pair else "{text}")
    if not has_pair and prompt_form("", (), template).has_pair:
        raise ConfigError(
            f"The input_template of {facts.source} shows {{text_pair}}, but {paths['train']} has "
            "no such column."
        )
    return LoadedTask(
        name=name,
        splits=splits,
        metric="accuracy",
        labels=label_names,
        answer_words=facts.answer_words or label_names,
        instruction=facts.instruction or "",
        input_template=template,
    )


def _labels(
    tables: Mapping[str, pyarrow.Table], paths: Mapping[str, Path], facts: Facts
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Every split's labels as indices into the label names, and the names.

    Strings are names. Whole numbers are indices where labels.json gives names, and names
    themselves, in their order, where it does not; strings of digits that are not names, as CSV has
    them, are whole numbers.
    """
    values = {split: _label_values(table, paths[split]) for split, table in tables.items()}
    known = set(facts.label_names)
    every = [value for split in values.values() for value in split]
    if all(isinstance(value, str) for value in every) and not (known and known.issuperset(every)):
        numbers = {split: _whole_numbers(split_values) for split, split_values in values.items()}
        if all(found is not None for found in numbers.values()):
            values = {split: found for split, found in numbers.items() if found is not None}
    if any(isinstance(values[split][0], str) for split in values if values[split]):
        values = {split: [str(value) for value in found] for split, found in values.items()}
    order: Sequence[Any] = sorted(set(values["train"]))
    names = facts.label_names or tuple(str(value) for value in order)
    if facts.label_names:
        by_name = values["train"] and isinstance(values["train"][0], str)
        order = names if by_name else range(len(names))
        origin = f"{facts.source} names {', '.join(names)}"
        if not by_name:
            origin += f", so that a label is 0 to {len(names) - 1} or one of these names"
    else:
        origin = (
            f"{paths['train']} has only {', '.join(names)} (a {LABELS_FILE} with label_names may "
            "list more)"
        )
    index = {value: position for position, value in enumerate(order)}
    indices = {}
    for split, found in values.items():
        for row, value in enumerate(found):
            if value not in index:
                raise ConfigError(
                    f"{paths[split]} has the label {value!r} in row {row} (counted from 0), but "
                    f"{origin}."
                )
        indices[split] = np.array([index[value] for value in found], dtype=np.int64)
    return indices, names


def _label_values(table: pyarrow.Table, path: Path) -> list[Any]:
    import pyarrow

    column = table["label"]
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (
        pyarrow.types.is_integer(kind)
        or pyarrow.types.is_string(kind)
        or pyarrow.types.is_large_string(kind)
    ):
        raise ConfigError(
            f"The column 'label' of {path} holds {kind}; it must hold whole numbers or names."
        )
    values = column.to_pylist()
    for row, value in enumerate(values):
        if value is None or value == "":
            raise ConfigError(f"{path} has no label in row {row} (counted from 0).")
    return values


def _whole_numbers(values: Sequence[str]) -> list[int] | None:
    try:
        return [int(value) for value in values]
    except ValueError:
        return None


# Generation.


def _generation(
    name: str,
    tables: Mapping[str, pyarrow.Table],
    paths: Mapping[str, Path],
    facts: Facts,
    metric: str,
) -> LoadedTask:
    import pyarrow

    if metric == "accuracy":
        raise ConfigError(
            f"{facts.source}: the metric accuracy needs labels, but the task '{name}' has outputs; "
            "choose exact_match or rougeL."
        )
    instructions = {
        split: _text_column(table, "instruction", paths[split], empty=True).to_pylist()
        for split, table in tables.items()
        if "instruction" in table.column_names
    }
    different = {text for column in instructions.values() for text in column}
    everywhere = len(instructions) == len(tables) and len(different) == 1
    splits = {}
    for split, table in tables.items():
        inputs = _text_column(table, "input", paths[split]).to_pylist()
        if split in instructions and not everywhere:
            # instructions of single rows are part of what the rows ask
            inputs = [f"{a}\n{b}" for a, b in zip(instructions[split], inputs, strict=True)]
        outputs = _text_column(table, "output", paths[split]).to_pylist()
        references = [[output] for output in outputs]
        if "references" in table.column_names:
            references = _references(table, paths[split])
        splits[split] = pyarrow.table(
            {
                "input": pyarrow.array(inputs, pyarrow.string()),
                "output": pyarrow.array(outputs, pyarrow.string()),
                "references": pyarrow.array(references, pyarrow.list_(pyarrow.string())),
                "example_id": pyarrow.array(np.arange(len(table))),
            }
        )
    given = different.pop() if everywhere else ""
    return LoadedTask(
        name=name,
        splits=splits,
        metric=metric,
        instruction=given if facts.instruction is None else facts.instruction,
    )


def _references(table: pyarrow.Table, path: Path) -> list[list[str]]:
    import pyarrow

    column = table["references"]
    if not pyarrow.types.is_list(column.type) or not pyarrow.types.is_string(
        column.type.value_type
    ):
        raise ConfigError(
            f"The column 'references' of {path} holds {column.type}; it must hold lists of text."
        )
    values = column.to_pylist()
    for row, value in enumerate(values):
        if not value or None in value:
            raise ConfigError(f"{path} has no references in row {row} (counted from 0).")
    return values


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
