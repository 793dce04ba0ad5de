"""Which observers a run has besides its history."""

from __future__ import annotations

from pathlib import Path

from clpeft.config import TrackingConfig
from clpeft.tracking.base import Observer
from clpeft.tracking.console import ConsoleObserver
from clpeft.tracking.tensorboard import TensorboardObserver
from clpeft.tracking.wandb import WandbObserver


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
