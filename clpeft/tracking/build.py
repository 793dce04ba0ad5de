"""Which observers a run has besides its history, and what they are told of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from clpeft.config import RESULT_KEYS, TrackingConfig, digest, run_name
from clpeft.tracking.base import Observer, RunInfo
from clpeft.tracking.console import ConsoleObserver
from clpeft.tracking.tensorboard import TensorboardObserver
from clpeft.tracking.wandb import WandbObserver

if TYPE_CHECKING:
    from clpeft.training.loop import Loop


def build_observers(tracking: TrackingConfig, directory: Path) -> list[Observer]:
    """The observers that are switched on; heavy libraries are not loaded for the others.

    Args:
        tracking: The config's part about tracking.
        directory: The run directory.

    Returns:
        Observers in the order in which they are told of an event, to be put into `Observers`
        together with the run's `HistoryObserver`.

    Raises:
        ConfigError: One is switched on whose package is not installed.
    """
    observers: list[Observer] = []
    if tracking.wandb.mode != "disabled":
        observers.append(WandbObserver(tracking.wandb, directory))
    if tracking.tensorboard:
        observers.append(TensorboardObserver(directory))
    if tracking.console:
        # last to be told and so first to be closed: what W&B says comes after the tables
        observers.append(ConsoleObserver())
    return observers


def describe(loop: Loop, composed: DictConfig, resumed: bool) -> RunInfo:
    """What observers are told of a run.

    Args:
        loop: About to train.
        composed: The run's config, for names and digests.
        resumed: Whether it goes on from a checkpoint.
    """
    from clpeft.models.load import count_parameters  # loads torch, which no switch here needs

    run = loop.run
    config = run.config
    total, trainable = count_parameters(run.model)
    strategies = tuple(config.strategies)
    return RunInfo(
        directory=run.directory,
        name=run_name(composed),
        group=f"{'+'.join(strategies)}-{digest(composed, RESULT_KEYS)}",
        config=dict(OmegaConf.to_container(composed, resolve=True)),  # type: ignore[arg-type]
        tasks=tuple(task.name for task in run.stream.tasks),
        stream=config.stream.name,
        strategies=strategies,
        seed=config.seed,
        total_parameters=total,
        trainable_parameters=trainable,
        resumed_at_step=run.step,
        resumed_at_task=run.tasks_seen,
        resumed_task_steps=loop.unfinished["steps"] if loop.unfinished else 0,
        resumed=resumed,
    )
