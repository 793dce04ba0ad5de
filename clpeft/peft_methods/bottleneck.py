"""Bottleneck adapters (Houlsby et al. 2019): small networks behind the sub-layers of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from clpeft.config import ConfigError, above, at_least, between, one_of
from clpeft.models.sublayers import find_sublayers
from clpeft.models.targets import find_targets
from clpeft.peft_methods.base import PeftMethodConfig
from clpeft.peft_methods.wrap import wrap
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


@dataclass
class BottleneckSettings(PeftMethodConfig):
    """Settings of bottleneck adapters."""

    placement: str = one_of("houlsby", "pfeiffer")
    bottleneck: int | None = at_least(1, default=None)  # its width; goes before reduction_factor
    reduction_factor: float = above(0)  # by how much it is narrower than the model
    activation: str = one_of("gelu", "relu", "silu", "tanh")
    dropout: float = between(0, 1)  # of what an adapter adds
    scaling: float = above(0)  # what that is multiplied by
    target: Any = MISSING  # auto (by placement), or a list of module names
    modules_to_save: list[str] | None = None  # trained whole, beside the task head

    @property
    def trained_whole(self) -> list[str]:
        return self.modules_to_save or []

    def check(self) -> None:
        listed = isinstance(self.target, list) and self.target
        if self.target != "auto" and not (listed and all(isinstance(n, str) for n in self.target)):
            raise ConfigError(
                f"peft.target={self.target} names no modules; set it to auto (peft.placement then "
                f"decides) or a list of module names such as [o_proj,down_proj]."
            )


@PEFT_METHODS.register("bottleneck", config=BottleneckSettings)
def apply_bottleneck(
    model: PreTrainedModel, config: BottleneckSettings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model and puts an adapter behind each of its target modules.

    The head of a classifier trains whole, as PEFT does for that task type, and so does what else
    of it is new.

    Raises:
        ConfigError: If no module of the model matches `config.target`.

    Source: Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP; Pfeiffer et al.
        2021, AdapterFusion: Non-Destructive Task Composition for Transfer Learning.
    """
    from clpeft.tuners import BottleneckConfig

    return wrap(
        model,
        BottleneckConfig,
        task_type,
        new,
        target_modules=_targets(model, config),
        modules_to_save=config.modules_to_save,
        width=config.bottleneck,
        reduction_factor=config.reduction_factor,
        activation=config.activation,
        dropout=config.dropout,
        scaling=config.scaling,
    )


def _targets(model: nn.Module, config: BottleneckSettings) -> list[str]:
    """Paths of the modules behind which an adapter goes."""
    if config.target == "auto":
        return find_sublayers(model, config.placement)
    names = find_targets(model, config.target)
    ends = tuple(f".{name}" for name in names)
    return [path for path, _ in model.named_modules() if path in names or path.endswith(ends)]
