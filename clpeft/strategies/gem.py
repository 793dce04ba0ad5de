"""GEM: a step may hurt the memory of no earlier task, to first order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from clpeft.config import above, at_least
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence
from clpeft.strategies.rehearsal import Rehearsal, RehearsalConfig

if TYPE_CHECKING:
    from clpeft.training.run import Run


@dataclass
class GEMConfig(RehearsalConfig):
    """Settings of GEM."""

    reference_size: int = at_least(1)  # memory examples of each task behind its gradient
    margin: float = at_least(0)  # how much of every task's gradient a changed step has at least
    eps: float = above(0)  # added to GGᵀ's diagonal, in units of its mean


def multipliers(products: Tensor, against: Tensor, *, margin: float, eps: float) -> Tensor:
    """The solution of GEM's dual: v that minimises ½ vᵀ(K + εI)v + qᵀv with v ≥ margin.

    Exact up to rounding: with u = v − margin ≥ 0 and K + εI = AᵀA it is the least-squares problem
    min ‖Au − b‖ with Aᵀb = −(q + (K + εI)·margin), which an active-set method ends in finitely
    many steps.

    Args:
        products: K = GGᵀ [t, t], float64 on the CPU; G has a task's gradient in each row.
        against: q = Gg [t], likewise, for the gradient g that is to be changed.
        margin: The smallest multiplier; the paper's γ as its code has it, where it is a bound
            rather than what is added to the solution.
        eps: ε, larger than 0.

    Returns:
        v [t], by which g becomes g + Gᵀv.

    Source: Lopez-Paz & Ranzato 2017, Gradient Episodic Memory for Continual Learning, equation 11;
        Lawson & Hanson 1974, Solving Least Squares Problems, for u.
    """
    from scipy.optimize import nnls

    curvature = products + eps * torch.eye(len(products), dtype=torch.float64)
    slope = against + curvature.sum(dim=1) * margin
    # K is positive semidefinite, except for the rounding of its products
    values, vectors = torch.linalg.eigh(curvature)
    roots = values.clamp(min=eps).sqrt()
    factor = roots[:, None] * vectors.T
    target = -(vectors.T @ slope) / roots
    solution, _ = nnls(factor.numpy(), target.numpy(), maxiter=100 * len(products))
    return margin + torch.from_numpy(solution)


def project_to_cone(
    gradients: list[Tensor], references: Tensor, *, margin: float, eps: float
) -> dict[str, float]:
    """Turns a gradient as little as needed for no reference to object to it; in place.

    Where g·g_k < 0 for some k, g ← g + Gᵀv with v of `multipliers`, after which g·g_k ≥ 0 but for
    ε; else g stays as it is, bit by bit. All of it is about the concatenated vectors.

    Args:
        gradients: g, one tensor per parameter; changed.
        references: G, a row per earlier task [t, P] in float32, parameters in the same order.
        margin: See `multipliers`.
        eps: ε in units of the mean ‖g_k‖², so that the size of a loss does not matter; the paper's
            code adds ε itself, which would keep small gradients from being turned.

    Returns:
        The share of tasks that objected, the smallest cosine of g with a g_k before, and
        ‖Gᵀv‖/‖g‖. Nothing if a gradient is not finite: such a step is left out, or ends the run,
        elsewhere.

    Source: Lopez-Paz & Ranzato 2017, algorithm 1.
    """
    g = torch.cat([gradient.flatten() for gradient in gradients]).float()
    tasks = len(references)
    found = torch.cat([(references @ references.T).flatten(), references @ g, (g @ g)[None]])
    found = found.double().cpu()  # the one place where the step waits for the device
    if not found.isfinite().all():
        return {}
    products = found[: tasks**2].view(tasks, tasks)
    against, square = found[tasks**2 : -1], found[-1]
    lengths = (products.diagonal() * square).sqrt()
    cosine = float((against / lengths.clamp(min=torch.finfo(torch.float32).tiny)).min())
    violated = float((against < 0).double().mean())
    if not violated:
        return {"gem_violated": 0.0, "gem_cosine": cosine, "gem_change": 0.0}
    v = multipliers(products, against, margin=margin, eps=eps * float(products.diagonal().mean()))
    added = (v.to(references) @ references).split([gradient.numel() for gradient in gradients])
    pairs = zip(added, gradients, strict=True)
    torch._foreach_add_(gradients, [part.view_as(own).to(own.dtype) for part, own in pairs])
    change = float(((v @ products @ v).clamp(min=0.0) / square).sqrt())
    return {"gem_violated": violated, "gem_cosine": cosine, "gem_change": change}


@STRATEGIES.register("gem", config=GEMConfig)
class GEM(Rehearsal):
    """Turns each step's gradient until it conflicts with that of no earlier task's memory.

    Once per optimizer step, on the accumulated gradient and before clipping. Each earlier task's
    gradient is computed anew, on `reference_size` of its examples drawn afresh (the paper takes
    all that the memory has of a task), so that a step costs a forward and a backward pass more for
    every task behind it, and as many gradients of memory.

    Source: Lopez-Paz & Ranzato 2017, Gradient Episodic Memory for Continual Learning.
    """

    config: GEMConfig
    name = "gem"
    evidence: ClassVar = {"gradient/gem_violated": Evidence.GRADIENT}

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        if not len(self._memory):
            return {}
        gradients, references = run.filled_gradients(), self._references(run)
        return project_to_cone(
            gradients, references, margin=self.config.margin, eps=self.config.eps
        )

    def _references(self, run: Run) -> Tensor:
        """A gradient for each task that the memory has examples of [t, P], in float32."""
        memory, size = self._memory, self.config.reference_size
        tasks = sorted({*memory.columns.numbers["task_id"].tolist()})
        width = sum(parameter.numel() for parameter in run.trainable.values())
        references = torch.empty(len(tasks), width, device=run.device)
        for row, task in zip(references, tasks, strict=True):
            drawn = memory.sample(size, memory.rows_of_task(task))
            found = run.gradients(run.shared_batch(memory.columns, drawn.numpy()))
            torch.cat([gradient.flatten() for gradient in found], out=row)
        return references
