"""Options that single out layers or modules, checked against what is adapted.

PEFT passes over a layer that a model does not have, and over a pattern that fits nothing, with a
warning at most.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

from clpeft.config import ConfigError, nearest

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

PATTERNS = ("rank_pattern", "alpha_pattern", "lambda_pattern")  # the last is DeLoRA's


def check_layers(model: nn.Module, config: PeftConfig, prefix: str) -> None:
    """Checks that a model has the layers that are to be adapted.

    Args:
        model: The base model.
        config: PEFT's settings of the adapter.
        prefix: What stands before the names of its options in messages.

    Raises:
        ConfigError: If it does not.
    """
    from torch import nn

    stacks = [len(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    depth = max(stacks, default=0)
    for layer in _layers(config):
        if not 0 <= layer < depth:
            raise ConfigError(
                f"{prefix}layers_to_transform names layer {layer}, but {type(model).__name__} has "
                f"{depth} layers, counted from 0."
            )


def check_adapted(adapted: PeftModel, prefix: str) -> None:
    """Checks that whatever layers and patterns name something, they name what is adapted.

    Args:
        adapted: The model with its adapter.
        prefix: What stands before the names of the adapter's options in messages.

    Raises:
        ConfigError: If one of them fits no module that is adapted.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists

    config, base = adapted.peft_config["default"], adapted.get_base_model()
    kind = type(base).__name__
    paths = [path for path, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    for layer in _layers(config):
        alone = copy.copy(config)
        alone.layers_to_transform = [layer]
        if not any(check_target_module_exists(alone, path) for path in paths):
            raise ConfigError(
                f"{prefix}layers_to_transform names layer {layer} of {kind}, in which no module is "
                f"adapted; leave it out, or name some of its modules in peft.target."
            )
    for key in PATTERNS:
        for name in vars(config).get(key) or {}:
            if not any(_fits(config, name, path) for path in paths):
                raise ConfigError(
                    f"{prefix}{key} names '{name}', which no adapted module of {kind} is called."
                    f"{nearest(name, {path.rpartition('.')[2] for path in paths})}"
                )


def _layers(config: PeftConfig) -> list[int]:
    layers = vars(config).get("layers_to_transform")
    return [layers] if isinstance(layers, int) else layers or []


def _fits(config: PeftConfig, pattern: str, path: str) -> bool:
    """As PEFT matches a pattern: to the end of a path, or, for OSF, to any part of it."""
    from peft import PeftType

    if config.peft_type == PeftType.OSF:
        return re.search(pattern, path) is not None
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
