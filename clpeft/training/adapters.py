"""The adapter of each task, written in PEFT's own format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clpeft.streams.tokenize import EncodedTask
    from clpeft.training.run import Run


def save_adapter(run: Run, task: EncodedTask, directory: Path) -> None:
    """Writes `adapters/<k>_<task>/`, what `PeftModel.from_pretrained` loads on the base model.

    With `peft=full` there is no adapter and nothing is written: a whole model per task would fill
    the disk, and the checkpoints hold the last one.

    Args:
        run: The run.
        task: The task just trained.
        directory: The run directory.
    """
    from peft import PeftModel

    if not isinstance(run.model, PeftModel) or not run.accelerator.is_main_process:
        return
    folder = directory / "adapters" / f"{task.index + 1}_{task.name}"
    for strategy in run.strategies:
        if strategy.save_adapter(run, task, folder):
            return
    # PEFT's model card takes ten times as long as the weights, and config.yaml says more
    run.model.create_or_update_model_card = _no_card
    run.model.save_pretrained(folder)


def _no_card(folder: str) -> None:
    pass
