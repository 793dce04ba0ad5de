"""Batches of types of adapters whose forward pass goes through one and the same for all rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


def one_adapter(what: str, given: dict[str, Any]) -> AbstractContextManager[None]:
    """What PEFT enters for a forward pass of such a type.

    Args:
        what: The type, as the beginning of a sentence.
        given: What the model is called with, by name.

    Raises:
        ValueError: If the rows are to go through adapters of their own.
    """
    if given.get("adapter_names") is not None:
        raise ValueError(
            f"{what} takes no adapter_names, since all rows of a batch go through the active "
            f"adapter; run the rows of each in a batch of their own, after set_adapter."
        )
    return nullcontext()
