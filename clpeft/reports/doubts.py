"""What makes the rows of a leaderboard doubtful: what runs found of themselves, and equal runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from clpeft.evidence import same_bits
from clpeft.reports.aggregate import BASELINE, Leaderboard
from clpeft.reports.naming import strategy_name
from clpeft.reports.runs import Run

MARK = "‡"  # beside the name of a row that there is a doubt about


@dataclass(frozen=True)
class Doubt:
    """One thing that was found of one family of runs."""

    label: str  # the row's
    seeds: tuple[int, ...]  # for which it was found
    text: str  # of the first of them


def doubts_of(board: Leaderboard) -> list[Doubt]:
    """The doubts about a leaderboard's rows, each once for all seeds that have it.

    Runs say what they find when they end, and then know the runs that ended before them. Whether
    two are equal to the bit is therefore looked at again, over all runs of the leaderboard.
    """
    runs = [run for row in board.rows for run in row.runs]
    doubts = []
    for row in board.rows:
        found: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
        for run in row.runs:
            told = {(w.strategy, w.verdict, w.what): w.text for w in run.warnings}
            for key, text in (*told.items(), *_equal(run, runs)):
                seen = found.setdefault(key, [])
                if run.seed not in (seed for seed, _ in seen):
                    seen.append((run.seed, text))
        for seen in found.values():
            doubts.append(Doubt(row.label, tuple(seed for seed, _ in seen), seen[0][1]))
    return doubts


def _equal(run: Run, runs: list[Run]) -> Iterator[tuple[tuple[str, str, str], str]]:
    """The runs that a run equals although they have fewer strategies."""
    if len(run.tasks) < 2:  # where most strategies have nothing to do
        return
    for other in runs:
        fewer = other.strategies == BASELINE or {*other.strategies} < {*run.strategies}
        if other is run or other.seed != run.seed or not fewer:
            continue
        if run.weights is not None and (run.weights, run.matrix) == (other.weights, other.matrix):
            lacking = [n for n in run.strategies if n not in other.strategies]
            finding = same_bits("+".join(lacking), strategy_name(other), other.name, run.tasks)
            yield (finding.strategy, finding.verdict, finding.what), str(finding)
