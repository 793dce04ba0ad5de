"""Synaptic intelligence: importance is what a weight contributed to the fall of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.config import above, at_least
from clpeft.registry import STRATEGIES
from clpeft.strategies.anchors import moved
from clpeft.strategies.base import StrategyConfig
from clpeft.strategies.path_integral import FollowedPath, path_integral

if TYPE_CHECKING:
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@dataclass
class SIConfig(StrategyConfig):
    """Settings of SI."""

    lambda_: float = at_least(0)  # strength of the penalty, c in the paper
    xi: float = above(0)  # keeps the importance of weights that hardly moved finite


def consolidated(
    integral: Sequence[Tensor], travelled: Sequence[Tensor], xi: float
) -> list[Tensor]:
    """The importance that a task adds: relu(ω) / (Δ² + ξ), Δ the way from its first weights."""
    return [w.clamp(min=0.0) / (t.square() + xi) for w, t in zip(integral, travelled, strict=True)]


@STRATEGIES.register("si", config=SIConfig)
class SI(FollowedPath):
    """(λ/2) Σ_i Ω_i (θ_i − θ*_i)², θ* the weights after the latest task.

    Within a task ω ← ω − g·Δθ each step, with g the task's own gradient (summed over micro-batches,
    unscaled, before any strategy or clipping changes it) and Δθ what the optimizer did. After it
    Ω ← Ω + relu(ω)/((θ − θ_start)² + ξ), ω ← 0. The first task is followed too.

    Source: Zenke et al. 2017, Continual Learning Through Synaptic Intelligence, equations 3 to 5.
    """

    config: SIConfig
    term = "si"

    def setup(self, run: Run) -> None:
        super().setup(run)
        parameters = list(run.trainable.values())
        self._integral = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]

    def _follow(self, gradients: list[Tensor], moves: list[Tensor], now: list[Tensor]) -> None:
        path_integral(self._integral, gradients, moves)

    def _remember(self, run: Run, task: EncodedTask, parameters: list[Tensor]) -> None:
        now = [parameter.detach().float() for parameter in parameters]
        travelled = torch._foreach_sub(now, self._anchors.centre)
        importance = consolidated(self._integral, travelled, self.config.xi)
        torch._foreach_add_(importance, self._anchors.curvature)
        self._anchors.replace(parameters, importance)
        torch._foreach_zero_(self._integral)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "integral": self._integral}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._integral = moved(state["integral"], self._anchors.constant.device)
