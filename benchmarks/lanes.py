"""Strategies side by side in one process, each at its second task, on examples of one length."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.composed import config_of, loop_of
from clpeft.tracking.base import Observer

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.training.run import Run

BATCH = 16
FIRST_STEPS = 8  # of the first task
SETTLING = 5  # steps of each round that are not counted


class Clock(Observer):
    """Times each step, and between two steps may let another lane have a turn.

    Attributes:
        seconds: Of each step, its batch's making with it.
        between: Called after each step; what it takes is not counted.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.between: Callable[[], object] = lambda: None
        self.started = 0.0

    def on_step(self, step: int, logs: dict[str, float] | None) -> None:
        """See `Observer`."""
        self.seconds.append(time.perf_counter() - self.started)
        self.between()
        self.started = time.perf_counter()


@dataclass(frozen=True)
class Entry:
    """A row of a table: a strategy with some settings, and how much a step may cost.

    Args:
        label: What the table calls it.
        overrides: Of the command line.
        limit: Times finetune's step, at most; None where nothing was asked.
        settings: Further overrides, which finetune has beside it too.
    """

    label: str
    overrides: tuple[str, ...]
    limit: float | None = None
    settings: tuple[str, ...] = ()


class Lane:
    """A strategy that has trained its first task and is at its second.

    Args:
        overrides: Of the command line.
        directory: Where nothing is written.
        steps: Of the second task, each time it is gone through.
    """

    def __init__(self, overrides: Sequence[str], directory: Path, steps: int) -> None:
        fixed = [
            f"training.batch_size={BATCH}",
            "training.epochs=1",
            "training.checkpoint.enabled=false",
            "tracking.log_every=20",
        ]
        self.clock = Clock()
        self.loop = loop_of(config_of([*overrides, *fixed]), directory, self.clock)
        of_one_length(self.loop.run, (FIRST_STEPS * BATCH, steps * BATCH))
        first, self.task = self.loop.run.stream.tasks
        self.loop.train_task(first, self.loop.open_task(first))
        self.loop.finish_task(first)
        self.examples = self.loop.open_task(self.task)

    def go_on(self) -> list[float]:
        """Trains the second task once more; returns the seconds of each step but the first few."""
        self.clock.seconds = []
        self.loop.train_task(self.task, self.examples)
        return self.clock.seconds[SETTLING:]


def of_one_length(run: Run, rows: Sequence[int]) -> None:
    """Cuts a run's first tasks down to examples of one length, so that all steps do the same work.

    Args:
        run: Whose stream keeps as many tasks as there are `rows`.
        rows: The examples of each task.
    """
    stream = run.stream
    tasks = stream.tasks[: len(rows)]
    counts = [Counter(map(len, task.train["input_ids"])) for task in tasks]
    length = max(counts[0], key=lambda length: min(count[length] for count in counts))
    cut = (
        replace(task, train=repeated(task.train, length, number))
        for task, number in zip(tasks, rows, strict=True)
    )
    run.stream = replace(stream, tasks=tuple(cut))


def repeated(examples: Dataset, length: int, rows: int) -> Dataset:
    """So many examples that are so many tokens long, again from the first where they run out."""
    same = [row for row, ids in enumerate(examples["input_ids"]) if len(ids) == length]
    return examples.select((same * (1 + rows // len(same)))[:rows])


def side_by_side(one: Lane, other: Lane) -> list[float]:
    """How many times as long a step of `other` takes as the step of `one` just before it.

    The two take turns after every step, so that whatever else the machine is doing, it is doing it
    to both.
    """
    turns = (threading.Semaphore(1), threading.Semaphore(0))

    def go(lane: Lane, mine: threading.Semaphore, next_one: threading.Semaphore) -> list[float]:
        def change() -> None:
            next_one.release()
            mine.acquire()

        lane.clock.between = change
        mine.acquire()
        try:
            return lane.go_on()
        finally:
            next_one.release(10**6)  # nobody to wait for any more

    with ThreadPoolExecutor(2) as pool:
        base, ours = (
            future.result()
            for future in (pool.submit(go, one, *turns), pool.submit(go, other, *turns[::-1]))
        )
    # one of them may have more to do: examples of its own making
    return [seconds / plain for plain, seconds in zip(base, ours, strict=False)]
