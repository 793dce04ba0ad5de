"""The types of adapters that are not PEFT's own, made known to it."""

from __future__ import annotations

from clpeft.registry import PEFT_METHODS


def register_types() -> None:
    """Lets PEFT know the types of adapters that are not its own: clpeft's and third parties'."""
    import clpeft.tuners  # noqa: F401

    PEFT_METHODS.discover()
