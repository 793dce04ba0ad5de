"""Optimizer and learning-rate schedule of one task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR

from clpeft.config import OptimizerConfig, SchedulerConfig

EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")  # bitsandbytes'


def make_optimizer(
    config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of one task, over the parameters that train."""
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    betas = (config.betas[0], config.betas[1])
    return _kind(config.name)(
        parameters, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay
    )


def _kind(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class of an optimizer with two moments."""
    if name not in EIGHT_BIT:
        return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[name]


def make_schedule(
    config: SchedulerConfig, optimizer: torch.optim.Optimizer, steps: int
) -> LambdaLR:
    """The learning rate's course over one task.

    Args:
        config: Its form and the share of steps that it rises over.
        optimizer: Whose rate it sets.
        steps: Optimizer steps of the task.
    """
    return LambdaLR(optimizer, learning_rate_factor(config, steps))


def learning_rate_factor(config: SchedulerConfig, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step, 0 to 1.

    Over the first `warmup_ratio` of the steps it rises linearly, the first step taking
    1/warmup steps of the rate; then it stays, falls linearly or along a half cosine, to 0 after
    the last step.
    """
    warmup = round(config.warmup_ratio * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.name == "constant":
            return 1.0
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        if config.name == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
