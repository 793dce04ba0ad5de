"""Quadratic penalties: weights that mattered to earlier tasks are held where those left them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clpeft.strategies.base import Evidence, Strategy

if TYPE_CHECKING:
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@dataclass
class Anchors:
    """All anchors of all tasks, folded exactly into constant memory.

    Σ_k F^k (θ − θ^k)² is a quadratic in θ, so that three tensors and a number hold it whatever
    the number of tasks. With δ = θ − centre, where the centre is the latest anchor (so that
    nothing large cancels), it is A δ² − 2 b δ + c.

    Attributes:
        centre: The latest anchor, one float32 tensor per parameter.
        curvature: A = Σ F^k.
        pull: b = Σ F^k (θ^k − centre); empty where all of them are 0, as with one anchor.
        constant: c = Σ F^k (θ^k − centre)², summed over all parameters; a float64 scalar.
    """

    centre: list[Tensor]
    curvature: list[Tensor]
    pull: list[Tensor]
    constant: Tensor

    @classmethod
    def none(cls, parameters: Sequence[Tensor]) -> Anchors:
        """No anchors yet."""
        zeros = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        return cls(
            centre=[zero.clone() for zero in zeros],
            curvature=zeros,
            pull=[],
            constant=torch.zeros((), dtype=torch.float64, device=zeros[0].device),
        )

    def replace(self, parameters: Sequence[Tensor], importance: list[Tensor]) -> None:
        """Forgets the earlier anchors for one new: the weights as they are, with an importance."""
        self.centre = [parameter.detach().float().clone() for parameter in parameters]
        self.curvature = importance
        self.pull = []
        self.constant.zero_()

    def add(self, parameters: Sequence[Tensor], importance: list[Tensor]) -> None:
        """Adds the anchor of a task: its final weights and their importance."""
        new = [parameter.detach().float().clone() for parameter in parameters]
        moved = torch._foreach_sub(new, self.centre)
        if not self.pull:
            self.pull = [torch.zeros_like(a) for a in self.curvature]
        for a, b, m in zip(self.curvature, self.pull, moved, strict=True):
            # the earlier anchors seen from the new centre: d' = d − m
            self.constant += (a.double() * m.double() ** 2 - 2 * m.double() * b.double()).sum()
            b -= a * m
        torch._foreach_add_(self.curvature, importance)
        self.centre = new


def quadratic_penalty(parameters: Sequence[Tensor], anchors: Anchors, strength: float) -> Tensor:
    """(λ/2) Σ_k Σ_i F^k_i (θ_i − θ^k_i)² over the folded anchors: a scalar."""
    total = anchors.constant.clone()
    pulls: Sequence[Tensor | None] = anchors.pull or [None] * len(parameters)
    for theta, centre, a, b in zip(
        parameters, anchors.centre, anchors.curvature, pulls, strict=True
    ):
        delta = theta.detach().float() - centre
        slope = a * delta if b is None else a * delta - 2 * b
        total += (delta * slope).sum(dtype=torch.float64)
    return 0.5 * strength * total


def quadratic_gradient(
    parameters: Sequence[Tensor], anchors: Anchors, strength: float
) -> list[Tensor]:
    """λ (A δ − b), the gradient of `quadratic_penalty`: one tensor per parameter."""
    delta = torch._foreach_sub([p.detach().float() for p in parameters], anchors.centre)
    torch._foreach_mul_(delta, anchors.curvature)
    if anchors.pull:
        torch._foreach_sub_(delta, anchors.pull)
    torch._foreach_mul_(delta, strength)
    return list(delta)


class AnchoredStrategy(Strategy, ABC):
    """A penalty (λ/2) Σ Ω (θ − θ*)²; subclasses say what Ω and θ* are.

    Its gradient is added once per optimizer step, outside the autograd graph, so that it does not
    depend on accumulation and never leaks into an importance.
    """

    supports_multi_process = True
    conflicts: ClassVar[dict[str, str]] = {
        "olora": "the one holds the adapter's weights where a task left them, and olora starts "
        "them afresh for every task"
    }
    term: ClassVar[str]  # what the penalty is logged as, below train/loss/

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "term" in vars(cls) and "evidence" not in vars(cls):
            cls.evidence = {f"loss/{cls.term}": Evidence.PENALTY}
        super().__init_subclass__(**kwargs)

    def setup(self, run: Run) -> None:
        self._anchors = Anchors.none(list(run.trainable.values()))
        self._tasks = 0

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        if not self._tasks:
            return {}
        parameters = list(run.trainable.values())
        pull = quadratic_gradient(parameters, self._anchors, self.config.lambda_)
        torch._foreach_add_(run.filled_gradients(), pull)
        if not run.logging:
            return {}
        value = quadratic_penalty(parameters, self._anchors, self.config.lambda_)
        return {f"loss/{self.term}": value}

    def after_task(self, run: Run, task: EncodedTask) -> None:
        self._remember(run, task, list(run.trainable.values()))
        self._tasks += 1

    @abstractmethod
    def _remember(self, run: Run, task: EncodedTask, parameters: list[Tensor]) -> None:
        """Adds to the anchors, or replaces them, after a task."""

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self._anchors), "tasks": self._tasks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._anchors.constant.device
        self._anchors = Anchors(
            **{name: moved(state[name], device) for name in vars(self._anchors)}
        )
        self._tasks = state["tasks"]


def moved(value: Any, device: torch.device) -> Any:
    """A tensor or a list of tensors on a device."""
    return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)


def mean_one(importance: list[Tensor]) -> list[Tensor]:
    """An importance scaled so that its mean over all parameters is 1, in place.

    A strength then means the same whatever the size of the gradients.
    """
    total = sum(tensor.sum(dtype=torch.float64) for tensor in importance)
    mean = float(total / sum(tensor.numel() for tensor in importance))
    torch._foreach_div_(importance, max(mean, torch.finfo(torch.float32).tiny))
    return importance
