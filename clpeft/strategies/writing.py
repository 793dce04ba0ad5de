"""Writing: a language model writes examples of a task that it has learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from clpeft.models.sampling import sample
from clpeft.streams.contents import content_digests
from clpeft.streams.tokenize import answer_tokens
from clpeft.streams.whole import Flaw, Whole, parsed, request

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

    from clpeft.streams.base import Task
    from clpeft.streams.encoded import EncodedTask
    from clpeft.streams.tokenize import Encoder
    from clpeft.training.run import Run

SURPLUS = "surplus"  # good, and more than was wanted


class WritingSettings(Protocol):
    """How a model writes."""

    top_k: int
    temperature: float
    batch_size: int
    max_attempts: int
    max_new_tokens: int | None


@dataclass
class Draft:
    """What a model wrote when it was asked for an example.

    Args:
        example_id: Less than 0, and no other draft's of a run.
        text: Word for word.
        example: What was read from it; None where it is no example.
        why: Why it is not kept; None where it is.
        is_copy: Whether its input is that of one of the task's training examples.
    """

    example_id: int
    text: str
    example: Whole | None = None
    why: str | None = None
    is_copy: bool = False


def num_texts(task: Task) -> int:
    """How many texts an input of a task has: 1, or 2 where it is a pair."""
    return 2 if "text_pair" in task.train.column_names else 1


def tabulated(task: Task, drafts: Sequence[Draft]) -> pyarrow.Table:
    """Examples in the columns that their task's splits have.

    Args:
        task: Whose they are.
        drafts: Each with an example; of a classification, answered by one of its answer words.
    """
    import pyarrow as pa

    examples = [draft.example for draft in drafts if draft.example is not None]
    assert len(examples) == len(drafts)
    names = ["text", "text_pair"] if task.labels else ["input"]
    columns = {
        names[part]: pa.array([example.texts[part] for example in examples], pa.string())
        for part in range(num_texts(task))
    }
    if task.labels:
        labels = [task.answer_words.index(example.answer) for example in examples]
        columns["label"] = pa.array(labels, pa.int64())
    else:
        columns["output"] = pa.array([example.answer for example in examples], pa.string())
    columns["example_id"] = pa.array([draft.example_id for draft in drafts], pa.int64())
    return pa.table(columns)


class Writer:
    """Has a run's model write examples of tasks, and keeps those that are good.

    Several processes share the writing, and all of them get the same: from the same weights what
    one process alone would write.

    Args:
        run: Whose model writes.
        encoder: Of the run's stream.
        settings: How it writes.
        limit: Tokens at most, of what is asked and written together.
        source: The strategy that wants the examples.
    """

    def __init__(
        self, run: Run, encoder: Encoder, settings: WritingSettings, limit: int, source: str
    ) -> None:
        self.run = run
        self.encoder = encoder
        self.settings = settings
        self.limit = limit
        self.source = source
        self._special = {*run.tokenizer.all_special_ids} - {run.tokenizer.unk_token_id}

    def write(self, task: EncodedTask, wanted: int, first_id: int, purpose: str) -> list[Draft]:
        """Writes in rounds until there are enough examples, or no attempt is left.

        Args:
            task: Whose examples.
            wanted: How many.
            first_id: The first draft's example id; those of the others count down from it.
            purpose: What they are for; for another purpose other numbers are drawn.

        Returns:
            All that was written; at most `wanted` of it is kept.
        """
        drafts: list[Draft] = []
        for attempt in range(self.settings.max_attempts):
            kept = [draft for draft in drafts if draft.why is None]
            missing = wanted - len(kept)
            if not missing:
                break
            asked = self.encoder.prompt_tokens([request(task.name)])[0]
            rows = self._sampled(asked, missing, f"{purpose}/{attempt}")
            first = first_id - len(drafts)
            fresh = [self._draft(task.task, row, first - i) for i, row in enumerate(rows)]
            self._judge(task, [draft for draft in fresh if draft.example], kept, missing)
            drafts += fresh
        self._compare(task.task, [draft for draft in drafts if draft.example])
        return drafts

    def _sampled(self, asked: list[int], missing: int, purpose: str) -> list[list[int]]:
        """Whole batches of token ids, at least as many rows as are missing."""
        run, settings = self.run, self.settings
        room = self.limit - (len(asked) if self.encoder.task_type == "causal_lm" else 0)
        batches = math.ceil(missing / settings.batch_size)
        mine: dict[int, list[list[int]]] = {}
        with run.eval_mode(), run.accelerator.autocast():
            for batch in range(run.rank, batches, run.world_size):
                mine[batch] = sample(
                    run.model,
                    run.tokenizer,
                    asked,
                    settings.batch_size,
                    max_new_tokens=min(room, settings.max_new_tokens or room),
                    top_k=settings.top_k,
                    temperature=settings.temperature,
                    seed=run.generator_for(f"{purpose}/{batch}").initial_seed(),
                )
        everywhere = {batch: rows for part in run.gathered(mine) for batch, rows in part.items()}
        return [row for batch in range(batches) for row in everywhere[batch]]

    def _draft(self, task: Task, ids: list[int], example_id: int) -> Draft:
        """What was written, read as an example of a task."""
        tokenizer = self.run.tokenizer
        finished = ids[-1] == tokenizer.eos_token_id
        body = ids[:-1] if finished else ids
        text = tokenizer.decode(body, clean_up_tokenization_spaces=False).strip()
        if not finished:
            return Draft(example_id, text, why=Flaw.UNFINISHED)
        if self._special & {*body}:
            return Draft(example_id, text, why=Flaw.SPECIAL_TOKEN)
        found = parsed(text, num_texts(task))
        if isinstance(found, Flaw):
            return Draft(example_id, text, why=found)
        flaw = self._unfit(task, found.answer)
        return Draft(example_id, text, found) if flaw is None else Draft(example_id, text, why=flaw)

    def _unfit(self, task: Task, answer: str) -> Flaw | None:
        """Why an answer is none to this task."""
        if task.labels:
            return None if answer in task.answer_words else Flaw.UNKNOWN_ANSWER
        (tokens,) = answer_tokens(self.run.tokenizer, [answer])
        needed = len(self.encoder.bare(task)) + len(tokens) + 1
        return None if needed <= self.encoder.max_length else Flaw.TOO_LONG

    def _judge(
        self, task: EncodedTask, fresh: Sequence[Draft], kept: Sequence[Draft], missing: int
    ) -> None:
        """Notes which of some examples are not kept, and why."""
        if not fresh:
            return
        beside = self.encoded(task.task, kept) if kept else None
        against = self.run.objections(task, self.encoded(task.task, fresh), self.source, beside)
        for row, draft in enumerate(fresh):
            draft.why = against.get(row)
        for draft in [draft for draft in fresh if draft.why is None][missing:]:
            draft.why = SURPLUS

    def _compare(self, task: Task, drafts: Sequence[Draft]) -> None:
        """Notes which examples are copies of training examples."""
        known = {*content_digests(task.train.with_format("arrow")[:])}
        for draft, digest in zip(drafts, content_digests(tabulated(task, drafts)), strict=True):
            draft.is_copy = digest in known

    def encoded(self, task: Task, drafts: Sequence[Draft]) -> Dataset:
        """Examples as the stream's own are encoded; at least one."""
        from datasets import Dataset

        return Dataset(self.encoder.encode(task, tabulated(task, drafts)))
