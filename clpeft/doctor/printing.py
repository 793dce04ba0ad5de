"""What was found of a run, as tables and lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clpeft.doctor.examination import Comparison, Examination
from clpeft.evidence import Amount, Verdict, rounded
from clpeft.strategies.base import Evidence

COLUMNS = 4  # tasks that a table has room for
STYLES = {
    Verdict.WORKS: "green",
    Verdict.NOTHING: "bold red",
    Verdict.TOO_STRONG: "yellow",
    Verdict.TOO_WEAK: "yellow",
    Verdict.UNJUDGED: "dim",
}
# what the numbers of a table are, in a line below it
LEGEND = {
    Evidence.PENALTY: "penalty: its median over a task's steps, as a multiple of the mean of the "
    "task's own loss",
    Evidence.TERM: "term: its largest value",
    Evidence.GRADIENT: "gradient: its mean over a task's steps",
    Evidence.MEMORY: "memory: examples read in a task",
    Evidence.MASK: "mask: its value at a task's last step",
}
COMPARISON_LEGEND = (
    "weights: the last ones, ‖θ − θ'‖ / ‖θ'‖; learned: mean score on each task just after it, with "
    "/ without; step: its time as a multiple, after the first task"
)


def show(examined: Examination, console: Console) -> None:
    """Prints an examination: tables, what was found, and what to try."""
    if examined.exhibits:
        console.print(_evidence_table(examined))
        for kind in dict.fromkeys(exhibit.kind for exhibit in examined.exhibits):
            console.print(LEGEND[kind], style="dim", highlight=False)
        console.print()
    if examined.comparisons:
        console.print(_comparison_table(examined.comparisons))
        console.print(COMPARISON_LEGEND, style="dim", highlight=False)
        console.print()
    for finding in examined.findings:
        style = STYLES[finding.verdict]
        console.print(f"[{style}]•[/] {escape(finding.text)}", highlight=False)
        console.print(f"  {escape(finding.advice)}", highlight=False)
    for note in examined.notes:
        console.print(f"[dim]•[/] {escape(note)}", highlight=False)
    if not (examined.findings or examined.notes):
        console.print("Nothing was found against it.", style="green")


def _evidence_table(examined: Examination) -> Table:
    table = _table(examined.title)
    table.add_column("strategy", overflow="fold")
    table.add_column("shown by", overflow="fold")
    table.add_column("kind")
    tasks = list(dict.fromkeys(a.task for e in examined.exhibits for a in e.amounts))
    fitting = len(tasks) <= COLUMNS
    for head in tasks if fitting else [f"{tasks[0]} to {tasks[-1]}"]:
        table.add_column(escape(head), justify="right")
    table.add_column("verdict", no_wrap=True)
    for exhibit in examined.exhibits:
        amounts = {amount.task: amount for amount in exhibit.amounts}
        cells = [_amount(exhibit.kind, amounts[t]) if t in amounts else "·" for t in tasks]
        if not fitting:
            ordered = sorted(exhibit.amounts, key=lambda amount: amount.value or 0.0)
            cells = [" to ".join(_amount(exhibit.kind, a) for a in (ordered[0], ordered[-1]))]
        table.add_row(
            exhibit.strategy, exhibit.key, exhibit.kind, *cells, _verdict(exhibit.verdict)
        )
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    table = _table("beside runs without it")
    table.add_column("strategy", overflow="fold")
    table.add_column("without it", overflow="fold")
    table.add_column("weights", justify="right")
    table.add_column("learned", justify="right")
    table.add_column("step", justify="right")
    table.add_column("verdict", no_wrap=True)
    for one in comparisons:
        apart = "–" if one.distance is None else f"{rounded(100 * one.distance, 2)} % apart"
        learned = ["–" if score is None else f"{score:.2f}" for score in one.learned]
        table.add_row(
            one.strategy,
            one.reference,
            "equal" if one.same else apart,
            " / ".join(learned),
            "–" if one.step_ratio is None else f"{one.step_ratio:.2f} ×",
            _verdict(Verdict.NOTHING) if one.same else "[green]differs[/]",
        )
    return table


def _table(title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", pad_edge=False)
    table.box = box.SIMPLE_HEAD
    table.show_edge = False
    return table


def _amount(kind: Evidence, amount: Amount) -> str:
    if kind == Evidence.MASK:
        return "–" if amount.last is None else f"{amount.last:.3g}"
    if amount.value is None:
        return "–"
    if kind == Evidence.MEMORY:
        return f"{amount.value:g}"
    return rounded(amount.value, 2) + " ×" * (kind == Evidence.PENALTY)


def _verdict(verdict: Verdict) -> str:
    return f"[{STYLES[verdict]}]{verdict}[/]"
