"""history.jsonl: one line per log event, there for whoever opens the run directory later."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from clpeft.tracking.base import Observer, RunInfo

FILE_NAME = "history.jsonl"

log = logging.getLogger(__name__)


class HistoryObserver(Observer):
    """Writes every event that carries something as a line of JSON.

    `{"event": "task_start" | "step" | "evaluation" | "task_end" | "error" | "end", "time": unix
    seconds, "step": optimizer steps so far, "task": index or null before the first, ...}`. A step
    has its logs by name; `task_start` has `name` and `steps`; `evaluation` has `trained` and `row`;
    `error` has `exception`; `end` has `exit_code` and, after success, `metrics`. NaN and infinity
    become null, so that every line is JSON as the standard has it.

    Args:
        directory: The run directory.
        resume_at: Bytes to keep of the file that an earlier part of the run left; None starts anew.
    """

    def __init__(self, directory: Path, *, resume_at: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE_NAME
        keep = resume_at or 0
        written = path.read_bytes()[:keep] if path.exists() else b""
        if len(written) < keep:
            log.warning("%s is %d bytes short of its checkpoint.", path, keep - len(written))
        # up to the end of the last whole line
        self._position = written.rfind(b"\n") + 1
        self._file = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(self._position)
        self._file.seek(self._position)
        self._step = 0
        self._task: int | None = None
        self._within = False  # whether a resumed run goes on within a task

    def position(self) -> int:
        """Bytes written so far: what `resume_at` needs to continue from this moment."""
        return self._position

    def _write(self, event: str, **values: Any) -> None:
        line = {"event": event, "time": time.time(), "step": self._step, "task": self._task}
        text = json.dumps(
            _finite({**line, **values}), allow_nan=False, ensure_ascii=False, default=str
        )
        encoded = text.encode() + b"\n"
        self._file.write(encoded)
        self._file.flush()
        self._position += len(encoded)

    def on_run_start(self, info: RunInfo) -> None:
        """See `Observer`."""
        self._step = info.resumed_at_step
        self._within = info.resumed_task_steps > 0
        # until the next one begins; a run that was stopped after its last task begins none
        self._task = info.resumed_at_task - 1 if info.resumed_at_task else None

    def on_task_start(self, index: int, name: str, steps: int) -> None:
        """See `Observer`."""
        self._task = index
        if self._within:  # its start was written before the run was stopped
            self._within = False
            return
        self._write("task_start", name=name, steps=steps)

    def on_step(self, step: int, logs: dict[str, float] | None) -> None:
        """See `Observer`."""
        self._step = step
        if logs is not None:
            self._write("step", **logs)

    def on_evaluation(self, trained: int, row: list[float | None]) -> None:
        """See `Observer`."""
        self._write("evaluation", trained=trained, row=row)

    def on_task_end(self, index: int) -> None:
        """See `Observer`."""
        self._task = index  # a task whose training a strategy skips has no start
        self._write("task_end")

    def on_error(self, error: BaseException) -> None:
        """See `Observer`."""
        self._write("error", exception=f"{type(error).__name__}: {error}".removesuffix(": "))

    def close(self, exit_code: int, results: dict[str, Any] | None) -> None:
        """See `Observer`."""
        if results is None:
            self._write("end", exit_code=exit_code)
        else:
            self._write("end", exit_code=exit_code, metrics=results["metrics"])
        self._file.close()


def read_events(directory: Path) -> list[dict[str, Any]]:
    """The events of a run's history; of a line that a crash cut short nothing is read.

    Args:
        directory: The run directory; without a history there are none.
    """
    path = directory / FILE_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            log.warning("%s has a line that is not JSON, which is passed over.", path)
    return events


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
