"""The way that training took: what each step's gradient was and what the optimizer made of it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clpeft.strategies.anchors import AnchoredStrategy

if TYPE_CHECKING:
    from clpeft.training.run import Run


def path_integral(integral: list[Tensor], gradients: list[Tensor], moves: list[Tensor]) -> None:
    """ω ← ω − g·Δθ, in place: what each weight's move took off the loss, to first order.

    Args:
        integral: ω so far, one float32 tensor per parameter.
        gradients: g, the loss's gradient at the step's start, without regularisers of weights.
        moves: Δθ, what the optimizer made of it.

    Source: Zenke et al. 2017, Continual Learning Through Synaptic Intelligence, equation 3.
    """
    torch._foreach_addcmul_(integral, gradients, moves, value=-1.0)


class FollowedPath(AnchoredStrategy):
    """Anchors whose importance comes from each step; subclasses say how in `_follow`.

    The gradient is that of the loss: summed over micro-batches, unscaled, before any strategy or
    clipping changes it, without the pull of anchors. What another strategy adds to the loss (LwF's
    term, the examples that it replays) is in it. The first task is followed too.
    """

    def setup(self, run: Run) -> None:
        super().setup(run)
        # the first task starts here; every other one at the anchor
        self._anchors.centre = [p.detach().float().clone() for p in run.trainable.values()]
        self._gradients: list[Tensor] = []
        self._before: list[Tensor] = []

    def task_gradients(self, run: Run) -> None:
        self._gradients = [gradient.float().clone() for gradient in run.filled_gradients()]
        self._before = [p.detach().float().clone() for p in run.trainable.values()]

    def after_step(self, run: Run) -> None:
        if run.optimizer.step_was_skipped:  # its gradients overflowed in fp16
            return
        now = [parameter.detach().float() for parameter in run.trainable.values()]
        self._follow(self._gradients, list(torch._foreach_sub(now, self._before)), now)
        self._gradients, self._before = [], []  # 2 × what trains, for as long as a step takes

    @abstractmethod
    def _follow(self, gradients: list[Tensor], moves: list[Tensor], now: list[Tensor]) -> None:
        """Takes note of a step.

        Args:
            gradients: g, at its start.
            moves: Δθ.
            now: θ after it; the parameters themselves where they are in float32.
        """
