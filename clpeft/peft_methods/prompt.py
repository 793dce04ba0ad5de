"""Prompt tuning (Lester et al. 2021): embeddings before the text's own are all that is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from clpeft.config import ConfigError, at_least, one_of
from clpeft.peft_methods.base import PEFT_TASK_TYPES, PeftMethodConfig
from clpeft.peft_methods.prompt_learning import learn_prompt
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

INITS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}


@dataclass
class PromptSettings(PeftMethodConfig):
    """Settings of prompt tuning."""

    num_virtual_tokens: int = at_least(1)  # embeddings that are learned
    init: str = one_of(*INITS)  # their first values: N(0, 1), of drawn tokens, or of init_text
    init_text: str | None = None  # repeated, or cut, to num_virtual_tokens

    peft_type: ClassVar[str] = "prompt_tuning"
    supports_own_models: ClassVar[bool] = False

    def check(self) -> None:
        check_init(self.init, self.init_text)


def check_init(init: str, text: str | None) -> None:
    """Checks that a text is given where it is what a soft prompt begins as, and only there.

    Raises:
        ConfigError: If not.
    """
    if init == "text" and not text:
        raise ConfigError(
            "peft.init=text needs the text: set peft.init_text, for example "
            "peft.init_text='Classify the text:'."
        )
    if init != "text" and text is not None:
        raise ConfigError(
            f"peft.init_text is set, but peft.init={init} does not read it; set peft.init=text or "
            f"leave the text out."
        )


def init_options(init: str, text: str | None, model: PreTrainedModel) -> dict[str, Any]:
    """How PEFT is told what a soft prompt begins as."""
    options: dict[str, Any] = {"prompt_tuning_init": INITS[init]}
    if init == "text":
        options |= {
            "prompt_tuning_init_text": text,
            "tokenizer_name_or_path": model.name_or_path,
        }
    return options


@PEFT_METHODS.register("prompt", config=PromptSettings)
def apply_prompt(
    model: PreTrainedModel, config: PromptSettings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model and has it read a soft prompt before each text.

    An encoder-decoder's encoder reads it. The head of a classifier trains whole, and so does what
    else of it is new; a BERT pools where its first token stands, which is the prompt's.
    """
    from peft import PromptTuningConfig

    prompt = PromptTuningConfig(
        task_type=PEFT_TASK_TYPES[task_type],
        num_virtual_tokens=config.num_virtual_tokens,
        **init_options(config.init, config.init_text, model),
    )
    return learn_prompt(model, prompt, config.kind, new)
