"""Every strategy, killed at any step and asked to stop at any place, ends in the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from clpeft.evaluation.evaluator import Evaluator
from clpeft.strategies.base import Strategy
from clpeft.training.loop import Loop
from tests.running import Outcome, compose_only, killed_at, run_it, same_bits, same_run
from tests.settings import STRATEGY_SETTINGS, VARIED, base_of, models_of, side_by_side

NAMES = sorted(STRATEGY_SETTINGS)
EVERY = "training.checkpoint.every_steps=3"

Overrides = Callable[..., list[str]]
Finished = Callable[..., Outcome]


def total_steps(name: str, tasks: int) -> int:
    """Optimizer steps of so many tasks."""
    parts = [STRATEGY_SETTINGS[base_of(part)].steps for part in side_by_side(name)]
    return sum(list(map(max, zip(*parts, strict=True)))[:tasks])


TOGETHER = ("ewc+replay", "olora+replay", "quality_control+generative_replay")


@pytest.mark.parametrize("name", [*VARIED, *TOGETHER])
def test_killed_in_every_task_it_ends_in_the_same_bits(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str
) -> None:
    whole = finished(name)
    overrides = tiny(name, EVERY)
    rng = np.random.default_rng(list(name.encode()))
    made = 0
    for task in range(3):
        # somewhere within the task, its last step included
        first, last = total_steps(name, task), total_steps(name, task + 1)
        if last == first:
            continue
        made = int(rng.integers(first + 1, last + 1))
        killed_at(overrides, tmp_path / "run", made)
        assert not (tmp_path / "run" / "results.json").exists()
    resumed = run_it(overrides, tmp_path / "run")

    assert made > 0
    assert resumed.status["attempt"] == (2 if name == "joint" else 4)
    same_run(resumed, whole)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(name, model, marks=pytest.mark.slow)
        for name in NAMES
        for model in models_of(name)[1:]
    ],
)
def test_killed_with_another_kind_of_model(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str, model: str
) -> None:
    whole = finished(name, model=model)
    step = total_steps(name, 2) - 2 if name != "joint" else 20
    killed_at(tiny(name, EVERY, model=model), tmp_path / "run", step)
    same_run(run_it(tiny(name, EVERY, model=model), tmp_path / "run"), whole)


# moments in 8 bits are those of more than 4096 numbers, which whole layers have
EIGHT_BIT = ("optimizer=adamw_8bit", "optimizer.lr=5e-3", "peft.modules_to_save=[down_proj]")


@pytest.mark.parametrize(
    "more",
    [
        ("quantization=nf4",),
        ("quantization=int8",),
        ("quantization=torchao_int8",),
        EIGHT_BIT,
        ("quantization=nf4", *EIGHT_BIT),
    ],
    ids=lambda more: " ".join(option.partition("=")[2] for option in more[:2]),
)
def test_killed_with_few_bits(
    tiny: Overrides, bases: Callable[[str], Path], tmp_path: Path, more: tuple[str, ...]
) -> None:
    wide = f"model.path={bases('wide_llama')}"
    overrides = tiny("ewc", wide, "stream.num_tasks=2", *more)
    whole = run_it([*overrides, EVERY], tmp_path / "whole")
    killed_at([*overrides, EVERY], tmp_path / "run", 13)
    same_run(run_it([*overrides, EVERY], tmp_path / "run"), whole)

    if "optimizer=adamw_8bit" in more:
        states = whole.read("step-12-task-1")["course"]["optimizer"]["state"].values()
        kept = [state["__bnb_optimizer_quant_state__"]["state1"] for state in states]
        assert {k.dtype for k in kept if k.numel() >= 4096} == {torch.uint8}
        assert {k.dtype for k in kept if k.numel() < 4096} == {torch.float32}
        assert max(k.numel() for k in kept) == 64 * 128


def signalled(owner: Any, method: str, when: int, number: signal.Signals) -> Any:
    """A patch under which the process gets a signal at the `when`-th call of a method."""
    original, calls = getattr(owner, method), iter(range(1, 10_000))

    def patched(*given: Any, **more: Any) -> Any:
        if next(calls) == when:
            os.kill(os.getpid(), number)
        return original(*given, **more)

    return mock.patch.object(owner, method, patched)


# where a signal may arrive: which call of what, and what is on disk afterwards: steps, tasks done,
# rows of the matrix
PLACES: dict[str, tuple[Any, str, int, tuple[int, int, int]]] = {
    "before anything": (Evaluator, "_ranked", 1, (0, 0, 0)),
    "in the middle of row 0": (Evaluator, "_ranked", 3, (0, 0, 0)),
    "in a step": (Loop, "_backward", 5, (5, 0, 1)),
    "in the last step of a task": (Loop, "_backward", 8, (8, 0, 1)),
    "after a task": (Strategy, "after_task", 1, (8, 1, 1)),
    "in an evaluation": (Evaluator, "_ranked", 4, (8, 1, 1)),
    "in the evaluation of the last task in a row": (Evaluator, "_ranked", 5, (8, 1, 1)),
    "before the next task": (Strategy, "before_task", 2, (9, 1, 2)),
    "in the last evaluation": (Evaluator, "_ranked", 11, (24, 3, 3)),
}


@pytest.mark.parametrize("place", PLACES)
def test_asked_to_stop_it_saves_and_ends_in_the_same_bits(
    finished: Finished, tiny: Overrides, tmp_path: Path, place: str
) -> None:
    whole = finished("finetune")
    owner, method, when, expected = PLACES[place]
    overrides = tiny("finetune", "training.checkpoint.keep=1")
    with signalled(owner, method, when, signal.SIGTERM):
        stopped = run_it(overrides, tmp_path / "run", interrupted=True)

    assert stopped.status["status"] == "preempted"
    assert stopped.status["reason"].startswith("stopped by SIGTERM")
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = stopped.read(folder.name)
    assert (state["step"], state["tasks_seen"], len(state["matrix"])) == expected
    same_run(run_it(overrides, tmp_path / "run"), whole)


def test_tasks_that_were_scored_are_not_scored_again(
    finished: Finished, tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, overrides = finished("finetune"), tiny("finetune")
    # row 0 has three tasks, row 1 two; the signal comes in the second of them
    with signalled(Evaluator, "_ranked", 5, signal.SIGTERM):
        run_it(overrides, tmp_path, interrupted=True)
    original, calls = Evaluator._ranked, 0

    def ranked(self: Evaluator, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, *given)

    monkeypatch.setattr(Evaluator, "_ranked", ranked)
    same_run(run_it(overrides, tmp_path), whole)
    assert calls == 1 + 3 + 3


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_each_signal_is_named(
    tiny: Overrides, tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with signalled(Loop, "_backward", 2, number):
        stopped = run_it(tiny("finetune"), tmp_path / "run", interrupted=True)

    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert stopped.status["reason"].startswith(f"stopped by {name};")
    assert ("Ctrl-C again stops at once" in capfd.readouterr().err) == (name == "Ctrl-C")
    # the process is as it was
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once(tiny: Overrides, tmp_path: Path) -> None:
    original, calls = Loop._backward, iter(range(1, 100))

    def twice(self: Loop, *given: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *given)

    with mock.patch.object(Loop, "_backward", twice):
        stopped = run_it(tiny("finetune"), tmp_path / "run", interrupted=True)

    assert stopped.run.step == 1
    assert stopped.status["status"] == "preempted"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_first_signal_counts(tiny: Overrides, tmp_path: Path) -> None:
    """SIGTERM follows USR1 when a job's time is over; it must not make a cancellation of it."""
    original, calls = Loop._backward, iter(range(1, 100))

    def both(self: Loop, *given: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *given)

    with mock.patch.object(Loop, "_backward", both):
        stopped = run_it(tiny("finetune"), tmp_path / "run", interrupted=True)

    assert stopped.status["reason"].startswith("stopped by SIGUSR1;")
    assert (tmp_path / "run" / "checkpoints" / "step-2-task-0").is_dir()


def test_requeued_job_with_force_continues(
    finished: Finished, tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = tiny("finetune", "force=true")
    with signalled(Loop, "_backward", 11, signal.SIGTERM):
        run_it(overrides, tmp_path, interrupted=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    resumed = run_it(overrides, tmp_path)

    assert "continuing from" in (tmp_path / "run.log").read_text()
    assert same_bits(resumed.after, finished("finetune").after)


def test_own_draws_go_on_after_a_boundary(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a strategy draws from the run's generator is not drawn twice."""
    drawn: list[float] = []

    def after_task(self: Strategy, run: Any, task: Any) -> None:
        drawn.append(float(torch.rand((), generator=run.generator)))

    monkeypatch.setattr(Strategy, "after_task", after_task)
    run_it(tiny("finetune"), tmp_path / "whole")
    whole, drawn[:] = list(drawn), []
    run_it(tiny("finetune"), tmp_path / "run", interrupt_after=1)
    run_it(tiny("finetune"), tmp_path / "run")
    assert drawn == whole
    assert len({*drawn}) == 3


def test_checkpoints_are_written_every_so_many_minutes(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 25))  # 25 s between two looks at the clock
    clock = SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr("clpeft.training.checkpoint.time", clock)
    overrides = tiny("finetune", "training.checkpoint.every_minutes=1", "stream.num_tasks=1")
    outcome = run_it(overrides, tmp_path / "run")

    saved = sorted(p.name for p in (outcome.directory / "checkpoints").iterdir())
    # 75 s after the start or the last one: at looks 3, 6, ...; what is saved looks too
    assert saved == ["step-3-task-0", "step-6-task-0", "step-8-task-1"]


def test_steps_between_checkpoints(tiny: Overrides, tmp_path: Path) -> None:
    outcome = run_it(tiny("finetune", EVERY, "stream.num_tasks=2"), tmp_path / "run")

    saved = {p.name for p in (outcome.directory / "checkpoints").iterdir()}
    within = {f"step-{k}-task-{k // 9}" for k in (3, 6, 9, 12, 15)}
    assert saved == within | {"step-8-task-1", "step-16-task-2"}


def test_checkpoint_of_another_config_is_refused(tiny: Overrides, tmp_path: Path) -> None:
    from clpeft.config import ConfigError

    run_it(tiny("finetune"), tmp_path / "one", interrupt_after=1)
    other = tiny("finetune", "optimizer.lr=5e-3")
    run_it(other, tmp_path / "two", interrupt_after=1)
    (mine,) = (tmp_path / "two" / "checkpoints").iterdir()
    (theirs,) = (tmp_path / "one" / "checkpoints").iterdir()
    for path in theirs.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())

    with pytest.raises(ConfigError, match=r"optimizer.lr is 0.01 there and 0.005 here"):
        run_it(other, tmp_path / "two")
    assert compose_only(other).optimizer.lr == 5e-3


def test_wandb_goes_on_under_the_same_id(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    overrides = tiny("finetune", "tracking.wandb.mode=offline", "stream.num_tasks=2")
    with signalled(Loop, "_backward", 11, signal.SIGTERM):
        run_it(overrides, tmp_path, interrupted=True)
    identifier = (tmp_path / "wandb" / "run_id.txt").read_text()
    run_it(overrides, tmp_path)

    assert (tmp_path / "wandb" / "run_id.txt").read_text() == identifier
    # W&B numbers a folder's name where two begin in the same second; the file in it is the run's.
    kept = [path.stem for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert kept == [f"run-{identifier.strip()}"] * 2
