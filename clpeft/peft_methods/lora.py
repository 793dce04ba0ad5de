"""LoRA (Hu et al. 2021): ΔW = s·B·A beside frozen weights, s = α/r (or α/√r, rsLoRA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from clpeft.config import ConfigError, above, at_least, between, one_of
from clpeft.models.targets import check_target
from clpeft.peft_methods.base import PeftMethodConfig
from clpeft.peft_methods.wrap import wrap
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass
class LoraSettings(PeftMethodConfig):
    """Settings of LoRA."""

    r: int = at_least(1)
    alpha: float = above(0)
    dropout: float = between(0, 1)
    target: Any = MISSING  # minimal, attention, all-linear, or a list of module names
    rank_pattern: Any = None  # other ranks by the ends of modules' paths: {v_proj: 16}
    alpha_pattern: Any = None  # other alphas, likewise
    layers_to_transform: list[int] | None = None  # only those, counted from 0; null: all
    bias: str = one_of("none", "all", "lora_only")
    use_rslora: bool = False
    use_dora: bool = False
    # those that leave the base as it is: default (A as nn.Linear has it and B = 0), gaussian
    # (A ~ N(0, 1/r²) and B = 0) and orthogonal (A and B random with B·A = 0)
    init_lora_weights: str = one_of("default", "gaussian", "orthogonal")
    modules_to_save: list[str] | None = None  # trained whole, beside the task head

    supports_mixed_batches: ClassVar[bool] = True

    @property
    def trained_whole(self) -> list[str]:
        return self.modules_to_save or []

    @property
    def trains_biases(self) -> bool:
        return self.bias != "none"

    def check(self) -> None:
        check_target(self.target)
        _check_pattern("rank_pattern", self.rank_pattern, {int: "whole numbers"})
        _check_pattern("alpha_pattern", self.alpha_pattern, {int: "numbers", float: "numbers"})
        ranks = [self.r, *(self.rank_pattern or {}).values()]
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ConfigError(
                f"peft.init_lora_weights=orthogonal needs even ranks, and there is one of "
                f"{next(rank for rank in ranks if rank % 2)} (in peft.r or peft.rank_pattern)."
            )


@PEFT_METHODS.register("lora", config=LoraSettings)
def apply_lora(
    model: PreTrainedModel, config: LoraSettings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model and puts LoRA on its target modules.

    Raises:
        ConfigError: If no module of the model matches `config.target` or what else names modules
            or layers.
    """
    from peft import LoraConfig

    return wrap(
        model,
        LoraConfig,
        task_type,
        new,
        target=config.target,
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
        layers_to_transform=config.layers_to_transform,
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights == "default" or config.init_lora_weights,
        modules_to_save=config.modules_to_save,
    )


def _check_pattern(name: str, pattern: Any, kinds: Mapping[type, str]) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, dict) or not all(
        type(value) in kinds and value > 0 for value in pattern.values()
    ):
        raise ConfigError(
            f"peft.{name}={pattern} must map ends of modules' paths to {kinds[int]} above 0, as in "
            f"peft.{name}={{v_proj: 16}}."
        )
