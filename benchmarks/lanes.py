"""Strategies side by side in one process, each at its second task, on examples of one length."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.composed import config_of, loop_of
from clpeft.tracking.base import Observer

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.tokenize import EncodedTask
    from clpeft.training.run import Run

BATCH = 16


class Clock(Observer):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step(self, step: int, logs: dict[str, float] | None) -> None:
        """See `Observer`."""
        self.ends.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between the ends, and forgets them."""
        found = [later - earlier for earlier, later in pairwise(self.ends)]
        self.ends = []
        return found


@dataclass(frozen=True)
class Entry:
    """A row of a table: a strategy with some settings, and how much a step may cost.

    Args:
        label: What the table calls it.
        overrides: Of the command line.
        limit: Times finetune's step, at most; None where nothing was asked.
    """

    label: str
    overrides: tuple[str, ...]
    limit: float | None = None


class Lane:
    """A strategy that has trained its first task and goes on with its second as often as asked.

    Args:
        overrides: Of the command line.
        directory: Where nothing is written.
        steps: Of each task, and each time it goes on.
    """

    def __init__(self, overrides: Sequence[str], directory: Path, steps: int) -> None:
        fixed = [
            f"training.batch_size={BATCH}",
            f"training.max_steps={steps}",
            "training.checkpoint.enabled=false",
            f"tracking.log_every={10 * steps}",
        ]
        self.clock = Clock()
        self.loop = loop_of(config_of([*overrides, *fixed]), directory, self.clock)
        of_one_length(self.loop.run, steps * BATCH)
        first, self.task = self.loop.run.stream.tasks[:2]
        self.loop.train_task(first, self.loop.open_task(first))
        self.loop.finish_task(first)
        self.examples = self.loop.open_task(self.task)
        self.go_on()  # once, for what happens at a first time

    def go_on(self) -> float:
        """Trains some more steps; returns their median time in seconds."""
        self.clock.ends = []
        self.loop.skipped = 1
        self.loop.train_task(self.task, self.examples)
        return statistics.median(self.clock.intervals())


def of_one_length(run: Run, rows: int) -> None:
    """Cuts a run's tasks down to examples of one length, so that every step does the same work."""
    stream = run.stream
    counts = [Counter(map(len, task.train["input_ids"])) for task in stream.tasks]
    length = max(counts[0], key=lambda length: min(count[length] for count in counts))

    def cut(task: EncodedTask) -> EncodedTask:
        return replace(task, train=repeated(task.train, length, rows))

    run.stream = replace(stream, tasks=tuple(map(cut, stream.tasks)))


def repeated(examples: Dataset, length: int, rows: int) -> Dataset:
    """So many examples that are so many tokens long, again from the first where they run out."""
    same = [row for row, ids in enumerate(examples["input_ids"]) if len(ids) == length]
    return examples.select((same * (1 + rows // len(same)))[:rows])


def side_by_side(one: Lane, other: Lane, rounds: int) -> list[float]:
    """How many times as long a step of `other` takes as one of `one`, round by round."""
    ratios = []
    for _ in range(rounds):
        base = one.go_on()
        ratios.append(other.go_on() / base)
    return ratios
