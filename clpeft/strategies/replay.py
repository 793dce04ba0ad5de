"""Experience replay: examples of earlier tasks are trained on beside every batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from clpeft.config import Config, ConfigError, above, one_of
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence
from clpeft.strategies.rehearsal import Mixing, MixingConfig
from clpeft.streams.batch import Batch, concatenate, set_aside

if TYPE_CHECKING:
    from torch import Tensor

    from clpeft.training.run import Run


@dataclass
class ReplayConfig(MixingConfig):
    """Settings of replay."""

    mixing: str = one_of("ratio", "separate")  # in one mean with the new ones, or as a term
    weight: float = above(0)  # of the term, with mixing=separate


@STRATEGIES.register("replay", config=ReplayConfig)
class Replay(Mixing):
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

    def check(self, config: Config) -> None:
        weight = self.config.weight
        if self.config.mixing == "ratio" and weight != 1:
            raise ConfigError(
                f"strategies.{self.name}.weight={weight:g} is of the term that mixing=separate "
                f"makes of what is replayed, and would do nothing with mixing=ratio; set "
                f"strategies.{self.name}.mixing=separate, or weight=1."
            )

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._replayed = 0

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        count = self._due(batch)
        return self._mixed(run, batch, self._memory.draw(run, count)) if count else batch

    def _mixed(self, run: Run, batch: Batch, drawn: Batch) -> Batch:
        """A micro-batch with what was drawn for it after its own examples."""
        self._replayed += drawn.rows
        if self.config.mixing == "separate":
            drawn = set_aside(drawn, self.name)
        return concatenate([batch, drawn], run.collator.pad_token_id)

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        if self.name not in batch.parts:
            return {}
        losses = run.per_example_loss(batch, outputs, self.name)
        if batch.weights is not None:
            losses = losses * batch.weights[batch.parts[self.name].rows]
        return {self.name: self.config.weight * run.per_target(losses.sum(), self.name)}

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes none; logs how much of the memory was read, so that a memory never read shows."""
        return {f"{self.name}/examples": self._replayed}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "replayed": self._replayed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._replayed = state["replayed"]
