"""Frozen: the head of a classifier trains, and nothing beneath it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clpeft.peft_methods.base import PeftMethodConfig
from clpeft.peft_methods.wrap import wrap
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass
class FrozenConfig(PeftMethodConfig):
    """Settings of training a head alone: none."""

    task_types: ClassVar[frozenset[str]] = frozenset({"sequence_classification"})
    peft_type: ClassVar[str] = "lora"
    task_types_reason: ClassVar[str | None] = "a language model has no head that is new to train"


@PEFT_METHODS.register("frozen", config=FrozenConfig)
def apply_frozen(
    model: PreTrainedModel, config: FrozenConfig, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model but for its head and what else of it is new.

    It is a LoRA of PEFT's on no module at all, so that a head is saved, loaded and switched as any
    adapter is, by PEFT alone.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return wrap(model, LoraConfig, task_type, new, target_modules=DUMMY_TARGET_MODULES)
