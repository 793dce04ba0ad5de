"""What goes wrong around a run: it is told in a sentence, and what was computed stands."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clpeft.config import ConfigError, RunError
from clpeft.models.objective import CausalObjective
from clpeft.rundir import Busy, RunDirectory
from clpeft.training.loop import Loop
from clpeft.training.state import read_state
from tests.integration.test_interruption import killed_at, same_run
from tests.running import Outcome, run_it, same_bits

Overrides = Callable[..., list[str]]
Finished = Callable[..., Outcome]


def in_a_fork(action: Callable[[], None]) -> int:
    """Runs something in a process of its own; returns its exit code, 1 for an exception."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_disk_that_is_full_costs_a_checkpoint_and_no_more(
    finished: Finished, tiny: Overrides, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: what has optimizer states is too large."""
    whole = finished("finetune")
    saved = whole.directory / "checkpoints"
    boundary = max(path.stat().st_size for path in saved.glob("*/tensors.safetensors"))
    limit = boundary + 5_000
    overrides = tiny("finetune", "training.checkpoint.every_steps=3")

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run_it(overrides, tmp_path)

    assert in_a_fork(limited) == 0
    log = (tmp_path / "run.log").read_text()
    assert "the checkpoint step-3-task-0 could not be written" in log
    assert "training goes on, and the one before it stands" in log
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-16-task-2", "step-24-task-3", "step-8-task-1"]  # nothing half written
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["matrix"] == whole.results["matrix"]
    last = read_state(tmp_path / "checkpoints" / "step-24-task-3")
    assert same_bits(last["parameters"], whole.trainable)


def test_stopped_while_the_disk_is_full_it_goes_on_from_the_last_good_one(
    finished: Finished, tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = tiny("ewc")
    full = False

    def fsync(descriptor: int) -> None:
        if full:  # for whatever is to be written, status.json too
            raise OSError(errno.ENOSPC, "No space left on device")

    original = Loop._backward

    def backward(self: Loop, *given: Any) -> Any:
        nonlocal full
        if self.run.step == 12:
            full = True
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr("clpeft.training.state.os.fsync", fsync)
        patch.setattr(Loop, "_backward", backward)
        run_it(overrides, tmp_path, interrupted=True)
    assert "what was done since the last is lost" in (tmp_path / "run.log").read_text()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-8-task-1"]
    same_run(run_it(overrides, tmp_path), finished("ewc"))


def test_run_directory_that_cannot_be_written(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the superuser writes everywhere but where the file system itself says no
    original = os.open

    def refuse(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and str(tmp_path) in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return original(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        ConfigError, match=r"cannot be written or locked \(Read-only file system\); make"
    ):
        run_it(tiny("finetune"), tmp_path / "run")


def test_two_runs_racing_for_one_directory(
    finished: Finished, tiny: Overrides, tmp_path: Path
) -> None:
    overrides = tiny("finetune")
    started, codes = tmp_path / "started", []
    child = os.fork()
    if child == 0:
        original = Loop.train

        def train(self: Loop) -> None:
            started.touch()
            while not (tmp_path / "go").exists():
                time.sleep(0.01)
            original(self)

        Loop.train = train  # type: ignore[method-assign]
        try:
            run_it(overrides, tmp_path / "run")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    while not started.exists():
        time.sleep(0.01)
    before = (tmp_path / "run" / "status.json").read_bytes()
    with pytest.raises(Busy, match=f"is being worked on by process {child} on "):
        run_it(overrides, tmp_path / "run")
    with pytest.raises(Busy):
        run_it([*overrides, "force=true"], tmp_path / "run")
    assert (tmp_path / "run" / "status.json").read_bytes() == before
    assert RunDirectory(tmp_path / "run").is_claimed
    (tmp_path / "go").touch()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    assert codes == [0]
    assert not RunDirectory(tmp_path / "run").is_claimed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["matrix"] == finished("finetune").results["matrix"]


def test_claim_goes_with_a_killed_process(tmp_path: Path) -> None:
    record = RunDirectory(tmp_path)

    def claim() -> None:
        with record.claimed():
            assert in_a_fork(lambda: os._exit(3 if record.is_claimed else 4)) == 3
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(claim) == -signal.SIGKILL
    assert not record.is_claimed
    with record.claimed():
        pass


def test_history_cut_in_the_middle_of_a_line(
    finished: Finished, tiny: Overrides, tmp_path: Path
) -> None:
    overrides = tiny("finetune", "training.checkpoint.every_steps=3")
    killed_at(overrides, tmp_path, 13)
    history = tmp_path / "history.jsonl"
    whole = finished("finetune").history
    # what the checkpoint at step 12 knows of, less some bytes of its last line
    known = read_state(tmp_path / "checkpoints" / "step-12-task-1")["history"]
    content = history.read_bytes()[: known - 17]
    history.write_bytes(content)
    resumed = run_it(overrides, tmp_path)

    assert "is 17 bytes short of its checkpoint" in (tmp_path / "run.log").read_text()
    steps = [event["step"] for event in resumed.history if event["event"] == "step"]
    assert steps == [step for step in range(1, 25) if step != 12]  # the line that was cut
    for event in resumed.history:
        assert any(
            {k: v for k, v in event.items() if k != "time"}
            == {k: v for k, v in other.items() if k != "time"}
            for other in whole
        )
    assert same_bits(resumed.after, finished("finetune").after)


def poisoned(monkeypatch: pytest.MonkeyPatch, step: int, poison: str) -> list[list[int]]:
    """Makes the loss, or only its gradient, no number in one step; returns the examples of it."""
    original, calls = CausalObjective.total, iter(range(1, 10_000))
    ids: list[list[int]] = []

    def total(self: CausalObjective, outputs: Any, batch: Any) -> Tensor:
        loss = original(self, outputs, batch)
        if next(calls) != step:
            return loss
        ids.append(batch.example_ids.tolist())
        if poison == "loss":
            return loss * float("nan")
        # √x at 0: the value is 0, the slope infinite
        return loss + (loss * 0).sqrt()

    monkeypatch.setattr(CausalObjective, "total", total)
    return ids


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_loss_that_is_no_number_stops_the_run(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    ids = poisoned(monkeypatch, 11, poison)
    with pytest.raises(RunError) as stopped:
        run_it(tiny("finetune"), tmp_path)

    told = str(stopped.value)
    assert told.startswith(
        "The loss or its gradient is not finite at step 11, in task 'birchford' (2 of 3), on the "
        f"examples {', '.join(map(str, ids[0]))};"
    )
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed"
    assert told in status["exception"]
    # what was learned before stands, and is sound
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert all(value.isfinite().all() for value in read_state(folder)["parameters"].values())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_step_that_is_skipped_is_counted_and_changes_nothing(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    """Without momentum a step that is left out is a step of size 0."""
    plain = ("optimizer=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=0", "stream.num_tasks=2")
    original = Loop._step
    seen: dict[int, dict[str, Tensor]] = {}

    def step(self: Loop, batches: Any) -> Any:
        logs = original(self, batches)
        seen[self.run.step + 1] = {n: p.detach().clone() for n, p in self.run.trainable.items()}
        return logs

    monkeypatch.setattr(Loop, "_step", step)
    poisoned(monkeypatch, 11, poison)
    outcome = run_it(tiny("ewc", *plain, "training.on_nan=skip"), tmp_path)

    assert outcome.results["cost"]["skipped_steps"] == 1
    assert outcome.results["cost"]["steps"] == 16
    assert [e["train/skipped"] for e in outcome.logged_steps if "train/skipped" in e] == [1]
    assert same_bits(seen[11], seen[10])
    assert not same_bits(seen[12], seen[11])
    assert all(value.isfinite().all() for value in outcome.after.values())


def test_run_that_only_skips_is_stopped(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull that overflows would otherwise be skipped step after step to a completed run."""
    monkeypatch.setattr("clpeft.training.guard.SKIPS_AT_MOST", 5)
    overrides = tiny("ewc", "strategies.ewc.lambda_=1e39", "training.on_nan=skip")
    with pytest.raises(RunError, match=r"5 steps in a row, up to step 1\d in task 'birchford'"):
        run_it(overrides, tmp_path)


@pytest.mark.parametrize(
    ("calls", "sentence"),
    [
        (
            10,
            r"Out of memory in the training of task 'birchford' \(2 of 3\): lower "
            r"training.batch_size=8 \(and raise training.gradient_accumulation=1 in its place\) or "
            r"stream.max_length=96, or set training.gradient_checkpointing=true",
        ),
        (None, r"Out of memory in the evaluation of task none yet: lower evaluation.batch_size="),
    ],
)
def test_too_little_memory(
    tiny: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: int | None,
    sentence: str,
) -> None:
    def greedy(*_: Any, **__: Any) -> Any:
        return torch.empty(10**15)  # PyTorch's own error

    if calls is None:
        monkeypatch.setattr("clpeft.evaluation.answers.causal_scorer", greedy)
    else:
        original, count = CausalObjective.forward, iter(range(1, 1000))

        def forward(self: CausalObjective, *given: Any) -> Any:
            return greedy() if next(count) == calls else original(self, *given)

        monkeypatch.setattr(CausalObjective, "forward", forward)
    with pytest.raises(RunError, match=sentence) as stopped:
        run_it(tiny("finetune"), tmp_path)
    assert isinstance(stopped.value.__cause__, RuntimeError)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"


def test_clock_that_jumps_changes_nothing(
    finished: Finished, tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 2e9))
    overrides = tiny("replay", "training.checkpoint.every_minutes=0.001")
    run_it(overrides, tmp_path, interrupt_after=2)
    resumed = run_it(overrides, tmp_path)

    same_run(resumed, finished("replay"))
    cost = resumed.results["cost"]
    assert 0 < cost["total_seconds"] < 600
