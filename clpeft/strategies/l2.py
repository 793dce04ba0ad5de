"""L2: every weight is held alike where the latest task left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clpeft.config import at_least
from clpeft.registry import STRATEGIES
from clpeft.strategies.anchors import AnchoredStrategy
from clpeft.strategies.base import StrategyConfig

if TYPE_CHECKING:
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@dataclass
class L2Config(StrategyConfig):
    """Settings of L2."""

    lambda_: float = at_least(0)  # strength of the penalty


@STRATEGIES.register("l2", config=L2Config)
class L2(AnchoredStrategy):
    """(λ/2) Σ_i (θ_i − θ*_i)², θ* the weights after the latest task.

    The control for EWC, SI and MAS: what they gain over it, their importances gain.

    Source: Kirkpatrick et al. 2017, where it is the baseline of figure 2.
    """

    config: L2Config
    term = "l2"

    def _remember(self, run: Run, task: EncodedTask, parameters: list[Tensor]) -> None:
        ones = [torch.ones_like(parameter, dtype=torch.float32) for parameter in parameters]
        self._anchors.replace(parameters, ones)
