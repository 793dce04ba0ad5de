"""Plain sequential fine-tuning: one adapter trained on, with nothing against forgetting."""

from __future__ import annotations

from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Strategy, StrategyConfig


@STRATEGIES.register("finetune", config=StrategyConfig)
class Finetune(Strategy):
    """One adapter trained on task after task; the baseline that every method has to beat.

    Source: often called SeqFT; tune its learning rate before comparing with it (MIGU, Du et al.
        2024, table 9: 28.5 becomes 75.7).
    """

    supports_multi_process = True
    is_reference = True
