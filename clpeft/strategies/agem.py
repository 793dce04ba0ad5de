"""A-GEM: gradients that would hurt the memory are projected until they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from clpeft.config import at_least
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence
from clpeft.strategies.rehearsal import Rehearsal, RehearsalConfig

if TYPE_CHECKING:
    from clpeft.training.run import Run


@dataclass
class AGEMConfig(RehearsalConfig):
    """Settings of A-GEM."""

    reference_size: int = at_least(1)  # memory examples behind each reference gradient


def project_conflicting(gradients: list[Tensor], reference: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Removes from a gradient what points against a reference; in place.

    With g and r the concatenated vectors: where g·r < 0, g ← g − (g·r / ‖r‖²) r, after which
    g·r = 0; else g stays as it is.

    Args:
        gradients: One tensor per parameter; changed.
        reference: The gradient on the memory, likewise.

    Returns:
        The cosine of g and r before, and whether g was changed (1.0 or 0.0); scalars.

    Source: Chaudhry et al. 2019, Efficient Lifelong Learning with A-GEM, equation 11.
    """
    g = torch.cat([gradient.flatten() for gradient in gradients]).float()
    r = torch.cat([gradient.flatten() for gradient in reference]).float()
    dot, norm = g @ r, r @ r
    tiny = torch.finfo(torch.float32).tiny
    # no branch on a value that lives on the device: without a conflict the coefficient is 0
    coefficient = dot.clamp(max=0.0) / norm.clamp(min=tiny)
    scaled = torch._foreach_mul(reference, coefficient)
    torch._foreach_sub_(gradients, [s.to(g.dtype) for s, g in zip(scaled, gradients, strict=True)])
    cosine = dot / (g.norm() * norm.sqrt()).clamp(min=tiny)
    return cosine, (dot < 0).float()


@STRATEGIES.register("agem", config=AGEMConfig)
class AGEM(Rehearsal):
    """Projects each step's gradient on the memory's, whenever the two conflict.

    Once per optimizer step, on the accumulated gradient and before clipping; the reference is
    computed anew each time, from a fresh draw.

    Source: Chaudhry et al. 2019, Efficient Lifelong Learning with A-GEM.
    """

    config: AGEMConfig
    name = "agem"
    evidence: ClassVar = {"gradient/agem_projected": Evidence.GRADIENT}

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        if not len(self._memory):
            return {}
        reference = run.gradients(self._memory.draw(run, self.config.reference_size))
        cosine, projected = project_conflicting(run.filled_gradients(), reference)
        return {"agem_cosine": cosine, "agem_projected": projected}
