"""Experience replay: examples of earlier tasks are mixed into every batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from clpeft.config import above, at_least
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence, Strategy, StrategyConfig
from clpeft.strategies.memory import Memory
from clpeft.streams.batching import concatenate

if TYPE_CHECKING:
    from torch import Tensor

    from clpeft.streams.batching import Batch
    from clpeft.streams.tokenize import EncodedTask
    from clpeft.training.run import Run


@dataclass
class ReplayConfig(StrategyConfig):
    """Settings of replay."""

    memory_size: int = at_least(1)  # examples kept, over all tasks
    ratio: float = above(0)  # memory examples per new example in a batch


@STRATEGIES.register("replay", config=ReplayConfig)
class Replay(Strategy):
    """Keeps a reservoir of all examples seen and adds `ratio` times a batch's size from it.

    The loss is the mean over the targets of new and replayed examples alike; where `ratio` makes a
    fraction of an example, a later batch has one more.

    Source: Chaudhry et al. 2019, On Tiny Episodic Memories in Continual Learning; Rolnick et al.
        2019, Experience Replay for Continual Learning.
    """

    config: ReplayConfig
    supports_multi_process = True
    evidence: ClassVar = {"replay/examples": Evidence.MEMORY}

    def setup(self, run: Run) -> None:
        self._memory = Memory(self.config.memory_size, run.generator_for("replay"))
        self._replayed = 0
        self._owed = 0.0  # the part of an example that batches so far should have brought

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        if not len(self._memory):
            return batch
        self._owed += self.config.ratio * batch.rows
        count = int(self._owed)
        self._owed -= count
        if not count:
            return batch
        drawn = self._memory.draw(run, count)
        self._replayed += drawn.rows
        return concatenate([batch, drawn], run.collator.pad_token_id)

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes none; logs how much of the memory was read, so that a memory never read shows."""
        return {"replay/examples": self._replayed}

    def after_task(self, run: Run, task: EncodedTask) -> None:
        self._memory.add(task.train)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._memory.state_dict(), "replayed": self._replayed, "owed": self._owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state["memory"])
        self._replayed = state["replayed"]
        self._owed = state["owed"]
