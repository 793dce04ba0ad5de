"""LISA-hybrid: a soft prompt and LoRA, trained together and saved as one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from clpeft.config import above, at_least, between, one_of
from clpeft.models.load import check_positions
from clpeft.models.targets import check_target
from clpeft.peft_methods.base import PeftMethodConfig
from clpeft.peft_methods.prompt import INITS, check_init, init_options
from clpeft.peft_methods.prompt_learning import check_reads
from clpeft.peft_methods.wrap import wrap
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
    target: Any = MISSING  # minimal, attention, all-linear, or a list of module names

    supports_own_models: ClassVar[bool] = False

    def check(self) -> None:
        check_init(self.init, self.init_text)
        check_target(self.target)


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
    from clpeft.tuners import LisaHybridConfig

    adapted = wrap(
        model,
        LisaHybridConfig,
        task_type,
        new,
        target=config.target,
        num_virtual_tokens=config.num_virtual_tokens,
        **init_options(config.init, config.init_text, model),
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
    )
    check_positions(adapted, 1)
    check_reads(adapted, config.kind)
    return adapted
