"""Streams: labels, scenarios, content, samples."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from clpeft.config import ConfigError
from clpeft.streams.base import Stream
from clpeft.streams.build import build_stream, check_stream
from clpeft.streams.contents import content_digest, normalise
from clpeft.streams.draw import rank_within, sample_rows
from clpeft.streams.folder import FolderConfig
from clpeft.streams.toy import ToyConfig, toy_neutral_text

# Labels and scenarios. fruit has apple, pear (0, 1), size has large, small (2, 3).


def test_task_scenario_keeps_tasks_apart(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    stream = folder_stream(two_tasks, scenario="task")
    assert stream.label_names == ("fruit/apple", "fruit/pear", "size/large", "size/small")
    assert stream.answer_words == ("apple", "pear", "large", "small")
    assert stream.global_labels(1) == [2, 3]
    for seen in range(3):
        assert stream.candidates(0, seen, task_id_given=False) == [0, 1]
        assert stream.candidates(1, seen, task_id_given=False) == [2, 3]
    assert stream.training_candidates(1) == [2, 3]


def test_class_scenario_lets_all_labels_seen_compete(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    stream = folder_stream(two_tasks, scenario="class")
    assert stream.candidates(0, 0, task_id_given=False) == [0, 1]
    assert stream.candidates(0, 1, task_id_given=False) == [0, 1]
    assert stream.candidates(0, 2, task_id_given=False) == [0, 1, 2, 3]
    assert stream.candidates(1, 1, task_id_given=False) == [0, 1, 2, 3]  # a task ahead
    assert stream.candidates(0, 2, task_id_given=True) == [0, 1]
    assert stream.candidates(1, 2, task_id_given=True) == [2, 3]
    assert stream.training_candidates(0) == [0, 1]
    assert stream.training_candidates(1) == [0, 1, 2, 3]


def test_domain_scenario_has_one_label_space(toy_config: Callable[..., ToyConfig]) -> None:
    stream = build_stream(toy_config(num_tasks=3), data_dir=None)
    assert stream.label_names == ("north", "south", "east", "west")
    assert stream.answer_words == ("north", "south", "east", "west")
    for task in range(3):
        assert stream.global_labels(task) == [0, 1, 2, 3]
        assert stream.candidates(task, 1, task_id_given=False) == [0, 1, 2, 3]
        assert stream.training_candidates(task) == [0, 1, 2, 3]


def test_domain_scenario_refuses_tasks_with_different_labels(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    with pytest.raises(ConfigError, match=r"'fruit' has apple, pear and 'size' has large, small"):
        folder_stream(two_tasks, scenario="domain")


def test_tasks_keep_the_order_asked_for(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    stream = folder_stream(two_tasks, tasks=["size", "fruit"])
    assert [(task.name, task.index) for task in stream.tasks] == [("size", 0), ("fruit", 1)]
    assert stream.label_names[:2] == ("size/large", "size/small")


def test_stream_is_built_from_a_composed_config_too(
    two_tasks: Path, folder_config: Callable[..., FolderConfig]
) -> None:
    config = folder_config(two_tasks)
    composed = OmegaConf.structured(config)
    assert (
        build_stream(composed, data_dir=None).fingerprint
        == build_stream(config, data_dir=None).fingerprint
    )


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["fruit", "size", "fruit"]}, "lists the task 'fruit' twice"),
        ({"tasks": []}, "has no tasks"),
        ({"tasks": ["fruits"]}, r"no task 'fruits' in .*tasks\. Did you mean 'fruit'"),
        ({"order": "order1"}, "has no published orders, so stream.order=order1"),
        ({"scenario": "domains"}, "must be one of task, class, domain"),
    ],
)
def test_mistakes_are_told_without_loading(
    two_tasks: Path, folder_config: Callable[..., FolderConfig], changes: dict, message: str
) -> None:
    for split in two_tasks.glob("*/*.jsonl"):
        split.write_text("not JSON at all")  # whoever reads it stumbles
    with pytest.raises(ConfigError, match=message):
        check_stream(folder_config(two_tasks, **changes), None)


def test_unknown_kind_lists_what_there_is(toy_config: Callable[..., ToyConfig]) -> None:
    config = toy_config()
    config.kind = "toys"
    with pytest.raises(ConfigError, match=r"'toys', which no stream registers.*'toy'"):
        check_stream(config, None)


def test_domain_labels_are_compared_without_loading_where_labels_json_tells_them(
    two_tasks: Path, folder_config: Callable[..., FolderConfig]
) -> None:
    (two_tasks / "fruit" / "labels.json").write_text('{"label_names": ["apple", "pear"]}')
    (two_tasks / "size" / "labels.json").write_text('{"label_names": ["large", "small"]}')
    config = folder_config(two_tasks, scenario="domain")
    with pytest.raises(ConfigError, match="the same labels in every task"):
        check_stream(config, None)


def test_domain_scenario_needs_the_same_answer_words_too(
    two_tasks: Path, folder_config: Callable[..., FolderConfig]
) -> None:
    names = '"label_names": ["x", "y"], "answer_words": '
    (two_tasks / "fruit" / "labels.json").write_text(f'{{{names}["yes", "no"]}}')
    (two_tasks / "size" / "labels.json").write_text(f'{{{names}["true", "false"]}}')
    with pytest.raises(ConfigError, match="the same answer words in every task"):
        check_stream(folder_config(two_tasks, scenario="domain"), None)


def test_empty_split_is_an_error(two_tasks: Path, folder_stream: Callable[..., Stream]) -> None:
    (two_tasks / "size" / "test.jsonl").unlink()
    (two_tasks / "size" / "test.csv").write_text("text,label\n")
    with pytest.raises(ConfigError, match="The test split of task 'size' has no rows"):
        folder_stream(two_tasks)


# Content.


def test_content_is_lower_cased_letters_and_digits() -> None:
    assert normalise("It's 9 o'clock, Über-Jane!") == "its9oclocküberjane"
    assert normalise("It's 9 O'CLOCK") == "its9oclock"
    assert normalise("你好, 世界") == "你好世界"
    # texts without any stay themselves: two different ones are not the same content
    assert normalise("?!") == "?!"
    assert normalise("…") == "…"


def test_pairs_are_cut_between_their_texts() -> None:
    assert content_digest("ab", "c") != content_digest("a", "bc")
    assert content_digest("ab", "c") == content_digest("ab", "c")


@pytest.mark.parametrize(
    ("first", "second"), [("train", "validation"), ("train", "test"), ("validation", "test")]
)
def test_overlap_of_any_two_splits_is_found(
    two_tasks: Path, folder_stream: Callable[..., Stream], first: str, second: str
) -> None:
    for split in (first, second):
        with (two_tasks / "size" / f"{split}.jsonl").open("a") as file:
            text = "The Elephant" if split == first else "the  elephant!"
            file.write(f'{{"text": "{text}", "label": "large"}}\n')
    rows = {"validation": 2, "test": 3}[second]
    expected = (
        f"1 of the {rows} {second} rows of task 'size' are in its {first} split too, for example "
        "'the  elephant!'"
    )
    with pytest.raises(ConfigError, match=expected):
        folder_stream(two_tasks)


def test_overlap_that_is_allowed_is_a_warning_with_the_count(
    two_tasks: Path, folder_stream: Callable[..., Stream], caplog: pytest.LogCaptureFixture
) -> None:
    with (two_tasks / "size" / "test.jsonl").open("a") as file:
        file.write('{"text": "A MOUSE", "label": "small"}\n{"text": "a wren.", "label": "small"}\n')
    with caplog.at_level(logging.WARNING):
        stream = folder_stream(two_tasks, allow_overlap=True)
    assert len(stream.tasks[1].test) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "2 of the 4 test rows of task 'size' are in its train split too, for example 'A MOUSE'; "
        "going on because stream.allow_overlap is true."
    ]


def test_overlap_is_found_before_rows_are_sampled_away(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    with (two_tasks / "size" / "test.jsonl").open("a") as file:
        file.write('{"text": "a mouse", "label": "small"}\n' * 1)
    for seed in range(5):
        with pytest.raises(ConfigError, match="1 of the 3 test rows"):
            folder_stream(two_tasks, max_train=1, max_test=1, seed=seed)


def test_pairs_that_share_one_text_only_do_not_overlap(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = {
        "train": [("it rains", "the street is wet", "yes"), ("it rains", "it is dry", "no")],
        "validation": [("it rains", "water falls", "yes")],
        "test": [("it rains", "nothing falls", "no")],
    }
    write_task(tmp_path / "nli", rows, names=("text", "text_pair", "label"))
    assert len(folder_stream(tmp_path).tasks[0].train) == 2
    rows["test"].append(("It rains.", "The street is wet.", "yes"))
    write_task(tmp_path / "nli", rows, names=("text", "text_pair", "label"))
    with pytest.raises(ConfigError, match="1 of the 2 test rows"):
        folder_stream(tmp_path)


# Samples.


def test_ranks_count_within_labels() -> None:
    labels = np.array([1, 0, 1, 1, 0])
    draw = np.array([0.5, 0.9, 0.1, 0.7, 0.2])
    assert rank_within(labels, draw).tolist() == [1, 1, 0, 2, 0]


def test_samples_are_balanced_as_far_as_the_rows_allow() -> None:
    labels = np.array([0] * 50 + [1] * 4 + [2] * 46)
    for size, counts in ((9, (3, 3, 3)), (30, (13, 4, 13)), (100, (50, 4, 46))):
        rows = sample_rows(labels, size, 100, [0])
        assert len(set(rows.tolist())) == size
        assert tuple(np.bincount(labels[rows], minlength=3)) == counts


def test_a_smaller_sample_begins_a_larger_one() -> None:
    labels = np.arange(60) % 3
    large = sample_rows(labels, 40, 60, [7])
    assert sample_rows(labels, 10, 60, [7]).tolist() == large[:10].tolist()
    assert sample_rows(labels, 40, 60, [8]).tolist() != large.tolist()
    plain = sample_rows(None, 40, 60, [7])
    assert sample_rows(None, 10, 60, [7]).tolist() == plain[:10].tolist()


def test_sampled_rows_keep_their_number_in_the_full_split(
    toy_config: Callable[..., ToyConfig],
) -> None:
    full = build_stream(toy_config(), data_dir=None)
    cut = build_stream(toy_config(max_train=8, max_validation=4, max_test=400), data_dir=None)
    for whole, part in zip(full.tasks, cut.tasks, strict=True):
        assert (len(part.train), len(part.validation), len(part.test)) == (8, 4, 16)
        assert Counter(part.train["label"]) == {0: 2, 1: 2, 2: 2, 3: 2}
        for row in part.train:
            assert whole.train[row["example_id"]] == row
        assert part.test[:] == whole.test[:]


def test_a_tasks_sample_is_the_same_in_every_order(toy_config: Callable[..., ToyConfig]) -> None:
    one = build_stream(toy_config(tasks=["ashford", "elmford"], max_train=8), data_dir=None)
    other = build_stream(toy_config(tasks=["elmford", "ashford"], max_train=8), data_dir=None)
    assert one.tasks[0].train["example_id"] == other.tasks[1].train["example_id"]
    assert one.tasks[0].train["example_id"] != one.tasks[1].train["example_id"]


def test_sampling_depends_on_the_streams_seed(
    two_tasks: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> None:
    rows = [(f"text {number}", "even" if number % 2 else "odd") for number in range(100)]
    splits = {"train": rows[:60], "validation": rows[60:80], "test": rows[80:]}
    write_task(two_tasks / "numbers", splits)

    def chosen(seed: int) -> list[int]:
        stream = folder_stream(two_tasks, tasks=["numbers"], max_train=10, seed=seed)
        return stream.tasks[0].train["example_id"][:]

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


# Fingerprints.


def test_fingerprint_is_of_content_not_of_place(
    two_tasks: Path, folder_stream: Callable[..., Stream], tmp_path: Path
) -> None:
    first = folder_stream(two_tasks).fingerprint
    moved = two_tasks.rename(tmp_path / "elsewhere")
    assert folder_stream(moved).fingerprint == first


@pytest.mark.parametrize(
    "changes",
    [
        {"scenario": "class"},
        {"max_length": 32},
        {"names_task": True},
        {"max_train": 2},
        {"tasks": ["fruit"]},
        {"tasks": ["size", "fruit"]},
        {"chance": 0.5},
    ],
)
def test_fingerprint_changes_with_whatever_changes_results(
    two_tasks: Path, folder_stream: Callable[..., Stream], changes: dict
) -> None:
    assert folder_stream(two_tasks, **changes).fingerprint != folder_stream(two_tasks).fingerprint


def test_fingerprint_changes_with_the_text(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    before = folder_stream(two_tasks).fingerprint
    path = two_tasks / "size" / "test.jsonl"
    path.write_text(path.read_text().replace("a flea", "a Flea"))
    assert folder_stream(two_tasks).fingerprint != before


def test_fingerprint_changes_with_the_instruction(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    before = folder_stream(two_tasks).fingerprint
    (two_tasks / "size" / "labels.json").write_text('{"instruction": "How big?"}')
    assert folder_stream(two_tasks).fingerprint != before


# Text for tokenizers and warm-ups.


def test_fingerprint_of_a_split_is_of_what_is_scored(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    whole = folder_stream(two_tasks)
    fewer = folder_stream(two_tasks, max_train=2)

    # other training data, the same test
    assert fewer.fingerprint != whole.fingerprint
    assert fewer.fingerprint_of("test") == whole.fingerprint_of("test")
    assert fewer.fingerprint_of("train") != whole.fingerprint_of("train")
    # the same examples, asked otherwise
    named = folder_stream(two_tasks, names_task=True)
    assert named.fingerprint_of("test") != whole.fingerprint_of("test")


@pytest.mark.parametrize(
    ("scenario", "listed"), [("task", True), ("domain", True), ("class", False)]
)
def test_prompts_list_the_answers_unless_they_would_tell_the_task(
    toy_config: Callable[..., ToyConfig], scenario: str, listed: bool
) -> None:
    stream = build_stream(toy_config(scenario=scenario), data_dir=None)
    for task in stream.tasks:
        prompt = stream.prompt(task).fill("a letter")
        assert all((word in prompt) is listed for word in task.answer_words)


def test_training_text_is_the_train_split_in_its_prompts(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    texts = list(folder_stream(two_tasks, tasks=["size"]).training_text())
    assert texts == [
        "Option: large, small \na mouse\nAnswer: small",
        "Option: large, small \na whale\nAnswer: large",
        "Option: large, small \na wren\nAnswer: small",
    ]


def test_neutral_text_is_other_tasks_training_text(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    with (two_tasks / "fruit" / "train.jsonl").open("a") as file:
        file.write('{"text": "A Flea!", "label": "apple"}\n')  # content of size's test split
    stream = folder_stream(two_tasks, tasks=["size"])
    texts = stream.neutral_text(0)
    assert sorted(texts) == ["green apple", "red apple", "yellow pear"]
    assert stream.neutral_text(0) == texts


def test_neutral_text_is_the_toys_where_no_task_is_left(
    two_tasks: Path, folder_stream: Callable[..., Stream]
) -> None:
    assert folder_stream(two_tasks).neutral_text(3) == toy_neutral_text(3)


def test_schemas_need_no_heavy_library() -> None:
    program = (
        "import sys; from clpeft.registry import STREAMS; list(STREAMS); "
        "print([name for name in ('datasets', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.stdout.strip(), found.stderr) == ("[]", "")
