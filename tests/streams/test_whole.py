"""Whole examples: what a model is to write, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clpeft.streams import whole
from clpeft.streams.base import Stream
from clpeft.streams.encoded import encode_stream
from clpeft.streams.tokenize import Encoder
from clpeft.streams.whole import Flaw, Whole, encode_whole, parsed, request, written

ROUND_TRIPS = {
    "plain": (("a red apple",), "apple"),
    "several lines": (("one\ntwo: three\n\nfour",), "two words"),
    "the mark in the text": (("Question: why? Answer: because",), "yes"),
    "the mark at the end": (("it ends with Answer:",), "yes"),
    "the mark at the beginning": (("Answer: it begins",), "yes"),
    "the mark with colons": (("Answer:: and Answer:::",), "yes"),
    "the mark in the answer": (("a text",), "Answer: this Second text: that"),
    "colons at the answer's beginning": (("a text",), ":: yes"),
    "a pair": (("a mouse", "a bear"), "small"),
    "marks in a pair": (("Second text: a", "Answer: b Second text::"), "small"),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_what_is_written_is_read_again(name: str) -> None:
    texts, answer = ROUND_TRIPS[name]
    assert parsed(written(texts, answer), len(texts)) == Whole(texts, answer)


def test_written_as_documented() -> None:
    assert written(["a mouse"], "small") == "a mouse\nAnswer: small"
    assert written(["a", "b"], "c") == "a\nSecond text: b\nAnswer: c"
    assert written(["is Answer: b"], "c") == "is Answer:: b\nAnswer: c"


FLAWED = {
    "several answers": ("a mouse\nAnswer: small\nAnswer: large", 1, Flaw.SEVERAL_ANSWERS),
    "an answer twice in a pair": ("a\nAnswer: b\nSecond text: c\nAnswer: d", 2, "several_answers"),
    "no answer": ("a mouse and a bear", 1, Flaw.NO_ANSWER),
    "a word like the mark": ("a mouse answer: small", 1, Flaw.NO_ANSWER),
    "only a mark of a text": ("a mouse Answer:: small", 1, Flaw.NO_ANSWER),
    "nothing at all": ("", 1, Flaw.NO_ANSWER),
    "an answer of blanks": ("a mouse\nAnswer:  \n", 1, Flaw.EMPTY),
    "no input": ("\nAnswer: small", 1, Flaw.EMPTY),
    "no second input": ("a mouse\nSecond text: \nAnswer: small", 2, Flaw.EMPTY),
    "a pair where there is none": ("a\nSecond text: b\nAnswer: c", 1, Flaw.WRONG_PARTS),
    "no pair where there is one": ("a\nAnswer: c", 2, Flaw.WRONG_PARTS),
    "two pairs": ("a\nSecond text: b\nSecond text: c\nAnswer: d", 2, Flaw.WRONG_PARTS),
    "parts in the wrong order": ("a\nAnswer: b\nSecond text: c", 2, Flaw.WRONG_PARTS),
}


@pytest.mark.parametrize("name", FLAWED)
def test_what_is_not_one_input_and_one_answer_is_refused(name: str) -> None:
    text, parts, flaw = FLAWED[name]
    assert parsed(text, parts) == flaw


def test_blanks_around_the_parts_are_not_theirs() -> None:
    # a tokenizer without line breaks puts blanks in their place
    assert parsed("  a mouse  Answer:  small ", 1) == Whole(("a mouse",), "small")


# Rows. Of word tokenizers: "Write an example of size:" is <unk> <unk> <unk> <unk> size :


@pytest.fixture
def ids(word_ids: dict[str, int]) -> Callable[[str], list[int]]:
    """The token ids of words written with blanks between them."""
    return lambda text: [word_ids[word] for word in text.split()]


@pytest.fixture
def encoding(word_tokenizer: Any, tmp_path: Path) -> Callable[..., Encoder]:
    """The encoder of a stream for a word tokenizer."""

    def make(stream: Stream, task_type: str, template: str = "$A") -> Encoder:
        tokenizer = word_tokenizer(template)
        encoded = encode_stream(stream, tokenizer, task_type, cache_dir=str(tmp_path / "cache"))
        return Encoder(stream, tokenizer, task_type, encoded.answers)

    return make


ASKED = "<unk> <unk> <unk> <unk> size :"


def rows_of(encoder: Encoder, limit: int = 64) -> dict[str, Any]:
    task = encoder.stream.tasks[0]
    return encode_whole(encoder, task, task.train.with_format("arrow")[:], limit).to_pydict()


def test_causal_row_is_request_and_example(
    two_tasks: Path, folder_stream: Any, encoding: Any, ids: Any
) -> None:
    stream = folder_stream(two_tasks, tasks=["size"])
    rows = rows_of(encoding(stream, "causal_lm", "<s> $A </s>"))

    asked = ids(f"<s> {ASKED}")
    assert rows["input_ids"] == [
        asked + ids(f"a {animal} Answer : {size} </s>")
        for animal, size in (("mouse", "small"), ("whale", "large"), ("wren", "small"))
    ]
    # all but the request is to be predicted
    assert rows["prompt_length"] == [len(asked)] * 3
    assert (rows["task_id"], rows["example_id"]) == ([0] * 3, [0, 1, 2])
    assert request("size") == "Write an example of size:"


def test_sequence_to_sequence_row_is_request_and_example(
    two_tasks: Path, folder_stream: Any, encoding: Any, ids: Any
) -> None:
    stream = folder_stream(two_tasks, tasks=["size"])
    rows = rows_of(encoding(stream, "seq2seq_lm", "$A </s>"))

    assert rows["input_ids"] == [ids(f"{ASKED} </s>")] * 3
    assert rows["labels"][1] == ids("a whale Answer : large </s>")


def test_generation_and_pairs(
    tmp_path: Path, write_task: Any, folder_stream: Any, encoding: Any, ids: Any
) -> None:
    pair = [("a mouse", "a bear", "small"), ("a bear", "a flea", "large")]
    one = [("a wren", "a bear", "small")]
    split = {"train": pair, "validation": one, "test": [("a flea", "a bear", "small")]}
    write_task(tmp_path / "p" / "size", split, names=("text", "text_pair", "label"))
    rows = rows_of(encoding(folder_stream(tmp_path / "p"), "causal_lm"))
    assert rows["input_ids"][0] == ids(f"{ASKED} a mouse <unk> <unk> : a bear Answer : small </s>")
    told = [("a mouse", "small red"), ("a bear", "big")]
    split = {"train": told, "validation": [("a wren", "old")], "test": [("a flea", "old")]}
    write_task(tmp_path / "g" / "size", split, names=("input", "output"))
    rows = rows_of(encoding(folder_stream(tmp_path / "g"), "causal_lm"))
    assert rows["input_ids"][0] == ids(f"{ASKED} a mouse Answer : small red </s>")


def test_inputs_are_cut_and_answers_are_not(
    tmp_path: Path, write_task: Any, folder_stream: Any, encoding: Any, ids: Any
) -> None:
    told = [("a big old mouse", "small"), ("a bear", "red green yellow ripe big old")]
    split = {"train": told, "validation": [("a wren", "old")], "test": [("a flea", "old")]}
    write_task(tmp_path / "size", split, names=("input", "output"))
    encoder = encoding(folder_stream(tmp_path), "causal_lm")
    # 6 of the request, 2 of "Answer :", the answer's and the end
    rows = rows_of(encoder, limit=6 + 2 + 1 + 1 + 2)
    assert rows["input_ids"] == [ids(f"{ASKED} a big Answer : small </s>")]
    # the other's six words of answer leave no room for anything
    assert rows["example_id"] == [0]
    longer = rows_of(encoder, limit=6 + 2 + 6 + 1)["input_ids"]
    assert longer[1] == ids(f"{ASKED} Answer : red green yellow ripe big old </s>")
    # a decoder has its limit for itself
    alone = rows_of(encoding(folder_stream(tmp_path), "seq2seq_lm"), limit=2 + 1 + 1 + 2)
    assert alone["labels"] == [ids("a big Answer : small </s>")]


def test_many_rows_are_encoded_in_portions(
    two_tasks: Path, folder_stream: Any, encoding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoding(folder_stream(two_tasks, tasks=["size"]), "causal_lm")
    at_once = rows_of(encoder)
    monkeypatch.setattr(whole, "ROWS_AT_ONCE", 2)
    assert rows_of(encoder) == at_once
    task = encoder.stream.tasks[0]
    none = task.train.with_format("arrow")[:].slice(0, 0)
    assert encode_whole(encoder, task, none, 64).num_rows == 0


def byte_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(["Write an example of size:", "a mouse\nAnswer: small"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces that begin with a mark for the blank before a word, and no line breaks, as T5's."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    core.decoder = decoders.Metaspace()
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzASW:."))
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=letters,
    )  # fmt: skip
    core.train_from_iterator(["Write an example of size: a mouse Answer: small"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
@pytest.mark.parametrize("task_type", ["causal_lm", "seq2seq_lm"])
def test_tokens_of_an_example_are_read_as_the_example(
    tmp_path: Path, write_task: Any, folder_stream: Any, make: Any, task_type: str
) -> None:
    told = [("a mouse: is it Answer: or Second text: that", "small one."), ("a. b", "c")]
    split = {"train": told, "validation": [("a wren", "old")], "test": [("a flea", "old")]}
    write_task(tmp_path / "size", split, names=("input", "output"))
    tokenizer = make()
    encoder = Encoder(folder_stream(tmp_path), tokenizer, task_type, ())
    rows = rows_of(encoder, limit=200)

    for row, (text, answer) in enumerate(told):
        if task_type == "causal_lm":
            ids = rows["input_ids"][row][rows["prompt_length"][row] :]
        else:
            ids = rows["labels"][row]
        assert ids[-1] == tokenizer.eos_token_id
        assert parsed(tokenizer.decode(ids[:-1]), 1) == Whole((text,), answer)
