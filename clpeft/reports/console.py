"""Leaderboards on the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clpeft.evaluation.metrics import LOWER_IS_BETTER
from clpeft.outcomes import count, shown
from clpeft.reports.aggregate import Leaderboard
from clpeft.reports.doubts import MARK, doubts_of
from clpeft.reports.runs import Collection
from clpeft.reports.tables import SHORT
from clpeft.reports.wording import cell_text, human_bytes, human_seconds, seeds_text
from clpeft.rundir import KILLED

CONSOLE_METRICS = ("average_accuracy", "learning_accuracy", "forgetting")
CONSOLE_WIDTH = 98  # columns, at most; a table that is read on one screen
COMPARING_WIDTH = 78  # with less, the difference to finetune is left to the page and the CSV

COSTS_EXPLAINED = (
    "step: seconds of an optimizer step over those of finetune, paired by seed. training: of a "
    "run's steps; strategy: around its tasks (a Fisher, filling a memory); means over seeds. peak "
    "memory: the highest of any seed. kept: by the strategy after the last task."
)


def print_leaderboards(
    boards: Sequence[Leaderboard],
    collection: Collection,
    console: Console | None = None,
    *,
    costs: bool = False,
) -> None:
    """Prints the leaderboards, what did not finish, and what could not be read.

    Args:
        boards: The leaderboards.
        collection: What they were made of.
        console: Where to; the standard output by default.
        costs: Whether what the strategies cost is printed too.
    """
    console = console or Console()
    width = min(console.width, CONSOLE_WIDTH)
    for board in boards:
        console.print(_console_table(board, width), width=width)
        console.print(_explanation(board, width), style="dim", width=width, highlight=False)
        for doubt in doubts_of(board):
            told = f"[yellow]{MARK}[/] {escape(f'{doubt.label}, {seeds_text(doubt.seeds)}: ')}"
            console.print(f"{told}{escape(doubt.text)}", width=width, highlight=False)
        console.print()
        if costs:
            console.print(_cost_table(board), width=width)
            console.print(COSTS_EXPLAINED, style="dim", width=width, highlight=False)
            console.print()
    if collection.unfinished:
        table = Table(title="Not counted: runs without a result", title_justify="left", box=None)
        table.title_style = "bold"
        table.add_column("state")
        table.add_column("run", overflow="fold")
        table.add_column("why", overflow="fold")
        for run in collection.unfinished:
            style = "red" if run.state in ("failed", KILLED) else "yellow"
            state = f"[{style}]{run.state}[/]"
            table.add_row(state, escape(shown(run.directory)), escape(run.message))
        console.print(table, width=width)
        states = ["completed"] * len(collection.runs)
        states += [run.state for run in collection.unfinished]
        console.print(f"{len(states)} runs: {count(states)}", width=width, highlight=False)
        console.print()
    for note in collection.notes:
        told = f"[yellow]note[/] {escape(str(note.path))} {escape(note.text)}"
        console.print(told, width=width, highlight=False)


def _explanation(board: Leaderboard, width: int) -> str:
    text = "Mean ± half width of the 95 % interval over n seeds (Student's t)."
    if board.bounds:
        text += " Above the line: references, never best."
    if _compares(board, width):
        text += " vs finetune: average accuracy, paired by seed."
    return text


def _compares(board: Leaderboard, width: int) -> bool:
    return width >= COMPARING_WIDTH and any(row.differences for row in board.rows)


def _console_table(board: Leaderboard, width: int) -> Table:
    metrics = [name for name in CONSOLE_METRICS if name in board.metrics]
    compared = _compares(board, width)
    table = _empty_table(board.title)
    for name in metrics:
        arrow = "↓" if name in LOWER_IS_BETTER else "↑"
        first, _, second = SHORT[name].rpartition(" ")
        table.add_column(f"{first}\n{second} {arrow}".strip(), min_width=13)
    if compared:
        table.add_column("vs finetune", min_width=14)
    table.add_column("n", justify="right", no_wrap=True)
    best = {name: board.best(name) for name in metrics}
    doubtful = {doubt.label for doubt in doubts_of(board)}
    for i, row in enumerate(board.rows):
        cells = [escape(row.label) + (f" [yellow]{MARK}[/]" if row.label in doubtful else "")]
        for name in metrics:
            text = cell_text(row.metrics.get(name), len(row.runs))
            cells.append(f"[bold green]{text}[/]" if row.label in best[name] else text)
        if compared:
            pairs = row.metrics.get("average_accuracy")
            seeds = pairs.n if pairs else 0
            cells.append(cell_text(row.differences.get("average_accuracy"), seeds, signed=True))
        cells.append(str(len(row.runs)))
        _add(table, board, i, cells)
    return table


def _cost_table(board: Leaderboard) -> Table:
    table = _empty_table(f"{board.title}: costs")
    for head in ("step", "training", "strategy", "evaluation", "peak memory", "kept"):
        table.add_column(head, justify="right", no_wrap=True)
    for i, row in enumerate(board.rows):
        cost = row.cost
        cells = [escape(row.label), f"{cost['step_ratio']:.2f} ×" if "step_ratio" in cost else "–"]
        for name in ("train_seconds", "strategy_seconds", "evaluation_seconds"):
            cells.append(human_seconds(cost[name]) if name in cost else "–")
        for name in ("peak_memory_bytes", "state_bytes"):
            cells.append(human_bytes(cost[name]) if name in cost else "–")
        _add(table, board, i, cells)
    return table


def _empty_table(title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.box = box.HORIZONTALS
    table.show_edge = False
    table.padding = (0, 1, 0, 0)
    table.pad_edge = False
    table.add_column("strategy", overflow="fold", min_width=12)
    return table


def _add(table: Table, board: Leaderboard, i: int, cells: Sequence[str]) -> None:
    """Adds the line of a leaderboard's i-th row, with a rule below the last reference."""
    last_bound = bool(board.contenders) and i == len(board.bounds) - 1
    style = "dim" if board.rows[i].bound else None
    table.add_row(*cells, style=style, end_section=last_bound)
