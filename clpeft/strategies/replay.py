"""Experience replay: examples of earlier tasks are trained on beside every batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from clpeft.config import above, one_of
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence
from clpeft.strategies.rehearsal import Rehearsal, RehearsalConfig
from clpeft.streams.batch import Batch, concatenate, set_aside

if TYPE_CHECKING:
    from torch import Tensor

    from clpeft.training.run import Run


@dataclass
class ReplayConfig(RehearsalConfig):
    """Settings of replay."""

    ratio: float = above(0)  # memory examples per new example in a batch
    mixing: str = one_of("ratio", "separate")  # in one mean with the new ones, or as a term
    weight: float = above(0)  # of the term, with mixing=separate


@STRATEGIES.register("replay", config=ReplayConfig)
class Replay(Rehearsal):
    """Adds `ratio` times a batch's size of examples from a memory of earlier tasks.

    With `mixing=ratio` the loss is the mean over the targets of new and replayed examples alike;
    with `mixing=separate` it is L_new + weight · L_replay, each a mean over its own targets. Where
    `ratio` makes a fraction of an example, a later batch has one more.

    Source: Chaudhry et al. 2019, On Tiny Episodic Memories in Continual Learning; Rolnick et al.
        2019, Experience Replay for Continual Learning.
    """

    config: ReplayConfig
    name = "replay"
    evidence: ClassVar = {"replay/examples": Evidence.MEMORY}

    def setup(self, run: Run) -> None:
        super().setup(run)
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
        drawn = self._drawn(run, count)
        self._replayed += drawn.rows
        if self.config.mixing == "separate":
            drawn = set_aside(drawn, self.name)
        return concatenate([batch, drawn], run.collator.pad_token_id)

    def _drawn(self, run: Run, count: int) -> Batch:
        """This process's share of `count` examples of the memory."""
        return self._memory.draw(run, count)

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        if self.name not in batch.parts:
            return {}
        total = run.per_example_loss(batch, outputs, self.name).sum()
        return {self.name: self.config.weight * run.per_target(total, self.name)}

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes none; logs how much of the memory was read, so that a memory never read shows."""
        return {f"{self.name}/examples": self._replayed}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "replayed": self._replayed, "owed": self._owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._replayed = state["replayed"]
        self._owed = state["owed"]
