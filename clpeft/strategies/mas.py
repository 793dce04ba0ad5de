"""Memory-aware synapses: importance is how much a weight moves what the model says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.config import at_least, one_of
from clpeft.models.objective import IGNORED
from clpeft.registry import STRATEGIES
from clpeft.strategies.anchors import AnchoredStrategy, mean_one
from clpeft.strategies.base import StrategyConfig
from clpeft.strategies.per_example import mean_over_examples

if TYPE_CHECKING:
    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@dataclass
class MASConfig(StrategyConfig):
    """Settings of MAS."""

    lambda_: float = at_least(0)  # strength of the penalty
    examples: int = at_least(1)  # of a task's training set, for the importance
    normalize: str = one_of("mean", "none")  # mean: each task's importance is scaled to mean 1


def squared_outputs(logits: Tensor, labels: Tensor) -> Tensor:
    """‖f(x)‖² of each example: [B].

    Args:
        logits: [B, K] of a classification head, minus infinity where a label does not compete; or
            [B, L, K] of a language model.
        labels: [B] or [B, L]; only where there is a target do the logits count. The labels
            themselves play no part.
    """
    squares = logits.masked_fill(logits == -torch.inf, 0.0).square().sum(dim=-1)
    return squares.masked_fill(labels == IGNORED, 0.0).reshape(len(labels), -1).sum(dim=1)


@STRATEGIES.register("mas", config=MASConfig)
class MAS(AnchoredStrategy):
    """(λ/2) Σ_i Ω_i (θ_i − θ*_i)² with Ω ← Ω + E_x |∂‖f(x)‖²/∂θ|, θ* the latest weights.

    The mean is over absolute gradients of single examples, not the absolute of a batch's mean, and
    needs no labels. f(x) are the logits; of a language model those of the answer's tokens.

    Source: Aljundi et al. 2018, Memory Aware Synapses, equation 3 and section 4.1.
    """

    config: MASConfig
    term = "mas"

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._generator = run.generator_for("mas")

    def _remember(self, run: Run, task: EncodedTask, parameters: list[Tensor]) -> None:
        def outputs(batch: Batch, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            with run.accelerator.autocast():
                found = run.objective.forward(run.model, batch)
            values = squared_outputs(*run.objective.predicted(found, batch))
            yield values, torch.ones_like(values)

        importance = mean_over_examples(
            run,
            task.train,
            torch.abs,
            outputs,
            examples=self.config.examples,
            generator=self._generator,
        )
        if self.config.normalize == "mean":
            mean_one(importance)
        torch._foreach_add_(importance, self._anchors.curvature)
        self._anchors.replace(parameters, importance)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._generator.set_state(state["generator"])
