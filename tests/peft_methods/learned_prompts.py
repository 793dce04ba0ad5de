"""The methods that learn prompts, as their tests have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from clpeft.peft_methods.lisa_hybrid import LisaHybridSettings
from clpeft.peft_methods.p_tuning import PTuningSettings
from clpeft.peft_methods.prefix import PrefixSettings
from clpeft.peft_methods.prompt import PromptSettings

VIRTUAL = 4

SETTINGS: dict[str, Any] = {
    "prompt": PromptSettings("prompt", VIRTUAL, "vocabulary"),
    "p_tuning:mlp": PTuningSettings("p_tuning", VIRTUAL, "mlp", 8, 2, 0.0),
    "p_tuning:lstm": PTuningSettings("p_tuning", VIRTUAL, "lstm", 8, 2, 0.0),
    "prefix": PrefixSettings("prefix", VIRTUAL, projection=False),
    "prefix:projection": PrefixSettings("prefix", VIRTUAL, projection=True, encoder_hidden_size=8),
    "lisa_hybrid": LisaHybridSettings(
        "lisa_hybrid", VIRTUAL, "vocabulary", None, r=2, alpha=4, dropout=0.0, target="all-linear"
    ),
}
METHODS = list(SETTINGS)


def settings(method: str) -> Any:
    """The settings of one of `METHODS`."""
    return SETTINGS[method]


def moved(model: Any) -> Any:
    """The model with an adapter away from its start, where LoRA's B is 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


# the same on the command line, each with a rate at which a tiny model learns
OVERRIDES = {
    "prompt": ("peft=prompt", "optimizer.lr=0.1"),
    "p_tuning:mlp": ("peft=p_tuning", "peft.reparameterization=mlp", "optimizer.lr=1e-2"),
    "p_tuning:lstm": ("peft=p_tuning", "peft.encoder_dropout=0.1", "optimizer.lr=1e-2"),
    "prefix": ("peft=prefix", "optimizer.lr=0.1"),
    "prefix:projection": ("peft=prefix", "peft.projection=true", "optimizer.lr=1e-2"),
    "lisa_hybrid": ("peft=lisa_hybrid", "peft.dropout=0.1", "optimizer.lr=1e-2"),
}


def overridden(given: Iterable[str], method: str, *more: str) -> list[str]:
    """The overrides of a tiny run, with one of `METHODS` for LoRA."""
    kept = [override for override in given if not override.startswith("peft.")]
    return [*kept, *OVERRIDES[method], f"peft.num_virtual_tokens={VIRTUAL}", *more]
