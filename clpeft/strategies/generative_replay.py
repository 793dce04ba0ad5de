"""Generative replay: before each task the model itself writes examples of the earlier ones."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from clpeft.config import Config, ConfigError, above, at_least
from clpeft.models.load import positions
from clpeft.models.own import require
from clpeft.registry import STRATEGIES
from clpeft.strategies.arrow import from_bytes, to_bytes
from clpeft.strategies.base import Evidence, Strategy, StrategyConfig
from clpeft.strategies.writing import Draft, Writer, tabulated
from clpeft.streams.batch import Batch, concatenate, set_aside
from clpeft.streams.batching import Columns
from clpeft.streams.tokenize import Encoder
from clpeft.streams.whole import encode_whole, request

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from torch import Tensor

    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run

log = logging.getLogger(__name__)


@dataclass
class GenerativeReplayConfig(StrategyConfig):
    """Settings of generative replay."""

    replay_ratio: float = above(0)  # generated examples per example of the task being trained
    lambda_: float = above(0)  # weight of the language-model term
    top_k: int = at_least(1)  # from how many of the likeliest tokens each is drawn
    temperature: float = above(0)  # of the draws
    batch_size: int = at_least(1)  # examples written side by side
    max_attempts: int = at_least(1)  # rounds of writing per earlier task, until there are enough
    # where an example that does not end is given up; null: at stream.max_length
    max_new_tokens: int | None = at_least(1, default=None)


def split_evenly(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """A number as the sum of so many that differ by 1 at most; which are larger is drawn by lot."""
    lots = torch.randperm(parts, generator=generator).tolist()
    return [total // parts + (lot < total % parts) for lot in lots]


@STRATEGIES.register("generative_replay", config=GenerativeReplayConfig)
class GenerativeReplay(Strategy):
    """L = L_task + λ L_LM over the task's examples and generated ones of all earlier tasks.

    L_LM is the mean negative log-likelihood of whole examples, input and answer, given words that
    ask for one of their task: with it the model learns to write them. Before task t it is asked
    for `replay_ratio`·|D_t| examples, shared equally by the earlier tasks (what does not divide by
    lot); each token is drawn from the `top_k` likeliest. What does not parse into exactly one input
    and one answer is dropped, and so is what another strategy objects to (quality_control). The
    rest is trained on as real examples of its task are, and L_LM is taken over it too. Nothing of
    an earlier task is kept but its name, its prompt and its answer words. What the model wrote,
    with what became of it, is left in `generated/<t>_<task>.jsonl` of the run's directory.

    Constants in LAMOL: λ = 0.25, top-k 20, a ratio of 0.2.

    Source: Shin et al. 2017, Continual Learning with Deep Generative Replay; Sun et al. 2020,
        LAMOL: LAnguage MOdeling for Lifelong Language Learning (section 3).
    """

    config: GenerativeReplayConfig
    evidence: ClassVar = {"generative_replay/examples": Evidence.TERM}
    task_types = frozenset({"causal_lm", "seq2seq_lm"})
    supports_multi_process = True
    rehearses = True
    name = "generative_replay"
    term = "lm"

    def check(self, config: Config) -> None:
        require(config, "generate", f"strategy={self.name}")

    def setup(self, run: Run) -> None:
        stream = run.stream
        self._encoder = Encoder(stream.stream, run.tokenizer, stream.task_type, stream.answers)
        self._limit = int(min(self._encoder.max_length, positions(run.model)))
        self._task = 0  # the last one that examples were generated for; the first needs none
        self._generated: dict[int, pyarrow.Table] = {}  # what it is trained on, by their task
        self._ever = 0  # drafts so far, over all tasks; they give the examples their ids
        self._facts: dict[str, int] = {}
        for task in stream.tasks:
            self._check_room(task)

    def _check_room(self, task: EncodedTask) -> None:
        """Refuses a length that the request alone takes up."""
        (asked,) = self._encoder.prompt_tokens([request(task.name)])
        if self._encoder.task_type == "causal_lm" and len(asked) >= self._limit:
            raise ConfigError(
                f"{self.name} asks for examples of task '{task.name}' in {len(asked)} tokens, "
                f"which leaves no room for one within {self._limit}; set stream.max_length higher, "
                f"or take a model that reads more."
            )

    def train_examples(self, run: Run, task: EncodedTask, examples: Dataset) -> Dataset:
        from datasets import Dataset, concatenate_datasets

        if task.index > self._task:
            self._generate(run, task)
        replayed = [
            Dataset(self._encoder.encode(run.stream.tasks[index].task, rows))
            for index, rows in self._generated.items()
        ]
        self._ask_for_examples(run, task)
        return concatenate_datasets([examples, *replayed]) if replayed else examples

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Adds the rows in which the model is to write the batch's examples whole."""
        found = [self._rows[pair] for pair in batch.identities if pair in self._rows]
        whole = run.batch(self._whole, np.array(found, dtype=np.int64))
        aside = set_aside(whole, self.term)
        # they are no further examples, only another side of the same
        aside.counted(0, aside.target_width, 0)
        return concatenate([batch, aside], run.collator.pad_token_id)

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        total = run.per_example_loss(batch, outputs, self.term).sum()
        return {self.term: self.config.lambda_ * run.per_target(total, self.term)}

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes none; logs how many generated examples are trained on, so that none shows."""
        return {f"{self.name}/examples": sum(map(len, self._generated.values()))}

    def after_task(self, run: Run, task: EncodedTask) -> None:
        self._generated = {}

    def facts(self) -> Mapping[str, float]:
        return self._facts

    def state_dict(self) -> dict[str, Any]:
        if not self._task:
            return {}
        return {
            "task": self._task,
            "generated": {str(index): to_bytes(rows) for index, rows in self._generated.items()},
            "ever": self._ever,
            "facts": dict(self._facts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self._task = state["task"]
        self._generated = {int(i): from_bytes(rows) for i, rows in state["generated"].items()}
        self._ever = state["ever"]
        self._facts = dict(state["facts"])

    def _ask_for_examples(self, run: Run, task: EncodedTask) -> None:
        """Encodes all that is trained on as rows in which the model writes it."""
        import pyarrow as pa
        from datasets import Dataset

        given = {task.index: task.task.train.with_format("arrow")[:]} | self._generated
        tables = [
            encode_whole(self._encoder, run.stream.tasks[index].task, rows, self._limit)
            for index, rows in given.items()
        ]
        self._whole = Columns(Dataset(pa.concat_tables(tables)))
        tasks, ids = (self._whole.numbers[name].tolist() for name in ("task_id", "example_id"))
        self._rows = {pair: row for row, pair in enumerate(zip(tasks, ids, strict=True))}
        lost = sum(map(len, given.values())) - len(self._rows)
        if lost:
            log.warning(
                "%s: %d examples that task '%s' is trained on do not fit into %d tokens even "
                "without their inputs, so that the model does not learn to write them",
                *(self.name, lost, task.name, self._limit),
            )

    def _generate(self, run: Run, task: EncodedTask) -> None:
        """Has the model write what a task is trained on beside its own examples."""
        writer = Writer(run, self._encoder, self.config, self._limit, self.name)
        earlier = run.stream.tasks[: task.index]
        total = round(self.config.replay_ratio * len(task.train))
        if total < len(earlier):
            log.warning(
                "%s: replay_ratio=%g asks for %d examples before '%s', fewer than the %d earlier "
                "tasks, so that some of those are not replayed; raise it",
                *(self.name, self.config.replay_ratio, total, task.name, len(earlier)),
            )
        wanted = split_evenly(total, len(earlier), run.generator_for(f"{self.name}/{task.index}"))
        drafts: dict[str, list[Draft]] = {}
        self._task, self._generated = task.index, {}
        for other, number in zip(earlier, wanted, strict=True):
            purpose = f"{self.name}/{task.index}/{other.index}"
            found = writer.write(other, number, -1 - self._ever, purpose)
            self._ever += len(found)
            drafts[other.name] = found
            good = [draft for draft in found if draft.why is None]
            if good:
                self._generated[other.index] = tabulated(other.task, good)
            self._tell(task, other, number, found)
        self._facts = summary([draft for found in drafts.values() for draft in found], total)
        if total and not self._facts["kept"]:
            log.warning(
                "%s: not one usable example of the tasks before '%s' was written, so that it is "
                "trained without them",
                *(self.name, task.name),
            )
        if run.accelerator.is_main_process:
            leave_behind(Path(run.directory), task, drafts)

    def _tell(
        self, task: EncodedTask, earlier: EncodedTask, wanted: int, drafts: Sequence[Draft]
    ) -> None:
        """Logs what became of the drafts of one earlier task."""
        found = summary(drafts, wanted)
        level = logging.INFO if found["kept"] == wanted else logging.WARNING
        counts = ", ".join(f"{count} {what}" for what, count in found.items())
        log.log(level, "%s: '%s' for '%s': %s", self.name, earlier.name, task.name, counts)


def summary(drafts: Sequence[Draft], wanted: int) -> dict[str, int]:
    """How many examples were wanted, written, kept and copied, and of the rest how many for why."""
    reasons = Counter(str(draft.why) for draft in drafts if draft.why is not None)
    kept = [draft for draft in drafts if draft.why is None]
    return {
        "wanted": wanted,
        "written": len(drafts),
        "kept": len(kept),
        "copies": sum(draft.is_copy for draft in kept),
        **dict(sorted(reasons.items())),
    }


def leave_behind(directory: Path, task: EncodedTask, drafts: Mapping[str, list[Draft]]) -> None:
    """Writes `generated/<k>_<task>.jsonl`, a line for each draft.

    Args:
        directory: The run's.
        task: The task that is about to be trained.
        drafts: What was written, by the earlier task's name.
    """
    folder = directory / "generated"
    folder.mkdir(exist_ok=True)
    with (folder / f"{task.index + 1}_{task.name}.jsonl").open("w", encoding="utf-8") as file:
        for name, found in drafts.items():
            for draft in found:
                line = {
                    "task": name,
                    "text": draft.text,
                    "inputs": None if draft.example is None else draft.example.texts,
                    "answer": None if draft.example is None else draft.example.answer,
                    "why": draft.why,
                    "is_copy": draft.is_copy,
                }
                file.write(f"{json.dumps(line, ensure_ascii=False)}\n")
