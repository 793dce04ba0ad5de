"""The second, smaller contract: observers watch training and never change it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """What an observer may know about a run when it starts."""

    directory: Path
    name: str  # "<strategy>-s<seed>-<digest>"
    group: str  # the run without its seed
    config: dict[str, Any]  # resolved, plain values
    tasks: tuple[str, ...]
    stream: str
    strategies: tuple[str, ...]
    seed: int
    total_parameters: int
    trainable_parameters: int
    resumed_at_step: int = 0  # optimizer steps already done
    resumed_at_task: int = 0  # index of the task to go on with
    resumed_task_steps: int = 0  # optimizer steps of that task already done
    resumed: bool = False  # whether it goes on from a checkpoint


class Observer:
    """Watches a run. Every hook is a no-op; none may draw random numbers or touch gradients."""

    def on_run_start(self, info: RunInfo) -> None:
        """The run is set up and about to train.

        Args:
            info: What it is.
        """

    def on_task_start(self, index: int, name: str, steps: int) -> None:
        """A task begins, or goes on after a resume.

        Args:
            index: Of the task, from 0.
            name: Of the task.
            steps: Optimizer steps of the whole task, those before a resume included.
        """

    def on_step(self, step: int, logs: dict[str, float] | None) -> None:
        """An optimizer step was made.

        Args:
            step: Steps made so far in the whole run, from 1.
            logs: What to record, at logging steps; None at all others, where nothing may be spent.
        """

    def on_evaluation(self, trained: int, row: list[float | None]) -> None:
        """A row of the matrix is known.

        Args:
            trained: Tasks trained so far; the row's number.
            row: Scores by task, fractions; None where not evaluated.
        """

    def on_task_end(self, index: int) -> None:
        """A task was trained, and its strategies' `after_task` has run.

        Args:
            index: Of the task, from 0.
        """

    def on_error(self, error: BaseException) -> None:
        """The run failed or was interrupted; `close` follows.

        Args:
            error: What was raised.
        """

    def close(self, exit_code: int, results: dict[str, Any] | None) -> None:
        """The run is over. Always called, last, once.

        Args:
            exit_code: 0 if it completed.
            results: The content of results.json; None if it did not complete.
        """


class Observers(Observer):
    """Several observers as one. One that raises is named, warned about once and not asked again.

    Only `Exception` is caught: an interrupt passes through. A disabled observer is still closed, so
    that it lets go of its files and processes.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._all = tuple(observers)
        self._active = list(observers)

    def _disable(self, observer: Observer, hook: str) -> None:
        self._active = [other for other in self._active if other is not observer]
        log.warning(
            "%s failed in %s and is switched off; training goes on.",
            type(observer).__name__,
            hook,
            exc_info=True,
        )

    def _forward(self, hook: str, call: Callable[[Observer], None]) -> None:
        for observer in self._active:
            try:
                call(observer)
            except Exception:
                self._disable(observer, hook)

    def on_run_start(self, info: RunInfo) -> None:
        """See `Observer`."""
        self._forward("on_run_start", lambda observer: observer.on_run_start(info))

    def on_task_start(self, index: int, name: str, steps: int) -> None:
        """See `Observer`."""
        self._forward("on_task_start", lambda observer: observer.on_task_start(index, name, steps))

    def on_step(self, step: int, logs: dict[str, float] | None) -> None:
        """See `Observer`."""
        # spelled out rather than forwarded: this runs at every step
        for observer in self._active:
            try:
                observer.on_step(step, logs)
            except Exception:
                self._disable(observer, "on_step")

    def on_evaluation(self, trained: int, row: list[float | None]) -> None:
        """See `Observer`."""
        self._forward("on_evaluation", lambda observer: observer.on_evaluation(trained, row))

    def on_task_end(self, index: int) -> None:
        """See `Observer`."""
        self._forward("on_task_end", lambda observer: observer.on_task_end(index))

    def on_error(self, error: BaseException) -> None:
        """See `Observer`."""
        self._forward("on_error", lambda observer: observer.on_error(error))

    def close(self, exit_code: int, results: dict[str, Any] | None) -> None:
        """See `Observer`. Last opened, first closed; the disabled ones too."""
        self._active = list(reversed(self._all))
        self._forward("close", lambda observer: observer.close(exit_code, results))
        self._active = []
