"""What all strategies with a memory have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from clpeft.config import above, at_least, one_of
from clpeft.strategies.base import Strategy, StrategyConfig
from clpeft.strategies.memory import BUDGETS, SELECTIONS, Memory

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@dataclass
class RehearsalConfig(StrategyConfig):
    """Settings of a memory."""

    memory_size: int = at_least(1)  # examples kept
    selection: str = one_of(*SELECTIONS)  # which ones
    budget: str = one_of(*BUDGETS)  # whether memory_size is for all tasks together or for each


class Rehearsal(Strategy):
    """Keeps examples of each task in a memory, once the task is over."""

    config: RehearsalConfig
    supports_multi_process = True
    rehearses = True
    name: ClassVar[str]  # the strategy's; the memory draws its own numbers by it

    def setup(self, run: Run) -> None:
        self._memory = Memory(
            self.config.memory_size,
            run.generator_for(self.name),
            selection=self.config.selection,
            budget=self.config.budget,
        )

    def after_task(self, run: Run, task: EncodedTask) -> None:
        self._remember(run, task)

    def _remember(self, run: Run, task: EncodedTask) -> None:
        """Shows the memory a task's examples."""
        rows = self._memory.add(run, run.admitted(task, task.train, self.name))
        self._remembered(run, task, rows)

    def _remembered(self, run: Run, task: EncodedTask, rows: Tensor) -> None:
        """Called when the memory has taken examples of a task, with the rows that hold them."""

    def facts(self) -> Mapping[str, float]:
        return {"memory_examples": len(self._memory), "memory_bytes": self._memory.num_bytes}

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state["memory"])


@dataclass
class MixingConfig(RehearsalConfig):
    """Settings of a memory that batches are mixed with."""

    ratio: float = above(0)  # memory examples per new example in a batch


class Mixing(Rehearsal):
    """Has so many examples of its memory for each new one in a batch.

    Where `ratio` makes a fraction of an example, a later batch has one more.
    """

    config: MixingConfig

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._owed = 0.0  # the part of an example that batches so far should have brought

    def _due(self, batch: Batch) -> int:
        """How many examples of the memory a micro-batch brings, over all processes."""
        if not len(self._memory):
            return 0
        self._owed += self.config.ratio * batch.loaded
        count = int(self._owed)
        self._owed -= count
        return count

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "owed": self._owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._owed = state["owed"]


class EarlyRehearsal(Rehearsal):
    """Keeps examples of each task in a memory from the task's beginning on.

    A selection that asks the model asks it as it begins the task.
    """

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._entered = 0  # tasks whose examples the memory was shown

    def train_examples(self, run: Run, task: EncodedTask, examples: Dataset) -> Dataset:
        if self._entered <= task.index:  # else the run goes on within the task
            self._remember(run, task)
            self._entered = task.index + 1
        return examples

    def after_task(self, run: Run, task: EncodedTask) -> None:
        """The memory has the task's examples already."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "entered": self._entered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._entered = state["entered"]
