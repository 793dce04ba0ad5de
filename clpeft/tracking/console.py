"""What a person at a terminal, or a reader of its log, sees of a run."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE, SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from clpeft.tracking.base import Observer, RunInfo

REFRESH_SECONDS = 0.5  # of the bars; drawing them takes a few milliseconds
LINE_SECONDS = 60.0  # between lines about steps where there is no terminal

log = logging.getLogger(__name__)


class ConsoleObserver(Observer):
    """Bars over tasks and steps with the time left, then the matrix and the metrics as tables.

    Every task and every evaluation is a log line. Where standard output is no terminal (a file, a
    batch system's log) there are no bars, and one more log line a minute in between.

    Args:
        console: Where to write; standard output if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bars: _Bars | None = None
        self._tasks: tuple[str, ...] = ()
        self._loss: float | None = None
        self._task = 0
        self._name = ""
        self._steps = 1  # of the current task
        self._done = 0  # of those
        self._before: float | None = None  # share of the run that was done before this process
        self._started = self._next = time.monotonic()
        self._pause = LINE_SECONDS

    def on_run_start(self, info: RunInfo) -> None:
        """See `Observer`."""
        self._tasks = info.tasks
        self._task, self._done = info.resumed_at_task, info.resumed_task_steps
        share = 100 * info.trainable_parameters / info.total_parameters
        log.info(
            "%s: %s on %s, %d tasks (%s)",
            info.name,
            " + ".join(info.strategies),
            info.stream,
            len(info.tasks),
            ", ".join(info.tasks),
        )
        log.info(
            "parameters: %s in total, %s trainable (%.2f %%)",
            f"{info.total_parameters:,}",
            f"{info.trainable_parameters:,}",
            share,
        )
        if info.resumed_at_step:
            log.info(
                "resumed after %d steps, at task %d/%d",
                info.resumed_at_step,
                info.resumed_at_task + 1,
                len(info.tasks),
            )
        if self._console.is_terminal:
            self._pause = REFRESH_SECONDS
            self._bars = _Bars(self._console)
            self._refresh()

    def on_task_start(self, index: int, name: str, steps: int) -> None:
        """See `Observer`."""
        if index != self._task:
            self._done = 0
        self._task, self._name, self._steps = index, name, steps
        if self._before is None:
            self._before = self._share_done()
            self._started = time.monotonic()
        self._loss = None
        log.info("task %d/%d %s: %d steps", index + 1, len(self._tasks), name, steps)
        self._refresh()

    def on_step(self, step: int, logs: dict[str, float] | None) -> None:
        """See `Observer`."""
        self._done += 1
        if logs is not None:
            self._loss = logs["train/loss"]
        if time.monotonic() >= self._next:
            self._refresh()
            if self._bars is None:
                log.info(
                    "task %d/%d %s: step %d/%d%s%s",
                    self._task + 1,
                    len(self._tasks),
                    self._name,
                    self._done,
                    self._steps,
                    self._loss_text(", loss "),
                    self._left_text(", "),
                )

    def on_evaluation(self, trained: int, row: list[float | None]) -> None:
        """See `Observer`."""
        scores = [
            f"{name} {100 * score:.1f}"
            for name, score in zip(self._tasks, row, strict=True)
            if score is not None
        ]
        if scores:
            when = f"after {trained}/{len(self._tasks)} tasks" if trained else "untrained"
            log.info("%s: %s%s", when, ", ".join(scores), self._left_text(" · "))
        self._refresh()

    def on_task_end(self, index: int) -> None:
        """See `Observer`."""
        self._task, self._done = index, self._steps
        self._refresh()

    def close(self, exit_code: int, results: dict[str, Any] | None) -> None:
        """See `Observer`."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        if results is not None:
            show_results(results, self._console)

    def _refresh(self) -> None:
        self._next = time.monotonic() + self._pause
        if self._bars is not None:
            name = f"task {self._task + 1}/{len(self._tasks)} {self._name}"
            self._bars.show(
                name,
                self._done,
                self._steps,
                self._loss_text("loss "),
                self._share_done(),
                self._left_text(""),
            )

    def _share_done(self) -> float:
        """Of the whole run, every task counting the same."""
        # what has no steps is done as soon as it begins
        within = self._done / self._steps if self._steps else 1.0
        return (self._task + within) / len(self._tasks)

    def _loss_text(self, prefix: str) -> str:
        return "" if self._loss is None else f"{prefix}{self._loss:.3f}"

    def _left_text(self, prefix: str) -> str:
        done = self._share_done()
        if self._before is None or not self._before < done < 1:
            return ""
        seconds = (time.monotonic() - self._started) * (1 - done) / (done - self._before)
        return f"{prefix}about {timedelta(seconds=round(seconds))} left"


class _Bars:
    """A bar over the tasks and a bar over the steps of one, drawn when told to.

    Not by a thread of its own, which would take turns with the training loop.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[note]}"),
            console=console,
            auto_refresh=False,
            expand=True,
            redirect_stderr=sys.stderr.isatty(),  # else it goes to a file, and shall go on to
        )
        self._all: TaskID = self._progress.add_task("run", total=1.0, count="", note="")
        self._one: TaskID = self._progress.add_task("", total=None, count="", note="")
        self._teardown = ExitStack()
        self._teardown.callback(self._progress.stop)
        plain_stdout, plain_stderr = sys.stdout, sys.stderr
        self._progress.start()
        # While they are shown, the bars stand below whatever goes through sys.stdout. A log handler
        # that was made earlier has the stream itself and would write into them.
        for handler in logging.getLogger().handlers:
            if not isinstance(handler, logging.StreamHandler):
                continue
            if handler.stream in (plain_stdout, plain_stderr):
                self._teardown.callback(handler.setStream, handler.stream)
                handler.setStream(sys.stdout if handler.stream is plain_stdout else sys.stderr)

    def show(self, name: str, done: int, steps: int, loss: str, share: float, left: str) -> None:
        """Draws the state of things."""
        self._progress.update(
            self._all, completed=share, count=f"{round(100 * share)} %", note=left
        )
        self._progress.update(
            self._one,
            description=name,
            completed=done,
            total=steps,
            count=f"{done}/{steps}",
            note=loss,
        )
        self._progress.refresh()

    def stop(self) -> None:
        """Gives the terminal back."""
        self._teardown.close()


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Sends our log lines to standard output and, with the time and their origin, to a file.

    Args:
        path: The file, which is appended to; its folder is there.
    """
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(_ScreenFormatter())
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("clpeft")
    level = ours.level
    ours.setLevel(logging.INFO)  # other libraries' loggers stay at the root's, warnings
    for handler in (screen, file):
        root.addHandler(handler)
    try:
        yield
    finally:
        ours.setLevel(level)
        for handler in (screen, file):
            root.removeHandler(handler)
        file.close()


class _ScreenFormatter(logging.Formatter):
    """A person needs to be told of a warning that it is one, and nothing else about a line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname}: {text}"


def show_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints the matrix and the metrics of a completed run, and why others are undefined.

    Args:
        results: The content of results.json.
        console: Where to; standard output if None.
    """
    console = console or Console()
    fitting = matrix_table(results["matrix"], results["tasks"])
    if not console.is_terminal:
        # a file has no edge at which to cut a row
        console = Console(file=console.file, width=max(console.width, _width(console, fitting)))
    elif _width(console, fitting) > console.width:
        fitting = matrix_table(results["matrix"], results["tasks"], compact=True)
    console.print(fitting)
    console.print(metrics_table(results["metrics"]))
    for name, reason in results["undefined"].items():
        line = Text(f"{name} is undefined: {reason}", style="dim")
        console.print(line, soft_wrap=True)


def matrix_table(
    matrix: Sequence[Sequence[float | None]], tasks: Sequence[str], *, compact: bool = False
) -> Table:
    """The matrix in percent, a row per number of trained tasks.

    Args:
        matrix: T + 1 rows of T scores, fractions; None where not evaluated.
        tasks: T names.
        compact: Whether columns are headed by numbers and scores are whole percents, for terminals
            too narrow for more.

    Returns:
        A table whose diagonal, the scores of tasks just trained, is bold.
    """
    digits = 0 if compact else 1
    table = Table(
        title="score on each task (%)",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1) if compact else (0, 1),
        pad_edge=False,
    )
    table.add_column("after" if compact else "", no_wrap=True)
    for i, name in enumerate(tasks, 1):
        table.add_column(Text(str(i) if compact else name), justify="right", no_wrap=True)
    for t, row in enumerate(matrix):
        head = f"{'' if compact else 'after '}{t} {tasks[t - 1]}" if t else "untrained"
        cells = [
            Text(
                "·" if score is None else f"{100 * score:.{digits}f}",
                style="bold" if i == t else "",
            )
            for i, score in enumerate(row, 1)
        ]
        table.add_row(Text(head), *cells)
    return table


def metrics_table(metrics: dict[str, float]) -> Table:
    """The metrics, one per row.

    Args:
        metrics: Name → value.

    Returns:
        A table with the values as fractions, as results.json has them.
    """
    table = Table(
        title="metrics", title_justify="left", box=SIMPLE, show_header=False, pad_edge=False
    )
    table.add_column()
    table.add_column(justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    return table


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum
