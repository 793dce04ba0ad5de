"""What a run costs: time, steps, memory, bytes kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clpeft.models.quantize import base_bytes
from clpeft.training.adapters import saved_bytes

if TYPE_CHECKING:
    from clpeft.training.run import Run

_PROCESS = Path("/proc/self")


class Cost:
    """Adds up the cost of a run over its processes' lives; saved in checkpoints."""

    def __init__(self) -> None:
        self.seconds = {"train": 0.0, "strategy": 0.0, "evaluation": 0.0}
        self.steps = 0
        self.examples = 0
        self.skipped_steps = 0  # whose loss was not finite
        self._timing: tuple[str, float] | None = None  # what is being timed, since when
        self.peak_memory: int | None = None
        self.state_bytes: list[int] = []
        self.facts: list[dict[str, dict[str, float]]] = []  # per task, by strategy
        _reset_peak()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Counts the time inside as training."""
        with self._timed("train"):
            yield

    @contextmanager
    def around_task(self) -> Iterator[None]:
        """Counts the time inside as what strategies do before and after a task's steps."""
        with self._timed("strategy"):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Counts the time inside as evaluation."""
        with self._timed("evaluation"):
            yield

    def count_step(self, examples: int) -> None:
        """Counts an optimizer step and the examples that it was made from, replayed ones too."""
        self.steps += 1
        self.examples += examples

    def end_task(self, run: Run) -> None:
        """Records what the strategies keep and tell after a task, and the memory's peak so far."""
        names = run.config.strategies
        facts = zip(names, (strategy.facts() for strategy in run.strategies), strict=True)
        self.facts.append({name: dict(found) for name, found in facts if found})
        kept = sum(_tensor_bytes(strategy.state_dict()) for strategy in run.strategies)
        self.state_bytes.append(kept)
        peak = _peak_memory()
        if peak is not None:
            self.peak_memory = max(peak, self.peak_memory or 0)

    def summary(self, run: Run) -> dict[str, Any]:
        """The `cost` of results.json: seconds, bytes, and how long optimizer steps took."""
        trained = self.seconds["train"]
        return {
            "train_seconds": trained,
            "strategy_seconds": self.seconds["strategy"],
            "evaluation_seconds": self.seconds["evaluation"],
            "total_seconds": sum(self.seconds.values()),
            "steps": self.steps,
            "seconds_per_step": trained / self.steps if self.steps else None,
            "steps_per_second": self.steps / trained if self.steps else None,
            "examples": self.examples,
            "skipped_steps": self.skipped_steps,
            "peak_memory_bytes": self.peak_memory,
            "state_bytes": self.state_bytes,
            "facts": self.facts,
            "trained_bytes": sum(p.nbytes for p in run.trainable.values()),
            "adapter_bytes": saved_bytes(Path(run.directory)),
            "base_bytes": base_bytes(run.model),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that was added up so far, what is being timed included."""
        seconds = dict(self.seconds)
        if self._timing is not None:
            part, started = self._timing
            seconds[part] += time.perf_counter() - started
        return {
            "seconds": seconds,
            "skipped_steps": self.skipped_steps,
            "steps": self.steps,
            "examples": self.examples,
            "peak_memory": self.peak_memory,
            "state_bytes": list(self.state_bytes),
            "facts": list(self.facts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what an earlier process added up."""
        self.seconds |= state["seconds"]
        self.skipped_steps = state["skipped_steps"]
        self.steps = state["steps"]
        self.examples = state["examples"]
        self.peak_memory = state["peak_memory"]
        self.state_bytes = list(state["state_bytes"])
        self.facts = list(state["facts"])

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        self._timing = (part, started)
        try:
            yield
        finally:
            self._timing = None
            self.seconds[part] += time.perf_counter() - started


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(_tensor_bytes(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(_tensor_bytes(value) for value in state)
    return 0


def _reset_peak() -> None:
    """So that a sweep's later runs do not inherit the peak of earlier ones in the same process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (_PROCESS / "clear_refs").exists():
        with suppress(OSError):  # some containers forbid it; the peak is then the process's
            (_PROCESS / "clear_refs").write_text("5")


def _peak_memory() -> int | None:
    """Peak bytes: allocated on the accelerator, else resident on Linux; None where unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = _PROCESS / "status"
    if not status.exists():
        return None
    lines = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return next((int(line.split()[1]) * 1024 for line in lines), None)
