"""Fifty tasks in a row: whether the last cost more than the first."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.composed import config_of, loop_of
from benchmarks.lanes import BATCH, Entry
from benchmarks.printing import interval

TASKS = 50
STEPS = 8
PAIRS = 8  # tasks 43 to 50 of one run, each beside a task from 3 to 10 of another like it
APART = 40  # a multiple of the number of things that offices of the toy stream look at
# what each of these does for every earlier task grows by its nature
GROWING = ("gem", "olora")


@dataclass(frozen=True)
class Growth:
    """Of one strategy: late tasks over early ones."""

    seconds: list[float]  # of each pair of tasks
    resident: float


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """Time and memory of late tasks over early ones, in Markdown."""
    yield "| | time per task | resident memory | |"
    yield "|---|---|---|---|"
    for entry in entries:
        found = measure(entry.overrides)
        grows = "grows by nature" if entry.label.startswith(GROWING) else ""
        time_ = interval(found.seconds)
        yield f"| {entry.label} | {time_} × | {found.resident:.2f} × | {grows} |"


class Tasks:
    """A run that is trained a task at a time."""

    def __init__(self, overrides: Sequence[str], directory: Path) -> None:
        small = [
            f"stream.num_tasks={TASKS}",
            f"stream.train_size={STEPS * BATCH}",
            "stream.validation_size=4",
            "stream.test_size=4",
            f"training.batch_size={BATCH}",
            "training.checkpoint.enabled=false",
            "tracking.log_every=1000",
        ]
        directory.mkdir()
        self.loop = loop_of(config_of([*overrides, *small]), directory)
        self.left = iter(self.loop.run.stream.tasks)

    def next_one(self) -> float:
        """Trains the next task; returns its seconds, with what the strategy does around it."""
        task = next(self.left)
        gc.collect()
        started = time.perf_counter()
        self.loop.train_task(task, self.loop.open_task(task))
        self.loop.finish_task(task)
        return time.perf_counter() - started


def measure(overrides: Sequence[str]) -> Growth:
    """Trains fifty tasks, and the last of them beside the first ones of a second run.

    The two take turns, so that whatever else the machine is doing, it is doing it to both. Memory
    is that of the first run before there is the second: the median after tasks 38 to 42 over
    that after tasks 2 to 6.
    """
    with tempfile.TemporaryDirectory() as folder:
        old = Tasks(overrides, Path(folder) / "old")
        resident = []
        for _ in range(TASKS - PAIRS):
            old.next_one()
            gc.collect()
            resident.append(_resident_bytes())
        young = Tasks(overrides, Path(folder) / "young")
        for _ in range(TASKS - PAIRS - APART):
            young.next_one()
        seconds = []
        for number in range(PAIRS):
            if number % 2:  # neither is always the first
                early, late = young.next_one(), old.next_one()
            else:
                late, early = old.next_one(), young.next_one()
            seconds.append(late / early)
    return Growth(seconds, statistics.median(resident[-5:]) / statistics.median(resident[1:6]))


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
