"""A run and its loop from overrides, without a run directory's bookkeeping."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_module

from clpeft.composition import register_schemas, settle
from clpeft.config import Config
from clpeft.launching import quiet_libraries
from clpeft.stopping import StopRequests
from clpeft.tracking.base import Observer
from clpeft.training.build import build_run, make_loop
from clpeft.training.checkpoint import Checkpoints
from clpeft.training.loop import Loop


def config_of(overrides: list[str]) -> Config:
    """The checked settings of a command line."""
    register_schemas()
    quiet_libraries()
    with initialize_config_module("clpeft.conf", version_base="1.3"):
        return settle(compose("config", overrides))


def loop_of(config: Config, directory: Path, observer: Observer | None = None) -> Loop:
    """A loop that is ready to train."""
    run = build_run(config, directory)
    checkpoints = Checkpoints(directory, config.training.checkpoint, {})
    loop = make_loop(run, observer or Observer(), checkpoints, StopRequests())
    for strategy in run.acting:
        strategy.setup(run)
    return loop
