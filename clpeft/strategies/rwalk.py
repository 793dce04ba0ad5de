"""RWalk: importance is what a weight took off the loss for how far it moved the model's answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.config import above, at_least, between
from clpeft.registry import STRATEGIES
from clpeft.strategies.anchors import moved
from clpeft.strategies.base import StrategyConfig
from clpeft.strategies.path_integral import FollowedPath, path_integral

if TYPE_CHECKING:
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@dataclass
class RWalkConfig(StrategyConfig):
    """Settings of RWalk."""

    lambda_: float = at_least(0)  # strength of the penalty
    alpha: float = between(0, 1)  # weight of the newest batch in the running Fisher
    every: int = at_least(1)  # optimizer steps between two updates of the score, Δt
    epsilon: float = above(0)  # keeps the score of weights that hardly moved finite


def moving_average(fisher: list[Tensor], gradients: list[Tensor], alpha: float) -> None:
    """F ← α g² + (1 − α) F, in place.

    Args:
        fisher: F, one float32 tensor per parameter.
        gradients: g of the newest batch.
        alpha: α.

    Source: Chaudhry et al. 2018, equation 6 (EWC++).
    """
    torch._foreach_mul_(fisher, 1 - alpha)
    torch._foreach_addcmul_(fisher, gradients, gradients, value=alpha)


def riemannian_score(
    falls: list[Tensor], fisher: list[Tensor], travelled: list[Tensor], epsilon: float
) -> list[Tensor]:
    """relu(ΔL) / (½ F Δθ² + ε): the loss taken off by a weight, for the divergence it caused.

    Args:
        falls: ΔL, what each weight's moves took off the loss, one tensor per parameter.
        fisher: F.
        travelled: Δθ, from where an interval began to where it ended.
        epsilon: ε.

    Source: Chaudhry et al. 2018, equation 7, and "negative scores are set to zero".
    """
    return [
        fall.clamp(min=0.0) / (0.5 * f * delta.square() + epsilon)
        for fall, f, delta in zip(falls, fisher, travelled, strict=True)
    ]


def unit_range(importance: list[Tensor]) -> list[Tensor]:
    """An importance divided by its largest entry over all parameters; zeros stay zeros."""
    largest = torch.stack([tensor.max() for tensor in importance]).max()
    return [t / largest.clamp(min=torch.finfo(torch.float32).tiny) for t in importance]


@STRATEGIES.register("rwalk", config=RWalkConfig)
class RWalk(FollowedPath):
    """λ Σ_i (F̂_i + ŝ_i) (θ_i − θ*_i)², θ* the weights after the latest task.

    F is a running Fisher over all steps of all tasks, F ← α g² + (1 − α) F, that begins with the
    first batch's; F̂ is its value at the task's end. The score s adds relu(ΔL) / (½ F Δθ² + ε) for
    every interval of `every` steps (and what is left of one when a task ends), where
    ΔL = −Σ g·Δθ is summed over the interval's steps, Δθ below is from its beginning to its end and
    F is the running one at its end. After each task but the first s ← ½ (s_before + s_task), so
    that what was learned long ago fades. F̂ and ŝ are F and s, each divided by its largest entry,
    to be of one scale. There is no ½ before λ, unlike in EWC.

    g is the mean gradient of a step's batch at its own labels, the task's alone. Its square is the
    paper's Fisher "obtained using the current batch", and costs nothing; it is smaller than a mean
    of squares over single examples by about the batch's size, which F̂ does not show and the
    score, beside ε, does.

    Source: Chaudhry et al. 2018, Riemannian Walk for Incremental Learning, equations 6 to 8 and
        section 4.3; intervals and ε as in the first author's later code, which takes the F of the
        interval's beginning.
    """

    config: RWalkConfig
    term = "rwalk"

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._fisher, self._falls, self._score = (
            [torch.zeros_like(p, dtype=torch.float32) for p in run.trainable.values()]
            for _ in range(3)
        )
        self._departed = [centre.clone() for centre in self._anchors.centre]
        self._steps = 0  # of the task under way

    def _follow(self, gradients: list[Tensor], moves: list[Tensor], now: list[Tensor]) -> None:
        first = not self._tasks and not self._steps
        moving_average(self._fisher, gradients, 1.0 if first else self.config.alpha)
        path_integral(self._falls, gradients, moves)
        self._steps += 1
        if self._steps % self.config.every == 0:
            self._end_interval(now)

    def _end_interval(self, now: list[Tensor]) -> None:
        travelled = list(torch._foreach_sub(now, self._departed))
        gained = riemannian_score(self._falls, self._fisher, travelled, self.config.epsilon)
        torch._foreach_add_(self._score, gained)
        torch._foreach_zero_(self._falls)
        self._departed = [weight.clone() for weight in now]

    def _remember(self, run: Run, task: EncodedTask, parameters: list[Tensor]) -> None:
        self._end_interval([parameter.detach().float() for parameter in parameters])
        if self._tasks:
            torch._foreach_mul_(self._score, 0.5)  # it went on from the score before
        importance = unit_range(self._fisher)
        torch._foreach_add_(importance, unit_range(self._score))
        torch._foreach_mul_(importance, 2.0)  # for the ½ before the strength of an anchor
        self._anchors.replace(parameters, importance)
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "fisher": self._fisher,
            "score": self._score,
            "falls": self._falls,
            "departed": self._departed,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = self._anchors.constant.device
        self._fisher = moved(state["fisher"], device)
        self._score = moved(state["score"], device)
        self._falls = moved(state["falls"], device)
        self._departed = moved(state["departed"], device)
        self._steps = state["steps"]
