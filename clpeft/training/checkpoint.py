"""Checkpoints: all that training changed, never the frozen base; when they are due, and which."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.config import CheckpointConfig, ConfigError, differences
from clpeft.training.randomness import random_states
from clpeft.training.state import StateError, read_plain, read_state, write_state

if TYPE_CHECKING:
    from clpeft.training.loop import Loop
    from clpeft.training.run import Run

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run directory, `checkpoints/step-<n>-task-<t>/`.

    Args:
        directory: The run directory.
        config: Whether any are written, how often within tasks, and how many of the newest stay.
        settings: The part of the run's config that can change its result, flat. A checkpoint that
            was taken with another is refused.

    Attributes:
        history_position: Gives the length of history.jsonl in bytes, so that a resumed run
            continues the file where the checkpoint was taken.
    """

    def __init__(
        self, directory: Path, config: CheckpointConfig, settings: Mapping[str, str]
    ) -> None:
        self.folder = directory / "checkpoints"
        self.config = config
        self.settings = dict(settings)
        self.history_position: Callable[[], int] = lambda: 0
        self._last = time.monotonic()  # a clock that never jumps

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after a step within a task."""
        if not self.config.enabled:
            return False
        every, minutes = self.config.every_steps, self.config.every_minutes
        if every is not None and step % every == 0:
            return True
        return minutes is not None and time.monotonic() - self._last >= 60 * minutes

    def save(self, loop: Loop) -> bool:
        """Saves where a run stands; every process must call it.

        A disk that is full is told and training goes on, because what was saved before stands.

        Returns:
            Whether the state is on disk now.
        """
        if not self.config.enabled:
            return False
        run = loop.run
        state = {
            "settings": self.settings,
            "history": self.history_position(),
            **captured(loop),
        }
        self._last = time.monotonic()
        if not run.accelerator.is_main_process:
            return True
        folder = self.folder / f"step-{run.step}-task-{run.tasks_seen}"
        try:
            write_state(folder, state)
        except OSError as error:
            log.error(
                "the checkpoint %s could not be written (%s); training goes on, and the one before "
                "it stands",
                folder.name,
                error,
            )
            return False
        for old in self._folders()[: -self.config.keep]:
            shutil.rmtree(old, ignore_errors=True)  # what a network file system still holds
        return True

    def tidy(self) -> None:
        """Clears up after a process that was killed while it wrote; for one process only."""
        for unfinished in self.folder.glob(".step-*.part"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for replaced in self.folder.glob(".step-*.old"):
            folder = self.folder / replaced.name.removeprefix(".").removesuffix(".old")
            if folder.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:  # what should have taken its place did not
                replaced.rename(folder)

    def newest(
        self, agreed: Callable[[str | None], str | None] = lambda name: name
    ) -> dict[str, Any] | None:
        """The state of the newest checkpoint that is whole; a broken one is named and passed by.

        Args:
            agreed: Of several processes, what the main one has: all go on from the same.

        Raises:
            ConfigError: If it was taken with other settings.
            StateError: If this process cannot read what the main one could.
        """
        found = self._newest()
        mine = None if found is None else found[0].name
        chosen = agreed(mine)
        if chosen is None:
            return None
        return found[1] if found and chosen == mine else read_state(self.folder / chosen)

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        folders = self._folders()
        for folder in reversed(folders):
            try:
                state = read_state(folder)
            except StateError as error:
                first = folder == folders[0]
                rest = "there is none before it" if first else "the checkpoint before it is used"
                log.warning("%s; %s", error, rest)
                continue
            if told := differences(state["settings"], self.settings):
                raise ConfigError(
                    f"{folder} was taken with other settings ({told}); remove it, or start afresh "
                    f"with force=true."
                )
            log.info("continuing from %s", folder)
            return folder, state
        return None

    def _folders(self) -> list[Path]:
        return checkpoint_folders(self.folder)


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [p for p in folder.glob("step-*-task-*") if p.is_dir()]
    return sorted(found, key=lambda p: [int(part) for part in p.name.split("-")[1::2]])


def last_parameters(directory: Path) -> dict[str, Tensor]:
    """All that a run trained, by name, as its newest checkpoint has it; empty without one.

    Args:
        directory: The run directory.
    """
    for folder in reversed(checkpoint_folders(directory / "checkpoints")):
        with suppress(StateError):
            return trained_parameters(folder)
    return {}


def trained_checkpoints(directory: Path) -> dict[int, Path]:
    """The checkpoints that were taken between tasks and after training, by the tasks seen.

    Args:
        directory: The run directory.
    """
    found = {}
    for folder in checkpoint_folders(directory / "checkpoints"):
        with suppress(StateError):
            state = read_plain(folder)
            if state["tasks_seen"] and state["course"] is None and not state["skipped"]:
                found[int(state["tasks_seen"])] = folder
    return found


def trained_parameters(folder: Path) -> dict[str, Tensor]:
    """All that a run had trained when a checkpoint was taken, by name.

    Raises:
        StateError: If the checkpoint is damaged.
    """
    parameters: dict[str, Tensor] = read_state(folder)["parameters"]
    return parameters


def captured(loop: Loop) -> dict[str, Any]:
    """Where a loop stands: all that a fresh process needs to go on with the same bits.

    Args:
        loop: Between two steps, two evaluations or two tasks.
    """
    run, course = loop.run, loop.course
    scaler = run.accelerator.scaler
    return {
        "step": run.step,
        "tasks_seen": run.tasks_seen,
        "matrix": loop.matrix,
        "row": loop.row,
        "skipped": loop.skipped,
        "cost": loop.cost.state_dict(),
        # of every process: each has dropout masks of its own
        "random": run.gathered(random_states(run.generator)),
        "parameters": {name: p.detach() for name, p in run.changed.items()},
        "strategies": {str(i): s.state_dict() for i, s in enumerate(run.acting)},
        # of fp16; it goes on over all tasks
        "scaler": None if scaler is None else scaler.state_dict(),
        "course": None
        if course is None
        else {
            "steps": course.steps,
            "optimizer": run.optimizer.state_dict(),
            "schedule": course.schedule.state_dict(),
        },
    }


def restore(loop: Loop, state: dict[str, Any]) -> None:
    """Puts a saved state into a fresh run, after its strategies' `setup`.

    `before_task` is called for every task begun so far, so that what it grows is there to be
    filled; then come the strategies' states and the weights. What belongs to a task's steps
    (optimizer, schedule, random states) waits in `loop.unfinished` for the task to go on.

    Args:
        loop: A loop that has not trained yet.
        state: What `Checkpoints.newest` gave.
    """
    run = loop.run
    begun = state["tasks_seen"] + (state["course"] is not None)
    for task in run.stream.tasks[:begun]:
        run.begin(task)
        for strategy in run.acting:
            strategy.before_task(run, task)
        run.refresh_trainable()
    run.step = state["step"]
    run.tasks_seen = state["tasks_seen"]
    loop.matrix = state["matrix"]
    loop.row = state["row"]
    loop.skipped = state["skipped"]
    loop.cost.load_state_dict(state["cost"])
    for i, strategy in enumerate(run.acting):
        strategy.load_state_dict(state["strategies"][str(i)])
    with torch.no_grad():
        for name, value in state["parameters"].items():
            run.changed[name].copy_(value)
    loop.unfinished = state["course"]
    loop.random = state["random"][run.rank % len(state["random"])]
    run.generator.set_state(loop.random["run"])
    if state["scaler"] and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])


def resume_course(run: Run, schedule: Any, saved: dict[str, Any]) -> None:
    """Puts back what belongs to the steps of the task that was under way."""
    run.optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
