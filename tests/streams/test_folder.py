"""The user's own folders: what is read, and what is told when it cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from clpeft.config import ConfigError
from clpeft.streams.base import Stream
from clpeft.streams.build import check_stream
from clpeft.streams.contents import normalise
from clpeft.streams.folder import FolderConfig

Splits = dict[str, list[tuple[Any, ...]]]


def _splits(first: Any = "no", second: Any = "yes") -> Splits:
    return {
        "train": [("it, so", second), ('say "no"\nor not', first), ("NA", second)],
        "validation": [("null", first)],
        "test": [("  1  ", second), ("2", first)],
    }


# What is read.


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_all_formats_hold_the_same(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    ending: str,
) -> None:
    write_task(tmp_path / "t", _splits(), ending=ending)
    (task,) = folder_stream(tmp_path).tasks
    assert task.labels == task.answer_words == ("no", "yes")
    assert (task.metric, task.instruction, task.input_template) == ("accuracy", "", "{text}")
    assert task.train[:] == {
        "text": ["it, so", 'say "no"\nor not', "NA"],
        "label": [1, 0, 1],
        "example_id": [0, 1, 2],
    }
    assert task.validation[:] == {"text": ["null"], "label": [0], "example_id": [0]}
    assert task.test["text"][:] == ["  1  ", "2"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_whole_numbers_without_names_are_names_in_their_order(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    ending: str,
) -> None:
    # 10 comes after 2, as numbers do; and there is no label 0
    write_task(tmp_path / "t", _splits(2, 10), ending=ending)
    (task,) = folder_stream(tmp_path).tasks
    assert task.labels == ("2", "10")
    assert task.train["label"][:] == [1, 0, 1]
    assert task.test["label"][:] == [1, 0]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_whole_numbers_with_names_are_indices(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    ending: str,
) -> None:
    labels = {"label_names": ["zero", "one", "two"], "answer_words": ["0", "I", "II"]}
    write_task(tmp_path / "t", _splits(2, 0), ending=ending, labels=labels)
    (task,) = folder_stream(tmp_path).tasks
    assert task.labels == ("zero", "one", "two")
    assert task.answer_words == ("0", "I", "II")
    assert task.train["label"][:] == [0, 2, 0]


def test_digits_that_are_names_are_names(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    # stars 1 to 3 in a CSV: by name, so that 3 is the last and not out of range
    labels = {"label_names": ["1", "2", "3"]}
    write_task(tmp_path / "t", _splits("3", "1"), ending=".csv", labels=labels)
    (task,) = folder_stream(tmp_path).tasks
    assert task.train["label"][:] == [0, 2, 0]


def test_names_of_labels_json_decide_the_order(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    labels = {"label_names": ["yes", "no"], "instruction": "Really?", "input_template": "Q {text}"}
    write_task(tmp_path / "t", _splits(), labels=labels)
    stream = folder_stream(tmp_path)
    assert stream.tasks[0].train["label"][:] == [0, 1, 0]
    assert stream.prompt(stream.tasks[0]).fill("x") == "Really?\nOption: yes, no \nQ x\nAnswer:"


def test_labels_json_of_the_whole_folder_is_for_tasks_without_one(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    write_task(tmp_path / "a", _splits())
    write_task(tmp_path / "b", _splits(), labels={"label_names": ["no", "yes", "well"]})
    (tmp_path / "labels.json").write_text('{"label_names": ["no", "yes", "maybe"]}')
    stream = folder_stream(tmp_path)
    assert [task.labels for task in stream.tasks] == [
        ("no", "yes", "maybe"),
        ("no", "yes", "well"),
    ]


def test_tasks_come_by_name_and_other_folders_are_left_alone(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    for name in ("b", "a", "c"):
        write_task(tmp_path / name, _splits())
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("mine")
    assert [task.name for task in folder_stream(tmp_path).tasks] == ["a", "b", "c"]


def test_pairs(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = {
        "train": [("a", "b", "yes"), ("c", "", "no")],
        "validation": [("e", "f", "yes")],
        "test": [("g", "h", "no")],
    }
    write_task(tmp_path / "t", rows, names=("text", "text_pair", "label"), ending=".csv")
    stream = folder_stream(tmp_path)
    (task,) = stream.tasks
    assert task.train["text_pair"][:] == ["b", ""]
    assert stream.prompt(task).fill("g", "h") == "Option: no, yes \ng\nh\nAnswer:"


def test_other_columns_are_left_out(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = {split: [(*row, 7) for row in rows] for split, rows in _splits().items()}
    write_task(tmp_path / "t", rows, names=("text", "label", "year"))
    assert folder_stream(tmp_path).tasks[0].train.column_names == ["text", "label", "example_id"]


def test_byte_order_mark_is_not_part_of_a_name(
    tmp_path: Path, folder_stream: Callable[..., Stream]
) -> None:
    for ending, row in ((".csv", "text,label\n{},yes\n"), (".jsonl", '{{"text": "{}", "label": "yes"}}\n')):  # fmt: skip  # noqa: E501
        folder = tmp_path / ending[1:] / "t"
        folder.mkdir(parents=True)
        for number, split in enumerate(("train", "validation", "test")):
            path = folder / f"{split}{ending}"
            path.write_text(row.format(f"text {number}"), encoding="utf-8-sig")
        assert folder_stream(folder.parent).tasks[0].train["text"][:] == ["text 0"]


def test_generation(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = {
        "train": [("Sum up.", "long", "short", ["short", "brief"]), ("Sum up.", "l", "s", ["s"])],
        "validation": [("Sum up.", "v", "w", ["w"])],
        "test": [("Sum up.", "x", "y", ["y", "z"])],
    }
    names = ("instruction", "input", "output", "references")
    write_task(tmp_path / "t", rows, names=names, ending=".parquet")
    stream = folder_stream(tmp_path)
    (task,) = stream.tasks
    assert (task.metric, task.labels, task.instruction) == ("rougeL", (), "Sum up.")
    assert task.train[0] == {
        "input": "long",
        "output": "short",
        "references": ["short", "brief"],
        "example_id": 0,
    }
    assert stream.label_names == ()
    assert stream.candidates(0, 1, task_id_given=False) == []
    assert list(stream.training_text()) == [
        "Sum up.\nlong\nAnswer: short",
        "Sum up.\nl\nAnswer: s",
    ]


def test_generation_without_references_refers_to_the_output(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = {"train": [("a", "b")], "validation": [("c", "d")], "test": [("e", "f")]}
    labels = {"metric": "exact_match", "instruction": "Go on."}
    write_task(tmp_path / "t", rows, names=("input", "output"), ending=".csv", labels=labels)
    (task,) = folder_stream(tmp_path).tasks
    assert (task.metric, task.instruction) == ("exact_match", "Go on.")
    assert task.test["references"][:] == [["f"]]


def test_instructions_of_single_rows_go_before_their_inputs(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = {
        "train": [("Add.", "1 2", "3")],
        "validation": [("Take away.", "2 1", "1")],
        "test": [("Add.", "2 2", "4")],
    }
    write_task(tmp_path / "t", rows, names=("instruction", "input", "output"))
    (task,) = folder_stream(tmp_path).tasks
    assert task.instruction == ""
    assert task.train["input"][:] == ["Add.\n1 2"]


# Validation rows that have to be split off.


def _many(count: int) -> list[tuple[str, str]]:
    return [(f"text {number}", "rare" if number % 10 == 3 else "common") for number in range(count)]


def test_missing_validation_is_a_tenth_of_train_of_every_label(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    write_task(tmp_path / "t", {"train": _many(200), "test": [("other", "rare")]})
    (task,) = folder_stream(tmp_path).tasks
    assert (len(task.train), len(task.validation)) == (180, 20)
    assert Counter(task.validation["label"]) == {0: 18, 1: 2}
    ids = [*task.train["example_id"], *task.validation["example_id"]]
    assert sorted(ids) == list(range(200))
    assert task.train["example_id"][:] == sorted(task.train["example_id"])
    for row in task.validation:
        assert row["text"] == f"text {row['example_id']}"
    again = folder_stream(tmp_path).tasks[0]
    assert again.validation["example_id"][:] == task.validation["example_id"][:]
    other = folder_stream(tmp_path, seed=1).tasks[0]
    assert other.validation["example_id"][:] != task.validation["example_id"][:]


def test_repeated_rows_are_split_off_together(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = [(f"text {number % 20}", "yes" if number % 2 else "no") for number in range(60)]
    write_task(tmp_path / "t", {"train": rows, "test": [("other", "yes")]})
    for seed in range(5):
        (task,) = folder_stream(tmp_path, seed=seed).tasks
        assert (len(task.train), len(task.validation)) == (54, 6)  # 2 of 20 texts, 3 times each
        assert not {normalise(x) for x in task.train["text"]} & {
            normalise(x) for x in task.validation["text"]
        }


def test_one_row_cannot_be_split(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    write_task(tmp_path / "t", {"train": [("a", "yes"), ("A!", "yes")], "test": [("b", "yes")]})
    with pytest.raises(ConfigError, match=r"train\.jsonl has 1 different rows, too few"):
        folder_stream(tmp_path)


# Mistakes that show before anything is read.


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "needs stream.path=<folder>: a folder that holds a sub-folder per task"),
        ("nowhere", "nowhere is not a folder; it must be a folder that holds"),
        (".", "holds a file train.csv, train.jsonl or train.parquet, so there is no task"),
    ],
)
def test_folder_that_is_none(
    tmp_path: Path, folder_config: Callable[..., FolderConfig], path: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_stream(folder_config(None if path is None else tmp_path / path), None)


def test_missing_test_split(
    tmp_path: Path, write_task: Callable[..., Path], folder_config: Callable[..., FolderConfig]
) -> None:
    splits = _splits()
    del splits["test"]
    write_task(tmp_path / "t", splits)
    expected = r"no test\.csv, test\.jsonl or test\.parquet in .*, which holds train\.jsonl, valid"
    with pytest.raises(ConfigError, match=expected):
        check_stream(folder_config(tmp_path), None)


def test_split_in_two_formats(
    tmp_path: Path, write_task: Callable[..., Path], folder_config: Callable[..., FolderConfig]
) -> None:
    write_task(tmp_path / "t", _splits())
    write_task(tmp_path / "t", {"train": _splits()["train"]}, ending=".csv")
    with pytest.raises(ConfigError, match=r"holds both train\.csv and train\.jsonl"):
        check_stream(folder_config(tmp_path), None)


@pytest.mark.parametrize("name", ["", ".", "..", "../tasks/t"])
def test_task_is_the_name_of_a_sub_folder(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_config: Callable[..., FolderConfig],
    name: str,
) -> None:
    write_task(tmp_path / "tasks" / "t", _splits())
    with pytest.raises(ConfigError, match="has no task"):
        check_stream(folder_config(tmp_path / "tasks", tasks=[name]), None)


# Mistakes inside files.


def _stumbles(stream: Callable[..., Stream], path: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(path)


def test_missing_column_names_the_file_and_its_columns(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    write_task(tmp_path / "t", _splits(), names=("sentence", "label"), ending=".csv")
    expected = r"train\.csv has the columns sentence, label, but must have text and label, or input"
    _stumbles(folder_stream, tmp_path, expected)


def test_splits_of_different_kinds(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    write_task(tmp_path / "t", _splits())
    write_task(tmp_path / "t", {"test": [("a", "b")]}, names=("input", "output"))
    expected = r"test\.jsonl has the columns input, output, but must have text and label as the tra"
    _stumbles(folder_stream, tmp_path, expected)


def test_pairs_in_one_split_only(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    write_task(tmp_path / "t", _splits())
    rows = {"test": [("a", "b", "yes")]}
    write_task(tmp_path / "t", rows, names=("text", "text_pair", "label"))
    expected = r"train\.jsonl lacks the column text_pair and .*test\.jsonl has it"
    _stumbles(folder_stream, tmp_path, expected)


@pytest.mark.parametrize("text", ["", "   ", None])
def test_empty_text(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    text: str | None,
) -> None:
    splits = _splits()
    splits["train"] += [(text, "yes"), ("more", "no"), (text, "no")]
    write_task(tmp_path / "t", splits)
    expected = r"'text' of .*train\.jsonl is empty in 2 rows \(row 3 is the first, counted from 0\)"
    _stumbles(folder_stream, tmp_path, expected)


def test_text_that_is_numbers(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = {split: [(len(text), label) for text, label in r] for split, r in _splits().items()}
    write_task(tmp_path / "t", rows)
    _stumbles(folder_stream, tmp_path, r"'text' of .*jsonl holds int64; it must hold text")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2, r"test\.jsonl has the label 2 in row 1 .*names no, yes.*a label is 0 to 1 or one of"),
        (-1, r"test\.jsonl has the label -1 in row 1"),
    ],
)
def test_label_out_of_range(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    label: int,
    message: str,
) -> None:
    splits = _splits(0, 1)
    splits["test"][1] = ("2", label)
    write_task(tmp_path / "t", splits, labels={"label_names": ["no", "yes"]})
    _stumbles(folder_stream, tmp_path, message)


def test_label_that_is_no_name(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    splits = _splits()
    splits["validation"] = [("null", "perhaps")]
    write_task(tmp_path / "t", splits, labels={"label_names": ["no", "yes"]})
    expected = r"validation\.jsonl has the label 'perhaps' in row 0 .*labels\.json names no, yes\."
    _stumbles(folder_stream, tmp_path, expected)


def test_label_that_train_does_not_have(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    splits = _splits()
    splits["test"].append(("3", "perhaps"))
    write_task(tmp_path / "t", splits)
    expected = r"test\.jsonl has the label 'perhaps' in row 2 .*train\.jsonl has only no, yes"
    _stumbles(folder_stream, tmp_path, expected)


@pytest.mark.parametrize("label", [None, ""])
def test_missing_label(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    label: str | None,
) -> None:
    splits = _splits()
    splits["train"][1] = ("text", label)
    write_task(tmp_path / "t", splits)
    _stumbles(folder_stream, tmp_path, r"train\.jsonl has no label in row 1")


def test_labels_that_are_fractions(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    write_task(tmp_path / "t", _splits(0.5, 1.5), ending=".parquet")
    _stumbles(folder_stream, tmp_path, "holds double; it must hold whole numbers or names")


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        (".jsonl", b'{"text": "a", "label": "no"}\n{"text"\n', "line 2 is not valid JSON"),
        (".jsonl", b'["a", "no"]\n', "line 1 must be a JSON object"),
        (".jsonl", b'{"text": "\xff", "label": "no"}\n', "cannot be read as jsonl"),
        (".jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": "no"}\n', "as jsonl"),
        (".jsonl", b"", "has the columns none"),
        (".csv", b"", "cannot be read as csv: Empty CSV file"),
        (".csv", b"text,label\na,no,x\n", "cannot be read as csv"),
        (".csv", b"text,label\n\xff,no\n", "cannot be read as csv"),
        (".csv", b"text;label\na;no\n", "has the columns text;label"),
        (".parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_file_that_cannot_be_read(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    ending: str,
    content: bytes,
    message: str,
) -> None:
    splits = _splits()
    del splits["train"]
    write_task(tmp_path / "t", splits)
    (tmp_path / "t" / f"train{ending}").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        folder_stream(tmp_path)
    assert f"train{ending}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold one JSON object"),
        ('{"label_names": "no"}', "label_names must be a list of strings"),
        ('{"label_names": ["a", "a"]}', "label_names lists 'a' twice"),
        ('{"label_names": ["no", "yes"], "answer_words": ["n"]}', "1 answer_words for 2 label_nam"),
        ('{"instruction": 3}', "instruction must be a string"),
        ('{"input_template": "{text.x}"}', "may hold only the fields"),
        ('{"metric": "bleu"}', "'bleu' is not one of accuracy, exact_match, rougeL"),
    ],
)
def test_labels_json_that_is_wrong(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_config: Callable[..., FolderConfig],
    content: str,
    message: str,
) -> None:
    folder = write_task(tmp_path / "t", _splits())
    (folder / "labels.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"labels\.json.*{message}"):
        check_stream(folder_config(tmp_path), None)


def test_template_that_shows_a_pair_where_there_is_none(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    write_task(tmp_path / "t", _splits(), labels={"input_template": "{text} {text_pair}"})
    _stumbles(folder_stream, tmp_path, r"shows \{text_pair\}, but .*train\.jsonl has no such col")


def test_accuracy_of_outputs(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = {"train": [("a", "b")], "validation": [("c", "d")], "test": [("e", "f")]}
    write_task(tmp_path / "t", rows, names=("input", "output"), labels={"metric": "accuracy"})
    _stumbles(folder_stream, tmp_path, "the metric accuracy needs labels")


def test_row_without_references(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = {"train": [("a", "b", ["b"])], "validation": [("c", "d", ["d"])]}
    write_task(tmp_path / "t", rows, names=("input", "output", "references"), ending=".parquet")
    test = pyarrow.table(
        {
            "input": ["e"],
            "output": ["f"],
            "references": pyarrow.array([[]], pyarrow.list_(pyarrow.string())),
        }
    )
    parquet.write_table(test, tmp_path / "t" / "test.parquet")
    _stumbles(folder_stream, tmp_path, r"test\.parquet has no references in row 0")
