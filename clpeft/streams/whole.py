"""Whole examples, input and answer, as a language model writes them; and how they are read again.

A model is asked for an example of a task in words that name the task, and writes

    <text>
    Second text: <its pair, where the task has pairs>
    Answer: <answer>

with the end-of-sequence token after it. The request is made of ordinary words, so that no embedding
of a new token has to be trained, which an adapter would leave frozen. What stands before a text is
told from the same words inside it: there they are written with one colon more.

Source: Sun et al. 2020, LAMOL (section 3; there with special tokens, all of the model being
    trained); Qin & Joty 2022, LFPT5 (with prompts that are trained, beside a frozen model).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from clpeft.streams.prompts import ANSWER
from clpeft.streams.tokenize import ROWS_AT_ONCE, answer_tokens, input_texts

if TYPE_CHECKING:
    import pyarrow

    from clpeft.streams.base import Task
    from clpeft.streams.tokenize import Encoder

SECOND = "Second text:"
# the words that stand before a part, and not those of a text, which have a colon more
_MARK = re.compile(rf"({SECOND}|{ANSWER})(?!:)")


class Flaw(StrEnum):
    """Why what a model wrote is not one example."""

    UNFINISHED = "unfinished"  # no end of sequence
    SPECIAL_TOKEN = "special_token"  # such as padding, in the middle
    NO_ANSWER = "no_answer"
    SEVERAL_ANSWERS = "several_answers"
    WRONG_PARTS = "wrong_parts"  # a second text where there is to be none, or the other way round
    EMPTY = "empty"  # an input or an answer without a word
    UNKNOWN_ANSWER = "unknown_answer"  # none of the task's answer words
    TOO_LONG = "too_long"  # the answer leaves no room for the task's prompt


@dataclass(frozen=True)
class Whole:
    """An example as it was written.

    Args:
        texts: Its text and, where the task has pairs, its pair.
        answer: Its answer.
    """

    texts: tuple[str, ...]
    answer: str


def request(task_name: str) -> str:
    """What asks a language model for an example of a task; one blank and the example follow."""
    return f"Write an example of {task_name}:"


def written(texts: Sequence[str], answer: str) -> str:
    """An example as a model is to write it.

    Args:
        texts: Its text and, where the task has pairs, its pair.
        answer: Its answer.
    """
    marks = ("", f"\n{SECOND} ")[: len(texts)]
    parts = [mark + _escaped(text) for mark, text in zip(marks, texts, strict=True)]
    return f"{''.join(parts)}\n{ANSWER} {_escaped(answer)}"


def parsed(text: str, parts: int) -> Whole | Flaw:
    """Reads what a model wrote, up to its end of sequence.

    Args:
        text: What it wrote.
        parts: How many texts an input of the task has, 1 or 2.

    Returns:
        The example, or why it is none: only what has exactly one input and one answer is one.
    """
    first, *others = _MARK.split(text)
    marks, pieces = others[::2], [first, *others[1::2]]
    if ANSWER not in marks:
        return Flaw.NO_ANSWER
    if marks.count(ANSWER) > 1:
        return Flaw.SEVERAL_ANSWERS
    if marks != [SECOND, ANSWER][-parts:]:
        return Flaw.WRONG_PARTS
    *texts, answer = [_unescaped(piece).strip() for piece in pieces]
    if not answer or not all(texts):
        return Flaw.EMPTY
    return Whole(tuple(texts), answer)


def _escaped(text: str) -> str:
    return re.sub(rf"({SECOND}|{ANSWER})", r"\1:", text)


def _unescaped(text: str) -> str:
    return re.sub(rf"({SECOND}|{ANSWER}):", r"\1", text)


def encode_whole(encoder: Encoder, task: Task, rows: pyarrow.Table, limit: int) -> pyarrow.Table:
    """Examples of a task as rows in which a language model is asked for them and writes them.

    Args:
        encoder: Of the stream, for a causal or a sequence to sequence model.
        task: Whose examples they are.
        rows: With the columns that a classification or generation task's splits have.
        limit: Tokens at most, of request and example together for a causal model, of each for a
            sequence to sequence one; inputs are cut to it.

    Returns:
        The columns that batches are made of. Rows that do not fit even without their inputs are
        left out.
    """
    import pyarrow

    starts = range(0, max(len(rows), 1), ROWS_AT_ONCE)
    return pyarrow.concat_tables(
        [_portion(encoder, task, rows.slice(start, ROWS_AT_ONCE), limit) for start in starts]
    )


def _portion(encoder: Encoder, task: Task, rows: pyarrow.Table, limit: int) -> pyarrow.Table:
    import pyarrow

    tokenizer = encoder.tokenizer
    texts = input_texts(task, rows)
    if task.labels:
        answers = [task.answer_words[label] for label in rows["label"].to_pylist()]
    else:
        answers = rows["output"].to_pylist()
    (asked,) = encoder.prompt_tokens([request(task.name)])
    causal = encoder.task_type == "causal_lm"
    room = limit - 1 - (len(asked) if causal else 0)  # one for the end

    def tokens(which: Sequence[int], inputs: Sequence[Sequence[str]]) -> list[list[int]]:
        return answer_tokens(
            tokenizer,
            [written(own, answers[row]) for row, own in zip(which, inputs, strict=True)],
        )

    found = encoder.fitted(texts, tokens, [room] * len(texts))
    kept = [row for row, ids in enumerate(found) if len(ids) <= room]
    ends = [[*found[row], tokenizer.eos_token_id] for row in kept]
    lists = pyarrow.list_(pyarrow.int32())
    if causal:
        columns = {
            "input_ids": pyarrow.array([asked + ids for ids in ends], lists),
            "prompt_length": pyarrow.array([len(asked)] * len(ends), pyarrow.int32()),
        }
    else:
        columns = {
            "input_ids": pyarrow.array([asked] * len(ends), lists),
            "labels": pyarrow.array(ends, lists),
        }
    columns["label"] = pyarrow.array([-1] * len(ends), pyarrow.int64())
    columns["task_id"] = pyarrow.array([task.index] * len(ends), pyarrow.int64())
    columns["example_id"] = rows["example_id"].take(pyarrow.array(kept, pyarrow.int64()))
    return pyarrow.table(columns)
