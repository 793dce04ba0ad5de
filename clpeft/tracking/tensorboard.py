"""TensorBoard event files in the run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpeft.config import ConfigError
from clpeft.evaluation.matrix import figure_pixels, matrix_heatmap
from clpeft.tracking.base import Observer, RunInfo

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorboardObserver(Observer):
    """Writes to `<run_dir>/tensorboard`: look with `tensorboard --logdir <run_dir>`.

    `train/*` over optimizer steps, `eval/<task>` over trained tasks, the config as text, and in the
    end `metrics/<name>` and the matrix as a picture.

    Args:
        directory: The run directory.

    Raises:
        ConfigError: The package tensorboard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tracking.tensorboard=true needs the package tensorboard, which is not installed; "
                "install it with `pip install 'clpeft[tensorboard]'`, or set "
                "tracking.tensorboard=false."
            ) from error
        self._directory = directory / "tensorboard"
        self._writer_class = SummaryWriter
        self._writer: SummaryWriter | None = None
        self._tasks: tuple[str, ...] = ()

    def on_run_start(self, info: RunInfo) -> None:
        """See `Observer`."""
        self._tasks = info.tasks
        self._writer = self._writer_class(
            str(self._directory),
            # steps after the checkpoint that an interrupted run had already written come again
            purge_step=info.resumed_at_step + 1 if info.resumed_at_step else None,
        )
        config = json.dumps(info.config, indent=2, default=str)
        self._writer.add_text("config", "    " + config.replace("\n", "\n    "))  # as a code block

    def on_step(self, step: int, logs: dict[str, float] | None) -> None:
        """See `Observer`."""
        if logs is None or self._writer is None:
            return
        for name, value in logs.items():
            self._writer.add_scalar(name, value, step)

    def on_evaluation(self, trained: int, row: list[float | None]) -> None:
        """See `Observer`."""
        if self._writer is None:
            return
        for name, score in zip(self._tasks, row, strict=True):
            if score is not None:
                self._writer.add_scalar(f"eval/{name}", score, trained)
        self._writer.flush()

    def close(self, exit_code: int, results: dict[str, Any] | None) -> None:
        """See `Observer`."""
        if self._writer is None:
            return
        if results is not None:
            for name, value in results["metrics"].items():
                self._writer.add_scalar(f"metrics/{name}", value, len(self._tasks))
            picture = matrix_heatmap(results["matrix"], results["tasks"])
            self._writer.add_image(
                "matrix", figure_pixels(picture), len(self._tasks), dataformats="HWC"
            )
        self._writer.close()
