"""Encoding: which tokens, in which columns, cut where; and the cache."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clpeft.config import ConfigError
from clpeft.streams.base import Stream
from clpeft.streams.encoded import EncodedStream, encode_stream, tokenizer_fingerprint
from clpeft.streams.tokenize import Encoder, _shares, answer_tokens

OPTIONS = "Option : large , small"


@pytest.fixture
def size_stream(two_tasks: Path, folder_stream: Callable[..., Stream]) -> Callable[..., Stream]:
    """The folder's task `size` alone."""

    def make(**changes: Any) -> Stream:
        return folder_stream(two_tasks, **{"tasks": ["size"], **changes})

    return make


@pytest.fixture
def ids(word_ids: dict[str, int]) -> Callable[[str], list[int]]:
    """The token ids of words written with blanks between them."""

    def of(text: str) -> list[int]:
        return [word_ids[word] for word in text.split()]

    return of


# Columns.


def test_causal_row_is_prompt_answer_and_end(
    size_stream: Callable[..., Stream], word_tokenizer: Any, ids: Any, tmp_path: Path
) -> None:
    stream = size_stream()
    encoded = encode_stream(stream, word_tokenizer(), "causal_lm", cache_dir=str(tmp_path / "c"))
    train = encoded.tasks[0].train
    assert set(train.column_names) == {
        "input_ids", "prompt_length", "label", "task_id", "example_id"
    }  # fmt: skip
    prompt = ids(f"{OPTIONS} a whale Answer :")
    assert train[1] == {
        "input_ids": prompt + ids("large </s>"),
        "prompt_length": len(prompt),
        "label": 0,
        "task_id": 0,
        "example_id": 1,
    }
    assert train["label"][:] == [1, 0, 1]
    assert encoded.answers == (tuple(ids("large </s>")), tuple(ids("small </s>")))
    assert [str(train.features[name].dtype) for name in ("label", "task_id", "example_id")] == [
        "int64"
    ] * 3
    assert train.features["prompt_length"].dtype == "int32"
    assert train.features["input_ids"].feature.dtype == "int32"


def test_labels_are_global_and_tasks_numbered(
    two_tasks: Path,
    folder_stream: Callable[..., Stream],
    word_tokenizer: Any,
    ids: Any,
    tmp_path: Path,
) -> None:
    stream = folder_stream(two_tasks)  # fruit, size
    encoded = encode_stream(stream, word_tokenizer(), "causal_lm", cache_dir=str(tmp_path / "c"))
    assert encoded.tasks[0].test["label"][:] == [0, 1]
    assert encoded.tasks[1].test["label"][:] == [3, 2]
    assert encoded.tasks[1].test["task_id"][:] == [1, 1]
    assert encoded.answers == tuple(
        tuple(ids(f"{word} </s>")) for word in ("apple", "pear", "large", "small")
    )


def test_begin_of_sequence_as_the_tokenizer_would_but_no_end_before_the_answer(
    size_stream: Callable[..., Stream], word_tokenizer: Any, ids: Any, tmp_path: Path
) -> None:
    tokenizer = word_tokenizer("<s> $A </s>")
    encoded = encode_stream(size_stream(), tokenizer, "causal_lm", cache_dir=str(tmp_path / "c"))
    row = encoded.tasks[0].train[0]
    prompt = ids(f"<s> {OPTIONS} a mouse Answer :")
    assert row["input_ids"] == prompt + ids("small </s>")
    assert row["prompt_length"] == len(prompt)
    assert encoded.answers[1] == tuple(ids("small </s>"))


def test_sequence_to_sequence_row(
    size_stream: Callable[..., Stream], word_tokenizer: Any, ids: Any, tmp_path: Path
) -> None:
    tokenizer = word_tokenizer("$A </s>")
    encoded = encode_stream(size_stream(), tokenizer, "seq2seq_lm", cache_dir=str(tmp_path / "c"))
    assert encoded.tasks[0].train[0] == {
        "input_ids": ids(f"{OPTIONS} a mouse Answer : </s>"),
        "labels": ids("small </s>"),
        "label": 1,
        "task_id": 0,
        "example_id": 0,
    }


def test_classifier_row(
    size_stream: Callable[..., Stream], word_tokenizer: Any, ids: Any, tmp_path: Path
) -> None:
    tokenizer = word_tokenizer("<s> $A </s>")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    encoded = encode_stream(
        size_stream(), tokenizer, "sequence_classification", cache_dir=str(tmp_path / "c")
    )
    assert encoded.tasks[0].test[1] == {
        "input_ids": ids("<s> a horse </s>"),
        "label": 0,
        "task_id": 0,
        "example_id": 1,
    }
    assert encoded.answers == ((), ())


def test_classifier_pair_with_token_types(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    word_tokenizer: Any,
    ids: Any,
) -> None:
    rows = {
        "train": [("a mouse", "a bear", "small"), ("a bear", "a flea", "large")],
        "validation": [("a wren", "a bear", "small")],
        "test": [("a flea", "a bear", "small")],
    }
    write_task(tmp_path / "t" / "size", rows, names=("text", "text_pair", "label"))
    stream = folder_stream(tmp_path / "t", names_task=True)
    tokenizer = word_tokenizer("<s> $A </s>", pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoded = encode_stream(
        stream, tokenizer, "sequence_classification", cache_dir=str(tmp_path / "c")
    )
    row = encoded.tasks[0].train[0]
    assert row["input_ids"] == ids("<s> size : a mouse </s> a bear </s>")
    assert row["token_type_ids"] == [0] * 6 + [1] * 3


def test_generation_rows(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    word_tokenizer: Any,
    ids: Any,
) -> None:
    rows = {
        "train": [("a mouse", "small red"), ("a bear", "big")],
        "validation": [("a wren", "small")],
        "test": [("a flea", "small")],
    }
    write_task(tmp_path / "t" / "say", rows, names=("input", "output"))
    stream = folder_stream(tmp_path / "t")
    encoded = encode_stream(stream, word_tokenizer(), "causal_lm", cache_dir=str(tmp_path / "c"))
    assert encoded.tasks[0].train[0] == {
        "input_ids": ids("a mouse Answer : small red </s>"),
        "prompt_length": 4,
        "label": -1,
        "task_id": 0,
        "example_id": 0,
    }
    assert encoded.answers == ()
    with pytest.raises(ConfigError, match="'say' of 'mine' has answers to be written"):
        encode_stream(
            stream, word_tokenizer(), "sequence_classification", cache_dir=str(tmp_path / "c")
        )


def test_prompt_names_the_task_where_asked_for(
    size_stream: Callable[..., Stream], word_tokenizer: Any, ids: Any, tmp_path: Path
) -> None:
    stream = size_stream(names_task=True)
    encoded = encode_stream(stream, word_tokenizer(), "causal_lm", cache_dir=str(tmp_path / "c"))
    assert encoded.tasks[0].train[0]["input_ids"][:3] == ids("Task : size")


@pytest.mark.parametrize(
    ("task_type", "template", "expected"),
    [
        ("causal_lm", "<s> $A </s>", f"<s> {OPTIONS} Answer :"),
        ("seq2seq_lm", "$A </s>", f"{OPTIONS} Answer : </s>"),
        ("sequence_classification", "<s> $A </s>", "<s> </s>"),
    ],
)
def test_bare_prompt_is_what_all_inputs_share(
    size_stream: Callable[..., Stream],
    word_tokenizer: Any,
    ids: Any,
    task_type: str,
    template: str,
    expected: str,
) -> None:
    stream = size_stream()
    encoder = Encoder(stream, word_tokenizer(template), task_type, ((0,), (0,)))
    assert encoder.bare(stream.tasks[0]) == ids(expected)


def test_examples_in_memory_are_encoded_as_the_splits_are(
    size_stream: Callable[..., Stream], word_tokenizer: Any, tmp_path: Path
) -> None:
    stream, tokenizer = size_stream(max_length=10), word_tokenizer()
    encoded = encode_stream(stream, tokenizer, "causal_lm", cache_dir=str(tmp_path / "c"))
    encoder = Encoder(stream, tokenizer, "causal_lm", encoded.answers)
    rows = {"text": ["a big old whale", "a mouse"], "label": [0, 1], "example_id": [-1, -2]}
    found = encoder.encode(stream.tasks[0], pyarrow.table(rows)).to_pylist()
    (whale, mouse) = encoded.tasks[0].train[1], encoded.tasks[0].train[0]
    # seven words of the prompt, two of the answer: one of the input is left
    assert [len(row["input_ids"]) for row in found] == [10, 10]
    assert [row | {"example_id": 0} for row in found] == [
        whale | {"example_id": 0},
        mouse | {"example_id": 0},
    ]
    assert [row["example_id"] for row in found] == [-1, -2]


# Cutting. The prompt `Option : large , small <input> Answer :` has 7 fixed tokens, the answer 2.


@pytest.fixture
def digits(
    tmp_path: Path, write_task: Callable[..., Path], folder_stream: Callable[..., Stream]
) -> Callable[..., Stream]:
    """A task whose inputs are nine words long."""

    def make(**changes: Any) -> Stream:
        rows = {
            "train": [("1 2 3 4 5 6 7 8 9", "small"), ("9 8 7 6 5 4 3 2 1", "large")],
            "validation": [("1 1 1", "small")],
            "test": [("2 2 2", "large")],
        }
        write_task(tmp_path / "d" / "digits", rows)
        return folder_stream(tmp_path / "d", **changes)

    return make


@pytest.mark.parametrize(("max_length", "kept"), [(18, 9), (17, 8), (12, 3), (9, 0)])
def test_input_alone_is_cut_and_from_its_end(
    digits: Callable[..., Stream],
    word_tokenizer: Any,
    ids: Any,
    tmp_path: Path,
    max_length: int,
    kept: int,
) -> None:
    stream = digits(max_length=max_length)
    encoded = encode_stream(stream, word_tokenizer(), "causal_lm", cache_dir=str(tmp_path / "c"))
    numbers = "1 2 3 4 5 6 7 8 9".split()[:kept]
    prompt = ids(f"{OPTIONS} {' '.join(numbers)} Answer :")
    row = encoded.tasks[0].train[0]
    assert row["input_ids"] == prompt + ids("small </s>")
    assert row["prompt_length"] == len(prompt)
    assert len(row["input_ids"]) == min(max_length, 18)


def test_prompt_and_its_end_are_counted_for_sequence_to_sequence(
    digits: Callable[..., Stream], word_tokenizer: Any, ids: Any, tmp_path: Path
) -> None:
    stream = digits(max_length=14)
    encoded = encode_stream(
        stream, word_tokenizer("$A </s>"), "seq2seq_lm", cache_dir=str(tmp_path / "c")
    )
    row = encoded.tasks[0].train[0]
    assert row["input_ids"] == ids(f"{OPTIONS} 1 2 3 4 Answer : </s>")
    assert row["labels"] == ids("small </s>")


def test_too_short_a_length_is_told_with_the_numbers(
    digits: Callable[..., Stream], word_tokenizer: Any, tmp_path: Path
) -> None:
    expected = (
        r"task 'digits' takes 7 tokens without its input and the answer 2 .*, which is more than "
        r"stream.max_length=8"
    )
    with pytest.raises(ConfigError, match=expected):
        encode_stream(
            digits(max_length=8), word_tokenizer(), "causal_lm", cache_dir=str(tmp_path / "c")
        )
    assert list((tmp_path / "c" / "tokenized").iterdir()) == []  # nothing half-done is left


def test_what_is_cut_does_not_depend_on_the_right_answer(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    word_tokenizer: Any,
) -> None:
    rows = {
        "train": [("1 2 3 4 5 6 7 8 9", "small"), ("9 8 7 6 5 4 3 2 1", "big red apple")],
        "validation": [("1 1 1", "small")],
        "test": [("2 2 2", "small")],
    }
    write_task(tmp_path / "d" / "digits", rows)
    stream = folder_stream(tmp_path / "d", max_length=18)
    encoded = encode_stream(stream, word_tokenizer(), "causal_lm", cache_dir=str(tmp_path / "c"))
    one, other = encoded.tasks[0].train["prompt_length"][:]
    assert one == other == 14  # room for the longest answer, three words and the end


def test_longer_text_of_a_pair_is_cut_first() -> None:
    assert _shares([9, 4], 3) == [6, 4]
    assert _shares([4, 9], 7) == [3, 3]
    assert _shares([4, 9], 8) == [3, 2]
    assert _shares([9, 4], 8) == [2, 3]
    assert _shares([5, 5], 1) == [4, 5]
    assert _shares([3], 5) == [0]
    assert _shares([1, 1], 9) == [0, 0]


def test_pair_is_cut_inside_its_prompt(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    word_tokenizer: Any,
    ids: Any,
) -> None:
    rows = {
        "train": [("1 2 3 4 5 6", "7 8 9", "small"), ("9 9", "8", "large")],
        "validation": [("1", "2", "small")],
        "test": [("2", "2", "large")],
    }
    labels = {"label_names": ["large", "small"], "input_template": "Pick {text} . {text_pair}"}
    write_task(tmp_path / "d" / "t", rows, names=("text", "text_pair", "label"), labels=labels)
    stream = folder_stream(tmp_path / "d", max_length=15)
    encoded = encode_stream(stream, word_tokenizer(), "causal_lm", cache_dir=str(tmp_path / "c"))
    # 9 fixed tokens, 9 of input, 2 of answer: 5 too many, 3 to make the texts equal, 1 each
    assert encoded.tasks[0].train[0]["input_ids"] == ids(
        f"{OPTIONS} Pick 1 2 . 7 8 Answer : small </s>"
    )


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every byte is a token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def test_characters_of_several_tokens_are_cut_as_a_whole(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = {
        "train": [("ab🙂🙂", "x"), ("cd", "y")],
        "validation": [("ef", "x")],
        "test": [("gh", "y")],
    }
    write_task(tmp_path / "d" / "t", rows)
    fixed = len("Option: x, y \n") + len("\nAnswer:") + len(" x") + 1
    for room, shown in ((10, "ab🙂🙂"), (9, "ab🙂"), (6, "ab🙂"), (5, "ab"), (1, "a"), (0, "")):
        stream = folder_stream(tmp_path / "d", max_length=fixed + room)
        encoded = encode_stream(stream, byte_tokenizer, "causal_lm", cache_dir=str(tmp_path / "c"))
        text = byte_tokenizer.decode(encoded.tasks[0].train[0]["input_ids"])
        assert text == f"Option: x, y \n{shown}\nAnswer: x</s>"


def test_classifier_text_is_cut_behind_the_tasks_name(
    digits: Callable[..., Stream], word_tokenizer: Any, ids: Any, tmp_path: Path
) -> None:
    stream = digits(max_length=8, names_task=True)
    encoded = encode_stream(
        stream, word_tokenizer("<s> $A </s>"), "sequence_classification", cache_dir=str(tmp_path)
    )
    row = encoded.tasks[0].train[0]
    assert row["input_ids"] == ids("<s> <unk> : 1 2 3 4 </s>")


# Answers.


def test_answers_follow_a_blank_once(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    (tokens,) = answer_tokens(byte_tokenizer, ["yes"])
    assert byte_tokenizer.decode(tokens) == " yes"


def test_answers_of_a_tokenizer_that_adds_blanks_itself() -> None:
    # as SentencePiece does: a blank before every text, and a word's blank in its first token
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "▁Answer:", "▁yes", "▁", "▁no"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert tokens(" yes") == [words["▁"], words["▁yes"]]  # alone, it begins with two blanks
    assert answer_tokens(tokenizer, ["yes", "no"]) == [[words["▁yes"]], [words["▁no"]]]
    assert [*tokens("Answer:"), words["▁yes"]] == tokens("Answer: yes")


def test_answers_that_melt_into_the_prompt_are_taken_alone() -> None:
    words = {
        word: i for i, word in enumerate(["<unk>", "</s>", "Answer:", " a", "Answer: b", " b"])
    }
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("Answer: b|Answer:| a| b"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    assert tokenizer("Answer: b", add_special_tokens=False)["input_ids"] == [words["Answer: b"]]
    assert answer_tokens(tokenizer, ["a", "b", "a"]) == [
        [words[" a"]],
        [words[" b"]],
        [words[" a"]],
    ]


def test_answers_that_look_alike_are_refused(
    tmp_path: Path,
    write_task: Callable[..., Path],
    folder_stream: Callable[..., Stream],
    word_tokenizer: Any,
) -> None:
    rows = {
        "train": [("a mouse", "tiny"), ("a whale", "huge")],
        "validation": [("a bear", "huge")],
        "test": [("a flea", "tiny")],
    }
    write_task(tmp_path / "d" / "size", rows)
    with pytest.raises(ConfigError, match="'huge' and 'tiny' of task 'size' apart"):
        encode_stream(
            folder_stream(tmp_path / "d"), word_tokenizer(), "causal_lm", cache_dir=str(tmp_path)
        )


def test_tokenizer_without_an_end_is_refused(
    size_stream: Callable[..., Stream], word_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        encode_stream(
            size_stream(), word_tokenizer(eos=False), "causal_lm", cache_dir=str(tmp_path)
        )
    encode_stream(
        size_stream(), word_tokenizer(eos=False), "sequence_classification", cache_dir=str(tmp_path)
    )


# The cache.


def _contents(encoded: EncodedStream) -> list[list[dict[str, Any]]]:
    return [[*task.split(s)] for task in encoded.tasks for s in ("train", "validation", "test")]


def _entries(cache: Path) -> list[Path]:
    return sorted((cache / "tokenized").iterdir())


def test_second_call_reads_what_the_first_wrote(
    size_stream: Callable[..., Stream],
    word_tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "c"
    first = encode_stream(size_stream(), word_tokenizer(), "causal_lm", cache_dir=str(cache))
    (entry,) = _entries(cache)
    before = {path: path.stat().st_mtime_ns for path in entry.iterdir()}
    with caplog.at_level(logging.WARNING):
        again = encode_stream(size_stream(), word_tokenizer(), "causal_lm", cache_dir=str(cache))
    assert _entries(cache) == [entry]
    assert {path: path.stat().st_mtime_ns for path in entry.iterdir()} == before
    assert _contents(again) == _contents(first)
    assert caplog.records == []


def test_calls_leave_the_tokenizers_fingerprint_alone(
    digits: Callable[..., Stream], word_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = word_tokenizer("<s> $A </s>")
    before = tokenizer_fingerprint(tokenizer)
    # truncation stays set in the tokenizer's backend
    encode_stream(
        digits(max_length=8), tokenizer, "sequence_classification", cache_dir=str(tmp_path)
    )
    tokenizer(["a", "a a"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before


def test_what_changes_tokens_has_an_entry_of_its_own(
    size_stream: Callable[..., Stream], word_tokenizer: Any, tmp_path: Path
) -> None:
    plain, ending = word_tokenizer(), word_tokenizer("$A </s>")
    other_pad = word_tokenizer()
    other_pad.pad_token = "red"
    prints = {tokenizer_fingerprint(x) for x in (plain, ending, other_pad)}
    assert len(prints) == 3
    assert tokenizer_fingerprint(word_tokenizer()) == tokenizer_fingerprint(plain)
    for stream, tokenizer, task_type in (
        (size_stream(), plain, "causal_lm"),
        (size_stream(), ending, "causal_lm"),
        (size_stream(), plain, "seq2seq_lm"),
        (size_stream(max_length=32), plain, "causal_lm"),
        (size_stream(), plain, "causal_lm"),
    ):
        encode_stream(stream, tokenizer, task_type, cache_dir=str(tmp_path / "c"))
    assert len(_entries(tmp_path / "c")) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "manifest", "no manifest", "{}"])
def test_damaged_entry_is_made_anew(
    size_stream: Callable[..., Stream],
    word_tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    cache = tmp_path / "c"
    first = _contents(
        encode_stream(size_stream(), word_tokenizer(), "causal_lm", cache_dir=str(cache))
    )
    (entry,) = _entries(cache)
    victim = entry / "0-test.arrow"
    content = victim.read_bytes()
    if damage == "cut":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        victim.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    elif damage == "missing":
        victim.unlink()
    elif damage == "manifest":
        (entry / "manifest.json").write_text('{"0-test.arr')
    elif damage == "{}":
        (entry / "manifest.json").write_text(damage)
    else:
        (entry / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        again = encode_stream(size_stream(), word_tokenizer(), "causal_lm", cache_dir=str(cache))
    assert _contents(again) == first
    assert [record.getMessage() for record in caplog.records] == [
        f"The encoded stream in {entry} is damaged; encoding it again."
    ]
    assert _entries(cache) == [entry]  # nothing is left beside it
    assert json.loads((entry / "manifest.json").read_text()).keys() == {
        f"0-{split}.arrow" for split in ("train", "validation", "test")
    }


def _encode_when_told(
    stream: Stream, tokenizer: Any, cache: Path, start: Any, results: Any
) -> None:
    start.wait()
    encoded = encode_stream(stream, tokenizer, "causal_lm", cache_dir=str(cache))
    results.put(_contents(encoded))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork with threads about
@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_may_write_the_same_entry(
    size_stream: Callable[..., Stream], word_tokenizer: Any, tmp_path: Path, damaged: bool
) -> None:
    stream, tokenizer, cache = size_stream(), word_tokenizer(), tmp_path / "c"
    expected = _contents(
        encode_stream(stream, tokenizer, "causal_lm", cache_dir=str(tmp_path / "other"))
    )
    if damaged:
        encode_stream(stream, tokenizer, "causal_lm", cache_dir=str(cache))
        (_entries(cache)[0] / "0-train.arrow").write_bytes(b"")
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_encode_when_told, args=(stream, tokenizer, cache, start, results))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert found == [expected, expected]
    assert len(_entries(cache)) == 1


def test_loser_of_the_race_takes_the_winners_entry(
    size_stream: Callable[..., Stream],
    word_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, tokenizer, cache = size_stream(), word_tokenizer(), tmp_path / "c"
    original = Path.rename
    raced = []

    def late(self: Path, target: Path) -> Path:
        if not raced:  # someone else finishes just before us
            raced.append(target)
            encode_stream(stream, tokenizer, "causal_lm", cache_dir=str(cache))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", late)
    encoded = encode_stream(stream, tokenizer, "causal_lm", cache_dir=str(cache))
    assert raced
    assert len(_contents(encoded)[0]) == 3
    assert len(_entries(cache)) == 1
