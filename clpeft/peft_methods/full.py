"""Full fine-tuning: no adapter, every parameter trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clpeft.peft_methods.base import PeftMethodConfig
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class FullConfig(PeftMethodConfig):
    """Settings of full fine-tuning: none."""

    supports_quantized: ClassVar[bool] = False
    quantized_reason: ClassVar[str] = "trains the base's own weights in floating point"


@PEFT_METHODS.register("full", config=FullConfig)
def apply_full(
    model: PreTrainedModel, config: FullConfig, task_type: str, new: Sequence[str]
) -> PreTrainedModel:
    """Leaves the model as it is, with every parameter trainable."""
    return model.requires_grad_(True)
