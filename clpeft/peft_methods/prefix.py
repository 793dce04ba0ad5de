"""Prefix tuning (Li & Liang 2021): keys and values that every layer reads before the text's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clpeft.config import ConfigError, at_least
from clpeft.peft_methods.base import PEFT_TASK_TYPES, PeftMethodConfig
from clpeft.peft_methods.prompt_learning import learn_prompt
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass
class PrefixSettings(PeftMethodConfig):
    """Settings of prefix tuning."""

    num_virtual_tokens: int = at_least(1)  # keys and values per layer that are learned
    projection: bool = False  # they come of an MLP's, which is learned instead
    encoder_hidden_size: int | None = at_least(1, default=None)  # its width; null: the model's

    peft_type: ClassVar[str] = "prefix_tuning"
    supports_gradient_checkpointing: ClassVar[bool] = False
    gradient_checkpointing_reason: ClassVar[str] = (
        "its keys and values are put into a cache, which recomputing does without"
    )
    supports_own_models: ClassVar[bool] = False

    def check(self) -> None:
        if self.encoder_hidden_size is not None and not self.projection:
            raise ConfigError(
                f"peft.encoder_hidden_size={self.encoder_hidden_size} is the width of the MLP that "
                f"peft.projection=true has; set that, or leave the width out."
            )


@PEFT_METHODS.register("prefix", config=PrefixSettings)
def apply_prefix(
    model: PreTrainedModel, config: PrefixSettings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model and has each of its layers read learned keys and values before the text's.

    An encoder-decoder has them in its decoder's self-attention alone, as PEFT does it; the paper
    has others in the encoder and in the attention from one to the other. What a projection makes
    is saved, and not the projection. The head of a classifier trains whole, and so does what else
    of it is new.
    """
    from peft import PrefixTuningConfig

    prefix = PrefixTuningConfig(
        task_type=PEFT_TASK_TYPES[task_type],
        num_virtual_tokens=config.num_virtual_tokens,
        prefix_projection=config.projection,
        encoder_hidden_size=config.encoder_hidden_size,
    )
    return learn_prompt(model, prefix, config.kind, new)
