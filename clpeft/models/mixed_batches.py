"""Batches whose rows go through different adapters: `model(**inputs, adapter_names=[...])`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from clpeft.config import ConfigError
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftModel

# what PEFT passes the rows of several adapters through, of modules that train whole
WHOLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def refuse_mixed_batches(model: PeftModel, method: str) -> None:
    """Has a model raise where it is given `adapter_names` that PEFT would pass over or stumble on.

    Most methods of PEFT pass over the names without a word, and answer every row with the active
    adapter. Where PEFT raises in the middle of a forward pass, it leaves its hooks behind, and the
    names hold for later calls.

    Args:
        model: With its adapters; from here on its `forward` and `generate` raise ConfigError.
        method: What the adapters' method is called.
    """
    if (reason := _reason(model, method)) is None:
        return
    refusal = (
        f"adapter_names does not work with this model: {reason}; run the rows of each adapter "
        f"in a batch of their own, after use(<task>) or set_adapter."
    )

    def check(given: dict[str, Any]) -> None:
        if given.get("adapter_names") is not None:
            raise ConfigError(refusal)

    generate = model.generate

    @functools.wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(kwargs)
        return generate(*args, **kwargs)

    model.register_forward_pre_hook(lambda _, args, kwargs: check(kwargs), with_kwargs=True)
    model.generate = checked


def _reason(model: PeftModel, method: str) -> str | None:
    """Why a batch cannot be of several adapters, as a part of a sentence; None if it can."""
    settings: Any = PEFT_METHODS[method].config if method in PEFT_METHODS else None
    if settings is None or not settings.supports_mixed_batches:
        return f"with peft={method} every row would be answered by one and the same adapter"
    if any(config.use_dora for config in model.peft_config.values()):
        return "PEFT runs DoRA (peft.use_dora=true) for one adapter at a time"
    if any(config.bias != "none" for config in model.peft_config.values()):
        return "the base has the biases (peft.bias) of one adapter at a time"
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            whole = module.original_module
            if not isinstance(whole, WHOLE):
                return (
                    f"{path.rpartition('.')[2]}, which trains whole, is a {type(whole).__name__}, "
                    f"which PEFT runs for one adapter at a time"
                )
    return None
