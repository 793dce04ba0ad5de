"""LISA-hybrid: a soft prompt and LoRA, trained together and saved as one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from clpeft.config import ConfigError, above, at_least, between, one_of
from clpeft.models.load import check_positions
from clpeft.models.targets import find_targets
from clpeft.peft_methods.base import PEFT_TASK_TYPES, PeftMethodConfig
from clpeft.peft_methods.lora import HEADS
from clpeft.peft_methods.prompt import INITS, check_init, init_options
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass
class LisaHybridSettings(PeftMethodConfig):
    """Settings of a soft prompt and of LoRA."""

    num_virtual_tokens: int = at_least(1)  # embeddings in the soft prompt
    init: str = one_of(*INITS)  # their first values: N(0, 1), of drawn tokens, or of init_text
    init_text: str | None = None  # repeated, or cut, to num_virtual_tokens
    r: int = at_least(1)
    alpha: float = above(0)
    dropout: float = between(0, 1)
    target: Any = MISSING  # auto (query and value), all-linear, or a list of module names

    def check(self) -> None:
        check_init(self.init, self.init_text)
        names = self.target if isinstance(self.target, list) else [self.target]
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"peft.target={self.target} names no modules; set it to auto, all-linear or a list "
                f"of module names such as [q_proj,v_proj]."
            )


@PEFT_METHODS.register("lisa_hybrid", config=LisaHybridSettings)
def apply_lisa_hybrid(
    model: PreTrainedModel, config: LisaHybridSettings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model, puts LoRA on its target modules, and has it read a soft prompt.

    An encoder-decoder's encoder reads the prompt. The head of a classifier trains whole, and so
    does what else of it is new.

    Raises:
        ConfigError: If no module of the model matches `config.target`.
    """
    from peft import get_peft_model
    from transformers.pytorch_utils import Conv1D

    from clpeft.tuners import LisaHybridConfig

    new = [path for path in new if not HEADS & set(path.split("."))]
    hybrid = LisaHybridConfig(
        task_type=PEFT_TASK_TYPES[task_type],
        num_virtual_tokens=config.num_virtual_tokens,
        **init_options(config.init, config.init_text, model),
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=find_targets(model, config.target),
        modules_to_save=list(new) or None,
        exclude_modules=list(new) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    adapted = get_peft_model(model, hybrid)
    check_positions(adapted, 1)
    return adapted
