"""Composing configs and running them in this process, as the tests of the core need it."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import DictConfig
from torch import Tensor

from clpeft import experiment
from clpeft.composition import register_schemas, settle
from clpeft.config import Config
from clpeft.launching import launch
from clpeft.training.checkpoint import Checkpoints
from clpeft.training.loop import Loop
from clpeft.training.run import Run
from clpeft.training.state import read_state


def compose(overrides: Sequence[str] = ()) -> tuple[DictConfig, Config]:
    """What Hydra composes from overrides, and the settings that come of it."""
    composed = compose_only(overrides)
    return composed, settle(composed)


def compose_only(overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra composes from overrides, unchecked; not to be changed."""
    return _composed(tuple(overrides))


@lru_cache(maxsize=64)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    register_schemas()
    with initialize_config_module("clpeft.conf", version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


@dataclass
class Outcome:
    """A finished run: what it left on disk and in memory."""

    directory: Path
    run: Run
    before: dict[str, Tensor] = field(repr=False)  # every parameter, before training

    @property
    def results(self) -> dict[str, Any]:
        """results.json."""
        return json.loads((self.directory / "results.json").read_text())

    @property
    def status(self) -> dict[str, Any]:
        """status.json."""
        return json.loads((self.directory / "status.json").read_text())

    @property
    def history(self) -> list[dict[str, Any]]:
        """history.jsonl."""
        lines = (self.directory / "history.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def steps(self, task: int) -> list[dict[str, Any]]:
        """The logged steps of one task."""
        return [e for e in self.history if e["event"] == "step" and e["task"] == task]

    @property
    def logged_steps(self) -> list[dict[str, Any]]:
        """The logged steps of all tasks."""
        return [event for event in self.history if event["event"] == "step"]

    def read(self, name: str) -> dict[str, Any]:
        """A checkpoint by its folder's name."""
        return read_state(self.directory / "checkpoints" / name)

    def state(self, tasks: int) -> dict[str, Any]:
        """The checkpoint written after so many tasks."""
        (folder,) = (self.directory / "checkpoints").glob(f"step-*-task-{tasks}")
        return read_state(folder)

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The parameters that train, after training."""
        return {name: p.detach() for name, p in self.run.trainable.items()}

    @property
    def after(self) -> dict[str, Tensor]:
        """Every parameter, after training."""
        return {name: p.detach() for name, p in self.run.model.named_parameters()}


def run_it(
    overrides: Sequence[str],
    directory: Path,
    *,
    interrupt_after: int | None = None,
    interrupted: bool = False,
) -> Outcome:
    """Launches a run in this process.

    Args:
        overrides: Of the command line.
        directory: The run directory.
        interrupt_after: Ctrl-C as soon as the checkpoint after so many tasks is written.
        interrupted: Whether the run is stopped by other means.
    """
    composed = compose_only(overrides)
    kept: dict[str, Any] = {}

    def build_run(config: Config, where: Path) -> Run:
        run = original(config, where)
        kept["run"] = run
        kept["before"] = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        return run

    def save(self: Checkpoints, loop: Any) -> bool:
        done = saved(self, loop)
        if loop.run.tasks_seen == interrupt_after:
            raise KeyboardInterrupt
        return done

    original, saved = experiment.build_run, Checkpoints.save
    with (
        mock.patch.object(experiment, "build_run", build_run),
        mock.patch.object(Checkpoints, "save", save),
    ):
        try:
            launch(composed, directory)
        except KeyboardInterrupt:
            assert interrupt_after is not None or interrupted
        else:
            assert not interrupted
    return Outcome(directory, kept["run"], kept["before"])


def build_it(overrides: Sequence[str], directory: Path) -> Run:
    """A run as it stands before its first task."""
    run = experiment.build_run(settle(compose_only(overrides)), directory)
    for strategy in run.acting:
        strategy.setup(run)
    return run


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of named tensors are equal, bit by bit."""
    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


def equal(one: Any, other: Any) -> bool:
    """Whether two tensors are equal, bit by bit; torchao's are compared part by part."""
    if type(one).__name__ != "Int8Tensor":
        return torch.equal(one, other)
    assert type(other) is type(one)
    (names, _), (others, _) = one.__tensor_flatten__(), other.__tensor_flatten__()
    return names == others and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in names
    )


def same_run(resumed: Outcome, whole: Outcome) -> None:
    """Asserts that nothing but times tells two runs apart."""
    assert resumed.status["status"] == "completed"
    assert same_bits(resumed.after, whole.after)
    one, other = (timeless(outcome.results) for outcome in (resumed, whole))
    assert one == other
    histories = [
        [{k: v for k, v in event.items() if k != "time"} for event in outcome.history]
        for outcome in (resumed, whole)
    ]
    assert histories[0] == histories[1]
    files = [
        {p.relative_to(o.directory / "adapters"): p.read_bytes() for p in adapters(o)}
        for o in (resumed, whole)
    ]
    assert files[0] == files[1]


def adapters(outcome: Outcome) -> list[Path]:
    return sorted((outcome.directory / "adapters").glob("*/*"))


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    """What results.json says, without what the clock and the machine's memory decide.

    And without the commit, since someone may commit while the tests run.
    """
    environment = {k: v for k, v in results["environment"].items() if k != "git_commit"}
    cost = {k: v for k, v in results["cost"].items() if "second" not in k and "peak" not in k}
    return results | {"cost": cost, "environment": environment}


def killed_at(overrides: list[str], directory: Path, step: int) -> None:
    """Trains in a process of its own, which is killed (SIGKILL) once it has made `step` steps."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            original = Loop._pause

            def pause(self: Loop, **given: bool) -> None:
                original(self, **given)
                if self.run.step >= step and self.course is not None:
                    os.kill(os.getpid(), signal.SIGKILL)

            Loop._pause = pause  # type: ignore[method-assign]
            run_it(overrides, directory)
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
