"""One experiment: a checked config becomes objects, the objects train, and results come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clpeft.config import Config, result_settings, run_name
from clpeft.serving import record_serving
from clpeft.stopping import StopRequests
from clpeft.tracking.base import Observer, Observers
from clpeft.tracking.build import build_observers, describe
from clpeft.tracking.history import HistoryObserver
from clpeft.training.build import build_run, make_loop
from clpeft.training.checkpoint import Checkpoints, restore
from clpeft.training.results import collect


def run_experiment(
    config: Config, composed: DictConfig, directory: Path, stop: StopRequests
) -> dict[str, Any]:
    """Trains a model through a stream under a strategy, from the start or from a checkpoint.

    Args:
        config: The settings, checked.
        composed: The same as composed, for names and digests.
        directory: The run directory.
        stop: Whether the process was asked to stop.

    Returns:
        What results.json holds.
    """
    run = build_run(config, directory)
    settings = result_settings(composed) | {"the base model's weights": run.base}
    checkpoints = Checkpoints(directory, config.training.checkpoint, settings)
    if run.accelerator.is_main_process:
        checkpoints.tidy()
    run.accelerator.wait_for_everyone()  # the main process may be clearing the directory
    saved = checkpoints.newest(lambda name: run.gathered(name)[0])
    watching: list[Observer] = []
    if run.accelerator.is_main_process:
        history = HistoryObserver(directory, resume_at=saved["history"] if saved else 0)
        checkpoints.history_position = history.position
        watching = [history, *build_observers(config.tracking, directory)]
    observers = Observers(watching)
    loop = make_loop(run, observers, checkpoints, stop)
    exit_code, results = 1, None
    try:
        if run.accelerator.is_main_process:
            record_serving(run, run_name(composed), loop.evaluator.task_id_given)
        for strategy in run.acting:
            strategy.setup(run)
        if saved is not None:
            restore(loop, saved)
        observers.on_run_start(describe(loop, composed, saved is not None))
        loop.train()
        results = collect(loop, composed)
        exit_code = 0
    except BaseException as error:
        observers.on_error(error)
        raise
    finally:
        observers.close(exit_code, results)
    return results
