"""P-tuning (Liu et al. 2021): a soft prompt that a small network makes while it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clpeft.config import ConfigError, at_least, between, one_of
from clpeft.peft_methods.base import PEFT_TASK_TYPES, PeftMethodConfig
from clpeft.peft_methods.prompt_learning import learn_prompt
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass
class PTuningSettings(PeftMethodConfig):
    """Settings of P-tuning."""

    num_virtual_tokens: int = at_least(1)  # embeddings that are put before the text
    reparameterization: str = one_of("lstm", "mlp")  # the network that makes them
    encoder_hidden_size: int | None = at_least(1, default=None)  # its width; null: the model's
    encoder_num_layers: int = at_least(1)  # of an LSTM; an MLP has two hidden layers
    encoder_dropout: float = between(0, 1)  # between the layers of an LSTM

    supports_own_models: ClassVar[bool] = False

    def check(self) -> None:
        if self.reparameterization == "mlp":
            if self.encoder_num_layers != 2 or self.encoder_dropout:
                raise ConfigError(
                    f"peft.encoder_num_layers={self.encoder_num_layers} and peft.encoder_dropout="
                    f"{self.encoder_dropout} are settings of an LSTM, but peft.reparameterization="
                    f"mlp always has two hidden layers without dropout; leave them at 2 and 0, or "
                    f"set peft.reparameterization=lstm."
                )
        elif self.encoder_dropout and self.encoder_num_layers == 1:
            raise ConfigError(
                f"peft.encoder_dropout={self.encoder_dropout} acts between an LSTM's layers, but "
                f"peft.encoder_num_layers=1; set it to 2 or more, or the dropout to 0."
            )


@PEFT_METHODS.register("p_tuning", config=PTuningSettings)
def apply_p_tuning(
    model: PreTrainedModel, config: PTuningSettings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model and has it read a soft prompt, which a network makes, before each text.

    What is saved of it is the prompt; the network is needed to learn it only. Else as prompt
    tuning.
    """
    from peft import PromptEncoderConfig, PromptEncoderReparameterizationType

    prompt = PromptEncoderConfig(
        task_type=PEFT_TASK_TYPES[task_type],
        num_virtual_tokens=config.num_virtual_tokens,
        encoder_reparameterization_type=PromptEncoderReparameterizationType(
            config.reparameterization.upper()
        ),
        encoder_hidden_size=config.encoder_hidden_size,
        encoder_num_layers=config.encoder_num_layers,
        encoder_dropout=config.encoder_dropout,
    )
    return learn_prompt(model, prompt, config.kind, new)
