"""What the rows of a task's files hold, with what its labels.json says of them, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clpeft.config import ConfigError
from clpeft.streams.base import LoadedTask
from clpeft.streams.prompts import prompt_form

if TYPE_CHECKING:
    import pyarrow

LABELS_FILE = "labels.json"


@dataclass(frozen=True)
class Facts:
    """What a labels.json tells about a task."""

    source: Path
    label_names: tuple[str, ...] = ()
    answer_words: tuple[str, ...] = ()
    instruction: str | None = None
    input_template: str | None = None
    metric: str | None = None


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


def kind_of(tables: Mapping[str, pyarrow.Table], paths: Mapping[str, Path]) -> str:
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


def texts_of(table: pyarrow.Table, path: Path) -> list[str]:
    """The texts of a file, pairs joined; none where it has neither `text` nor `input`."""
    columns = [name for name in ("input", "text", "text_pair") if name in table.column_names]
    parts = [_text_column(table, name, path, empty=True).to_pylist() for name in columns]
    return ["\n".join(row) for row in zip(*parts, strict=True)]


def classification(
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


def generation(
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
