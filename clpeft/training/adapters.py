"""The adapter of each task, written in PEFT's own format."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpeft.models.adapted import WEIGHTS

if TYPE_CHECKING:
    from clpeft.streams.encoded import EncodedTask
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
    whole = directory / "adapters" / f"{task.index + 1}_{task.name}"
    folder = whole.with_name(f".{whole.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    with run.eval_mode():  # a network that makes a prompt is asked for it, and may have dropout
        _save(run, task, folder)
    shutil.rmtree(whole, ignore_errors=True)
    folder.rename(whole)


def saved_bytes(directory: Path) -> int | None:
    """What the tensors of the latest adapter take that a run has written.

    Args:
        directory: The run directory.

    Returns:
        Bytes, without the file's header; None where no adapter was written.
    """
    folders = (directory / "adapters").glob("[0-9]*_*")
    latest = max(folders, key=lambda folder: int(folder.name.partition("_")[0]), default=None)
    if latest is None:
        return None
    file = latest / WEIGHTS[0]
    with file.open("rb") as content:  # safetensors: the header's length, the header, the tensors
        header = int.from_bytes(content.read(8), "little")
    return file.stat().st_size - 8 - header


def _save(run: Run, task: EncodedTask, folder: Path) -> None:
    for strategy in run.acting:
        if strategy.save_adapter(run, task, folder):
            return
    model: Any = run.model
    # PEFT's model card takes ten times as long as the weights, and config.yaml says more
    model.create_or_update_model_card = _no_card
    with warnings.catch_warnings():
        # AdaLoRA may leave a module no rank, which PEFT takes for a shard that was not gathered
        warnings.filterwarnings("ignore", message=".* LoRA tensor.* have invalid shape")
        model.save_pretrained(folder)


def _no_card(folder: str) -> None:
    pass
