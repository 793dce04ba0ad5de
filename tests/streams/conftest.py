"""Small folders and small tokenizers whose every number is known."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from clpeft.streams.base import Stream
from clpeft.streams.build import build_stream
from clpeft.streams.folder import FolderConfig
from clpeft.streams.toy import ToyConfig

# Two tasks of two labels each, told apart by nothing but their words.
FRUIT = {
    "train": [("red apple", "apple"), ("yellow pear", "pear"), ("green apple", "apple")],
    "validation": [("ripe pear", "pear")],
    "test": [("big apple", "apple"), ("old pear", "pear")],
}
SIZE = {
    "train": [("a mouse", "small"), ("a whale", "large"), ("a wren", "small")],
    "validation": [("a bear", "large")],
    "test": [("a flea", "small"), ("a horse", "large")],
}


def _columns(rows: Sequence[tuple[Any, ...]], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


@pytest.fixture
def write_split() -> Callable[..., Path]:
    """Writes one split's columns in the format that the file's ending tells."""

    def write(path: Path, columns: Mapping[str, list[Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = list(zip(*columns.values(), strict=True))
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([list(columns), *rows])
        elif path.suffix == ".jsonl":
            lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
            path.write_text("".join(f"{line}\n" for line in lines))
        else:
            parquet.write_table(pyarrow.table(dict(columns)), path)
        return path

    return write


@pytest.fixture
def write_task(write_split: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a task's folder from rows of (text, label), or with other column names."""

    def write(
        folder: Path,
        splits: Mapping[str, Sequence[tuple[Any, ...]]],
        *,
        names: Sequence[str] = ("text", "label"),
        ending: str = ".jsonl",
        labels: Mapping[str, Any] | None = None,
    ) -> Path:
        for split, rows in splits.items():
            write_split(folder / f"{split}{ending}", _columns(rows, names))
        if labels is not None:
            (folder / "labels.json").write_text(json.dumps(labels))
        return folder

    return write


@pytest.fixture
def two_tasks(tmp_path: Path, write_task: Callable[..., Path]) -> Path:
    """A folder with the tasks `fruit` and `size`."""
    write_task(tmp_path / "tasks" / "fruit", FRUIT)
    write_task(tmp_path / "tasks" / "size", SIZE)
    return tmp_path / "tasks"


@pytest.fixture
def folder_config() -> Callable[..., FolderConfig]:
    """Settings of a folder stream."""

    def make(path: Path | None, **changes: Any) -> FolderConfig:
        given = {"scenario": "task", "max_length": 64, **changes}
        return FolderConfig(
            kind="folder", name="mine", path=None if path is None else str(path), **given
        )

    return make


@pytest.fixture
def folder_stream(folder_config: Callable[..., FolderConfig]) -> Callable[..., Stream]:
    """A folder stream, loaded."""

    def make(path: Path, **changes: Any) -> Stream:
        return build_stream(folder_config(path, **changes), data_dir=None)

    return make


@pytest.fixture
def toy_config() -> Callable[..., ToyConfig]:
    """Settings of a small toy stream."""

    def make(**changes: Any) -> ToyConfig:
        given = {
            "scenario": "domain",
            "num_tasks": 2,
            "train_size": 40,
            "validation_size": 12,
            "test_size": 16,
            "max_length": 96,
            **changes,
        }
        return ToyConfig(kind="toy", name="toy", **given)

    return make


WORDS = (
    "<unk> <pad> <s> </s> Option : , Answer Pick one red green yellow ripe big old apple pear a "
    "mouse whale wren bear flea horse small large Task fruit size . 1 2 3 4 5 6 7 8 9"
).split()


@pytest.fixture
def word_ids() -> dict[str, int]:
    """The id of every word of the word tokenizers."""
    return {word: number for number, word in enumerate(WORDS)}


@pytest.fixture
def word_tokenizer(word_ids: dict[str, int]) -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer with one id per word or mark; adds what `template` says to a text."""

    def make(
        template: str = "$A", *, pair: str | None = None, eos: bool = True
    ) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.WordLevel(word_ids, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        core.post_processor = processors.TemplateProcessing(
            single=template,
            pair=pair or f"{template} $B:1",
            special_tokens=[(token, word_ids[token]) for token in ("<s>", "</s>")],
        )
        special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>"}
        if eos:
            special["eos_token"] = "</s>"
        return PreTrainedTokenizerFast(tokenizer_object=core, **special)

    return make


@pytest.fixture
def data_dir() -> Path:
    """The public data, where it is at hand."""
    named = os.environ.get("CLPEFT_DATA")
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(named) if named else beside
    if not (folder / "cl_benchmark").is_dir():
        pytest.skip("needs the public data: set CLPEFT_DATA to a folder that holds cl_benchmark")
    return folder
