"""Elastic weight consolidation: weights that mattered to earlier tasks are held by springs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.config import Config, ConfigError, at_least, between, one_of
from clpeft.registry import STRATEGIES
from clpeft.strategies.anchors import AnchoredStrategy, mean_one
from clpeft.strategies.base import StrategyConfig
from clpeft.strategies.fisher import fisher_diagonal

if TYPE_CHECKING:
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@dataclass
class EWCConfig(StrategyConfig):
    """Settings of EWC."""

    lambda_: float = at_least(0)  # strength of the penalty
    fisher: str = one_of("empirical", "sampled", "exact")  # whose labels the Fisher is taken over
    fisher_examples: int = at_least(1)  # of a task's training set
    normalize: str = one_of("mean", "none")  # mean: each task's Fisher is scaled to mean 1


@STRATEGIES.register("ewc", config=EWCConfig)
class EWC(AnchoredStrategy):
    """(λ/2) Σ_k Σ_i F^k_i (θ_i − θ^k_i)², F^k the diagonal Fisher of task k at its end.

    Every task keeps its own anchor; all of them are folded into constant memory, exactly.

    Source: Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks; the
        separate anchors after Huszár 2018.
    """

    config: EWCConfig
    term = "ewc"

    def check(self, config: Config) -> None:
        if self.config.fisher == "exact" and config.model.task_type != "sequence_classification":
            raise ConfigError(
                f"strategies.{self.term}.fisher=exact sums over all labels of a classification "
                f"head, but model.task_type is {config.model.task_type}; use sampled or empirical."
            )

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._generator = run.generator_for(self.term)

    def _fisher(self, run: Run, task: EncodedTask) -> list[Tensor]:
        fisher = fisher_diagonal(
            run,
            task.train,
            kind=self.config.fisher,
            examples=self.config.fisher_examples,
            generator=self._generator,
        )
        return mean_one(fisher) if self.config.normalize == "mean" else fisher

    def _remember(self, run: Run, task: EncodedTask, parameters: list[Tensor]) -> None:
        self._anchors.add(parameters, self._fisher(run, task))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._generator.set_state(state["generator"])


@dataclass
class OnlineEWCConfig(EWCConfig):
    """Settings of online EWC."""

    gamma: float = between(0, 1)  # how much of the earlier importance stays with each task


@STRATEGIES.register("online_ewc", config=OnlineEWCConfig)
class OnlineEWC(EWC):
    """(λ/2) Σ_i F_i (θ_i − θ*_i)² with F ← γF + F^k, and θ* the weights after the latest task.

    γ = 1 is not EWC: there each task's anchor stays, and here the one anchor moves.

    Source: Schwarz et al. 2018, Progress & Compress.
    """

    config: OnlineEWCConfig
    term = "online_ewc"

    def _remember(self, run: Run, task: EncodedTask, parameters: list[Tensor]) -> None:
        importance = self._fisher(run, task)
        torch._foreach_add_(importance, self._anchors.curvature, alpha=self.config.gamma)
        self._anchors.replace(parameters, importance)
