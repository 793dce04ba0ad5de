"""Elastic weight consolidation: weights that mattered to earlier tasks are held by springs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clpeft.config import Config, ConfigError, at_least, one_of
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Strategy, StrategyConfig
from clpeft.strategies.fisher import fisher_diagonal

if TYPE_CHECKING:
    from clpeft.streams.tokenize import EncodedTask
    from clpeft.training.run import Run


@dataclass
class EWCConfig(StrategyConfig):
    """Settings of EWC."""

    lambda_: float = at_least(0)  # strength of the penalty
    fisher: str = one_of("empirical", "sampled", "exact")  # whose labels the Fisher is taken over
    fisher_examples: int = at_least(1)  # of a task's training set
    normalize: str = one_of("mean", "none")  # mean: each task's Fisher is scaled to mean 1


@dataclass
class Anchors:
    """All anchors of all tasks, folded exactly into constant memory.

    Σ_k F^k (θ − θ^k)² is a quadratic in θ, so that three tensors and a number hold it whatever
    the number of tasks. With δ = θ − centre, where the centre is the latest anchor (so that
    nothing large cancels), it is A δ² − 2 b δ + c.

    Attributes:
        centre: The latest anchor, one float32 tensor per parameter.
        curvature: A = Σ F^k.
        pull: b = Σ F^k (θ^k − centre).
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
            curvature=[zero.clone() for zero in zeros],
            pull=zeros,
            constant=torch.zeros((), dtype=torch.float64, device=zeros[0].device),
        )

    def add(self, parameters: Sequence[Tensor], fisher: list[Tensor]) -> None:
        """Adds the anchor of a task: its final weights and their importance."""
        new = [parameter.detach().float().clone() for parameter in parameters]
        moved = torch._foreach_sub(new, self.centre)
        for a, b, m in zip(self.curvature, self.pull, moved, strict=True):
            # the earlier anchors seen from the new centre: d' = d − m
            self.constant += (a.double() * m.double() ** 2 - 2 * m.double() * b.double()).sum()
            b -= a * m
        torch._foreach_add_(self.curvature, fisher)
        self.centre = new


def ewc_penalty(parameters: Sequence[Tensor], anchors: Anchors, strength: float) -> Tensor:
    """(λ/2) Σ_k Σ_i F^k_i (θ_i − θ^k_i)² over the folded anchors: a scalar."""
    total = anchors.constant.clone()
    for theta, centre, a, b in zip(
        parameters, anchors.centre, anchors.curvature, anchors.pull, strict=True
    ):
        delta = theta.detach().float() - centre
        total += (delta * (a * delta - 2 * b)).sum(dtype=torch.float64)
    return 0.5 * strength * total


def ewc_gradient(parameters: Sequence[Tensor], anchors: Anchors, strength: float) -> list[Tensor]:
    """λ (A δ − b), the gradient of `ewc_penalty`: one tensor per parameter."""
    delta = torch._foreach_sub([p.detach().float() for p in parameters], anchors.centre)
    torch._foreach_mul_(delta, anchors.curvature)
    torch._foreach_sub_(delta, anchors.pull)
    torch._foreach_mul_(delta, strength)
    return list(delta)


@STRATEGIES.register("ewc", config=EWCConfig)
class EWC(Strategy):
    """(λ/2) Σ_k Σ_i F^k_i (θ_i − θ^k_i)², F^k the diagonal Fisher of task k at its end.

    Every task keeps its own anchor. The gradient is added once per optimizer step, outside the
    autograd graph, so that it does not depend on accumulation and never leaks into the Fisher.

    Source: Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks; the
        separate anchors after Huszár 2018.
    """

    config: EWCConfig
    supports_multi_process = True
    conflicts: ClassVar[dict[str, str]] = {
        "olora": "ewc holds the adapter's weights where a task left them, and olora starts them "
        "afresh for every task"
    }

    def check(self, config: Config) -> None:
        if self.config.fisher == "exact" and config.model.task_type != "sequence_classification":
            raise ConfigError(
                f"strategies.ewc.fisher=exact sums over all labels of a classification head, but "
                f"model.task_type is {config.model.task_type}; use sampled or empirical."
            )

    def setup(self, run: Run) -> None:
        self._anchors = Anchors.none(list(run.trainable.values()))
        self._generator = run.generator_for("ewc")
        self._tasks = 0

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        if not self._tasks:
            return {}
        parameters = list(run.trainable.values())
        pull = ewc_gradient(parameters, self._anchors, self.config.lambda_)
        torch._foreach_add_(run.filled_gradients(), pull)
        if not run.logging:
            return {}
        return {"loss/ewc": ewc_penalty(parameters, self._anchors, self.config.lambda_)}

    def after_task(self, run: Run, task: EncodedTask) -> None:
        fisher = fisher_diagonal(
            run,
            task.train,
            kind=self.config.fisher,
            examples=self.config.fisher_examples,
            generator=self._generator,
        )
        if self.config.normalize == "mean":
            total = sum(f.sum(dtype=torch.float64) for f in fisher)
            mean = float(total / sum(f.numel() for f in fisher))
            torch._foreach_div_(fisher, max(mean, torch.finfo(torch.float32).tiny))
        self._anchors.add(list(run.trainable.values()), fisher)
        self._tasks += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            **vars(self._anchors),
            "tasks": self._tasks,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._anchors.constant.device
        self._anchors = Anchors(
            **{name: _moved(state[name], device) for name in vars(self._anchors)}
        )
        self._tasks = state["tasks"]
        self._generator.set_state(state["generator"])


def _moved(value: Any, device: torch.device) -> Any:
    return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
