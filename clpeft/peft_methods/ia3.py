"""IA³ (Liu et al. 2022): learned scales on keys, values and feed-forward layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from clpeft.config import ConfigError
from clpeft.peft_methods.base import PeftMethodConfig
from clpeft.peft_methods.wrap import wrap
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The projections whose outputs are scaled, by the names that architectures give them; fused ones
# where there is nothing else. First match wins.
KEY_AND_VALUE = (
    ("k_proj", "v_proj"),  # Llama, Mistral, Mixtral, Qwen, Gemma, Phi, OPT, GPT-J, BART
    ("key", "value"),  # BERT, RoBERTa
    ("key_proj", "value_proj"),  # DeBERTa-v2
    ("k_lin", "v_lin"),  # DistilBERT
    ("k", "v"),  # T5
    ("query_key_value",),  # GPT-NeoX/Pythia, BLOOM, Falcon
    ("qkv_proj",),  # Phi-3
    ("c_attn",),  # GPT-2
    ("Wqkv",),  # MPT
    ("in_proj",),  # DeBERTa
)
# The second linear layer of a feed-forward block, whose input is scaled. The names of some are also
# those of a projection within the attention block.
FEED_FORWARD = (
    "down_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3, MPT
    "wo",  # T5
    "fc2",  # Phi, OPT, BART
    "fc_out",  # GPT-J
    "dense_4h_to_h",  # GPT-NeoX/Pythia, BLOOM, Falcon
    "lin2",  # DistilBERT
    "c_proj",  # GPT-2
    "output.dense",  # BERT, RoBERTa, DeBERTa
)
OUTSIDE_ATTENTION = r"(?!.*[aA]tt)"  # at the beginning of a pattern for a path


@dataclass
class IA3Settings(PeftMethodConfig):
    """Settings of IA³."""

    target: Any = MISSING  # auto (keys, values and feed-forward layers), or a list of module names
    # which of those a list names are feed-forward layers, whose input is scaled
    feedforward: list[str] | None = None
    modules_to_save: list[str] | None = None  # trained whole, beside the task head

    @property
    def trained_whole(self) -> list[str]:
        return self.modules_to_save or []

    def check(self) -> None:
        if self.target == "auto":
            if self.feedforward is not None:
                raise ConfigError(
                    f"peft.feedforward={self.feedforward} goes with a peft.target that lists "
                    f"modules; with peft.target=auto both are found."
                )
            return
        names = self.target
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"peft.target={self.target} is nothing that IA³ goes on; set it to auto or a list "
                f"of module names such as [k_proj,v_proj,down_proj]."
            )
        if not self.feedforward or not set(self.feedforward) <= set(names):
            raise ConfigError(
                f"peft.feedforward={self.feedforward} must name those of peft.target={names} that "
                f"are feed-forward layers, at least one, such as [down_proj]."
            )


@PEFT_METHODS.register("ia3", config=IA3Settings)
def apply_ia3(
    model: PreTrainedModel, config: IA3Settings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model and puts IA³ on its target modules.

    Raises:
        ConfigError: If the model lacks what is to be scaled.
    """
    from peft import IA3Config

    modules: dict[str, Any]
    if config.target == "auto":
        attention, forward = find_scaled(model)
        modules = {"target_modules": f"{attention}|{forward}", "feedforward_modules": forward}
    else:
        modules = {"target": config.target, "feedforward_modules": config.feedforward}
    whole = config.modules_to_save
    return wrap(model, IA3Config, task_type, new, modules_to_save=whole, **modules)


def find_scaled(model: PreTrainedModel) -> tuple[str, str]:
    """Patterns for the whole paths of what IA³ scales: keys and values, feed-forward layers.

    Raises:
        ConfigError: If the model has neither by a name that is known.
    """
    paths = [path for path, _ in model.named_modules()]

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, path) for path in paths)

    attention = [
        rf"(.*\.)?({'|'.join(names)})"
        for names in KEY_AND_VALUE
        if all(has(rf"(.*\.)?{name}") for name in names)
    ]
    forward = [rf"{OUTSIDE_ATTENTION}(.*\.)?{re.escape(name)}" for name in FEED_FORWARD]
    forward = [pattern for pattern in forward if has(pattern)]
    if not attention or not forward:
        lacking = "key and value projections" if not attention else "feed-forward layers"
        raise ConfigError(
            f"peft.target=auto knows no {lacking} of {type(model).__name__}; name what IA³ is to "
            f"scale, as in peft.target=[k_proj,v_proj,down_proj] peft.feedforward=[down_proj]."
        )
    return attention[0], forward[0]
