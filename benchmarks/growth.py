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

TASKS = 50
STEPS = 6
EARLY, LATE = range(1, 6), range(TASKS - 5, TASKS)  # tasks 2 to 6 and 46 to 50
# what each of these does for every earlier task grows by its nature
GROWING = ("gem", "olora")


@dataclass(frozen=True)
class Growth:
    """Of one strategy: late tasks over early ones."""

    seconds: float
    resident: float


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """Time and memory of late tasks over early ones, in Markdown."""
    yield "| | time per task | resident memory | |"
    yield "|---|---|---|---|"
    for entry in entries:
        found = measure(entry.overrides)
        grows = "grows by nature" if entry.label.startswith(GROWING) else ""
        yield f"| {entry.label} | {found.seconds:.2f} × | {found.resident:.2f} × | {grows} |"


def measure(overrides: Sequence[str]) -> Growth:
    """Trains fifty tasks; medians of tasks 46 to 50 over those of tasks 2 to 6."""
    small = [
        f"stream.num_tasks={TASKS}",
        f"stream.train_size={STEPS * BATCH}",
        "stream.validation_size=4",
        "stream.test_size=4",
        f"training.batch_size={BATCH}",
        "training.checkpoint.enabled=false",
        "tracking.log_every=1000",
    ]
    with tempfile.TemporaryDirectory() as folder:
        loop = loop_of(config_of([*overrides, *small]), Path(folder))
        seconds, resident = [], []
        for task in loop.run.stream.tasks:
            started = time.perf_counter()
            loop.train_task(task, loop.open_task(task))
            loop.finish_task(task)
            seconds.append(time.perf_counter() - started)
            gc.collect()
            resident.append(_resident_bytes())
    return Growth(_late_over_early(seconds), _late_over_early(resident))


def _late_over_early(values: Sequence[float]) -> float:
    late, early = (statistics.median(values[task] for task in tasks) for tasks in (LATE, EARLY))
    return late / early


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
