"""Texts and their answers as token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clpeft.config import ConfigError
from clpeft.streams.base import Stream, Task
from clpeft.streams.prompts import ANSWER, classifier_prefix

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

# Rows handed to the tokenizer at a time: enough for its threads, little enough for memory.
ROWS_AT_ONCE = 4096


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """The tokens of answers as they follow a prompt, without the end-of-sequence token.

    They are what the tokenizer makes of `" answer"` after the prompt's last word. That differs
    from `" answer"` alone where a tokenizer puts a blank before every text (SentencePiece): there
    the answer alone would begin with two.

    Args:
        tokenizer: The model's.
        answers: The answers' words.

    Returns:
        Token ids, one list per answer.
    """
    if not answers:
        return []

    def tokens(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    (prompt,) = tokens([ANSWER])
    following = tokens([f"{ANSWER} {text}" for text in answers])
    found = [ids[len(prompt) :] for ids in following]
    # where the prompt's end and the answer's beginning make one token
    joined = [i for i, ids in enumerate(following) if ids[: len(prompt)] != prompt]
    if joined:
        for row, ids in zip(joined, tokens([f" {answers[i]}" for i in joined]), strict=True):
            found[row] = ids
    return found


def label_answers(
    stream: Stream, tokenizer: PreTrainedTokenizerBase, task_type: str
) -> tuple[tuple[int, ...], ...]:
    """The answer tokens of every global label, each task's all different.

    Args:
        stream: Whose labels.
        tokenizer: The model's.
        task_type: sequence_classification, causal_lm or seq2seq_lm.

    Raises:
        ConfigError: If two answers of a task are the same tokens, or the model's type cannot do a
            task.
    """
    if task_type == "sequence_classification":
        for task in stream.tasks:
            if not task.labels:
                raise ConfigError(
                    f"The task '{task.name}' of '{stream.name}' has answers to be written, not "
                    "labels, so a model with model.task_type=sequence_classification cannot do "
                    "it; choose a causal_lm or seq2seq_lm model."
                )
        return tuple(() for _ in stream.label_names)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "The model's tokenizer has no end-of-sequence token, so no answer could ever end; "
            "choose another model or add eos_token to its tokenizer."
        )
    words = stream.answer_words
    answers = answer_tokens(tokenizer, words)
    for task in stream.tasks:
        known: dict[tuple[int, ...], str] = {}
        for label in stream.global_labels(task.index):
            tokens = tuple(answers[label])
            if not tokens:
                raise ConfigError(
                    f"The model's tokenizer makes nothing of the answer {words[label]!r} of task "
                    f"'{task.name}'; choose another answer word or another model."
                )
            if tokens in known:
                raise ConfigError(
                    f"The model's tokenizer cannot tell the answers '{known[tokens]}' and "
                    f"'{words[label]}' of task '{task.name}' apart; choose other answer words or "
                    "another model."
                )
            known[tokens] = words[label]
    return tuple((*tokens, tokenizer.eos_token_id) for tokens in answers)


@dataclass(frozen=True)
class _Rows:
    """What encoding needs of a split."""

    texts: list[list[str]]  # per row: text[, text_pair]
    answers: list[list[int]]  # tokens of the answer, end included
    reserved: list[int]  # tokens kept free for the answer


class Encoder:
    """Encodes examples of one stream for one tokenizer and type of model.

    Args:
        stream: Whose prompts and length they get.
        tokenizer: The model's.
        task_type: sequence_classification, causal_lm or seq2seq_lm.
        answers: The token ids of each global label's answer, as `EncodedStream` has them.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: PreTrainedTokenizerBase,
        task_type: str,
        answers: tuple[tuple[int, ...], ...],
    ) -> None:
        self.stream = stream
        self.tokenizer = tokenizer
        self.task_type = task_type
        self.answers = answers
        self.max_length = stream.config.max_length
        self.opening = _opening_tokens(tokenizer) if task_type == "causal_lm" else []

    def encode(self, task: Task, rows: pyarrow.Table, where: str = "train") -> pyarrow.Table:
        """Examples of a task as a table of the columns that batches are made of.

        Args:
            task: Whose they are.
            rows: With the columns that a classification or generation task's splits have.
            where: What messages call them.

        Raises:
            ConfigError: If a prompt without its input does not fit into `stream.max_length`.
        """
        import pyarrow

        count = len(rows)
        if task.labels:
            ids = self.stream.global_labels(task.index)
            labels = np.asarray(ids, dtype=np.int64)[rows["label"].to_numpy()]
        else:
            labels = np.full(count, -1, dtype=np.int64)
        parts = [
            self._portion(task, where, rows.slice(start, ROWS_AT_ONCE), labels[start:])
            for start in range(0, count, ROWS_AT_ONCE)
        ]
        columns = {
            name: pyarrow.array([row for part in parts for row in part[name]], _arrow_type(name))
            for name in parts[0]
        }
        columns["label"] = pyarrow.array(labels)
        columns["task_id"] = pyarrow.array(np.full(count, task.index, dtype=np.int64))
        columns["example_id"] = pyarrow.array(rows["example_id"].to_numpy())
        return pyarrow.table(columns)

    def _portion(
        self, task: Task, where: str, table: pyarrow.Table, labels: np.ndarray
    ) -> dict[str, list[Any]]:
        texts = input_texts(task, table)
        if self.task_type == "sequence_classification":
            return self._classifier(task, texts)
        if task.labels:
            answers = [list(self.answers[label]) for label in labels[: len(table)]]
            # room for the longest answer of all, so that what is cut from an input tells nothing
            # about which answer is the right one
            reserved = [max(map(len, self.answers))] * len(table)
        else:
            written = answer_tokens(self.tokenizer, table["output"].to_pylist())
            answers = [[*tokens, self.tokenizer.eos_token_id] for tokens in written]
            reserved = [len(answer) for answer in answers]
        prompts = self._prompts(task, where, _Rows(texts, answers, reserved))
        if self.task_type == "seq2seq_lm":
            return {"input_ids": prompts, "labels": answers}
        return {
            "input_ids": [p + answer for p, answer in zip(prompts, answers, strict=True)],
            "prompt_length": [len(prompt) for prompt in prompts],
        }

    def bare(self, task: Task) -> list[int]:
        """The tokens of a task's input without its texts: what all its inputs have in common."""
        if self.task_type != "sequence_classification":
            return self.prompt_tokens([self.stream.prompt(task).fill("", "")])[0]
        parts = 2 if task.has_pairs else 1
        return self._classifier(task, [[""] * parts])["input_ids"][0]

    def _classifier(self, task: Task, texts: list[list[str]]) -> dict[str, list[Any]]:
        prefix = classifier_prefix(task.name if self.stream.config.names_task else None)
        pairs = [row[1] for row in texts] if len(texts[0]) == 2 else None
        encoded = self.tokenizer(
            [prefix + row[0] for row in texts],
            pairs,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
        )
        names = ["input_ids"]
        if "token_type_ids" in self.tokenizer.model_input_names:
            names.append("token_type_ids")
        return {name: encoded[name] for name in names}

    def _prompts(self, task: Task, where: str, rows: _Rows) -> list[list[int]]:
        """The prompts' tokens, inputs cut where prompt and answer would not fit."""
        form = self.stream.prompt(task)
        room = [self.max_length - reserved for reserved in rows.reserved]
        prompts = self.fitted(
            rows.texts,
            lambda _, texts: self.prompt_tokens([form.fill(*row) for row in texts]),
            room,
        )
        for row, prompt in enumerate(prompts):
            if len(prompt) > room[row]:
                raise self._does_not_fit(task, where, len(prompt), rows.reserved[row], row)
        return prompts

    def fitted(
        self,
        texts: Sequence[Sequence[str]],
        tokens: Callable[[Sequence[int], Sequence[Sequence[str]]], list[list[int]]],
        room: Sequence[int],
    ) -> list[list[int]]:
        """The tokens of rows of texts, which are cut at their ends where there is no room.

        Args:
            texts: Per row its text and, where there is one, its pair.
            tokens: Makes the tokens of some rows, given which rows they are and their texts.
            room: Per row how many tokens there may be.

        Returns:
            The tokens of each row; more than there is room for only where they are too many even
            without its texts.
        """
        left = [list(row) for row in texts]
        found = tokens(range(len(left)), left)

        def too_long(rows: Iterable[int]) -> list[int]:
            return [row for row in rows if len(found[row]) > room[row] and any(left[row])]

        long = too_long(range(len(left)))
        while long:
            excess = [len(found[row]) - room[row] for row in long]
            shorter = self._cut([left[row] for row in long], excess)
            for row, cut in zip(long, shorter, strict=True):
                left[row] = cut
            for row, ids in zip(long, tokens(long, [left[row] for row in long]), strict=True):
                found[row] = ids
            # what follows a cut may be tokenized into more pieces than before it: look again
            long = too_long(long)
        return found

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of prompts as the model reads them, begin-of-sequence and the like included.

        A causal model's have no end, because the answer follows.
        """
        if self.task_type == "seq2seq_lm":
            return list(self.tokenizer(list(prompts), verbose=False)["input_ids"])
        plain = self.tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self.opening + ids for ids in plain]

    def _cut(self, rows: list[list[str]], excess: list[int]) -> list[list[str]]:
        """The rows' texts, each row shorter by some tokens, taken from the end of the longest."""
        flat = [text for row in rows for text in row]
        all_starts = iter(_token_starts(self.tokenizer, flat))
        shorter = []
        for row, surplus in zip(rows, excess, strict=True):
            starts = [next(all_starts) for _ in row]
            keep = _shares([len(text_starts) for text_starts in starts], surplus)
            cut = [
                # one character may be several tokens with one start: it goes as a whole
                text[: min(text_starts[kept], len(text) - 1)] if kept < len(text_starts) else text
                for text, text_starts, kept in zip(row, starts, keep, strict=True)
            ]
            # texts without tokens (blanks) that nevertheless make the prompt longer
            shorter.append(cut if cut != row else [""] * len(row))
        return shorter

    def _does_not_fit(
        self, task: Task, where: str, fixed: int, answer: int, row: int
    ) -> ConfigError:
        return ConfigError(
            f"The prompt of task '{task.name}' takes {fixed} tokens without its input and the "
            f"answer {answer} ({where} row {row}), which is more than "
            f"stream.max_length={self.max_length}; set it to more than {fixed + answer}."
        )


def input_texts(task: Task, rows: pyarrow.Table) -> list[list[str]]:
    """Per row of a task's table its text and, where the task has pairs, its pair."""
    first = rows["text" if task.labels else "input"].to_pylist()
    if "text_pair" not in rows.column_names:
        return [[text] for text in first]
    return [[text, pair] for text, pair in zip(first, rows["text_pair"].to_pylist(), strict=True)]


def _shares(lengths: list[int], surplus: int) -> list[int]:
    """How many tokens each text keeps when `surplus` are taken from whichever is the longest."""
    keep = list(lengths)
    if len(keep) == 1:
        return [max(0, keep[0] - surplus)]
    longer = 0 if keep[0] >= keep[1] else 1
    ahead = min(surplus, abs(keep[0] - keep[1]))
    keep[longer] -= ahead
    rest = surplus - ahead
    keep[longer] -= (rest + 1) // 2
    keep[1 - longer] -= rest // 2
    return [max(0, kept) for kept in keep]


def _token_starts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Where each token of each text begins, in characters."""
    if tokenizer.is_fast:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [[start for start, _ in offsets] for offsets in encoded["offset_mapping"]]
    # a tokenizer written in Python tells no offsets: share the characters out evenly
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    counts = [len(ids) for ids in encoded["input_ids"]]
    return [
        [len(text) * token // count for token in range(count)]
        for text, count in zip(texts, counts, strict=True)
    ]


def _opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as a begin-of-sequence."""
    plain = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    full = tokenizer(ANSWER)["input_ids"]
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def _arrow_type(name: str) -> pyarrow.DataType:
    import pyarrow

    return pyarrow.int32() if name == "prompt_length" else pyarrow.list_(pyarrow.int32())
