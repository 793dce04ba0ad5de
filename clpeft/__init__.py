"""Continual learning of language models with parameter-efficient fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from clpeft.loaded import Loaded

__version__ = "0.1.0"


def load(
    folder: str | Path,
    task: int | str | None = None,
    *,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Loads a model that a run has trained, to ask it about new texts.

    Args:
        folder: A run's directory, or what `clpeft export` wrote.
        task: The model as it was after this task, by number (from 1) or name; the last if not
            given; "all" for the adapters of all tasks, between which `use` switches.
        base: The folder of the base model, where it is not where it was when the run was made.
        device: Where to; the accelerator if there is one.
        trust_remote_code: Whether code that comes with the base may be run.

    Raises:
        ConfigError: If there is no such model, or its base is gone or another one; in one sentence.
    """
    from clpeft.loaded import load as loaded  # which imports torch

    return loaded(folder, task, base=base, device=device, trust_remote_code=trust_remote_code)
