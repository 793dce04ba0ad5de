"""LoRA (Hu et al. 2021): ΔW = s·B·A beside frozen weights, s = α/r (or α/√r, rsLoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from clpeft.config import ConfigError, above, at_least, between, one_of
from clpeft.models.targets import find_targets
from clpeft.peft_methods.base import PEFT_TASK_TYPES, PeftMethodConfig
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

HEADS = {"classifier", "score"}  # what PEFT itself trains whole


@dataclass
class LoraSettings(PeftMethodConfig):
    """Settings of LoRA."""

    r: int = at_least(1)
    alpha: float = above(0)
    dropout: float = between(0, 1)
    target: Any = MISSING  # auto (query and value), all-linear, or a list of module names
    bias: str = one_of("none", "all", "lora_only")
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None  # trained whole, beside the task head

    def check(self) -> None:
        names = self.target if isinstance(self.target, list) else [self.target]
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"peft.target={self.target} names no modules; set it to auto, all-linear or a list "
                f"of module names such as [q_proj,v_proj]."
            )


@PEFT_METHODS.register("lora", config=LoraSettings)
def apply_lora(
    model: PreTrainedModel, config: LoraSettings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model and puts LoRA on its target modules.

    The head of a classifier trains whole, as PEFT does for that task type, and so does what else
    of it is new.

    Raises:
        ConfigError: If no module of the model matches `config.target`.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    new = [path for path in new if not HEADS & set(path.split("."))]
    return get_peft_model(
        model,
        LoraConfig(
            task_type=PEFT_TASK_TYPES[task_type],
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=find_targets(model, config.target),
            bias=config.bias,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            modules_to_save=[*(config.modules_to_save or []), *new] or None,
            exclude_modules=new or None,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        ),
    )
