"""Choosing settings by validation scores: for each strategy, the one that did best."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from clpeft.catalogue import catalogue
from clpeft.config import ConfigError, flatten, nearest
from clpeft.evaluation.metrics import LOWER_IS_BETTER, METRICS
from clpeft.reports.aggregate import DIGITS, RANKED_BY, Estimate, Leaderboard, Row
from clpeft.reports.naming import differing_keys, settings, strategy_name
from clpeft.reports.runs import Run
from clpeft.sweeps import expand

SPLIT = "validation"  # the only one that settings are chosen on
# how a run was scored while settings were chosen, which its repetition on test data leaves out
OF_CHOOSING = {"evaluation.split", "evaluation.untrained", "evaluation.ahead"}
# group → the key that holds the option's name
NAMED_BY = {
    "model": "model.name",
    "peft": "peft.method",
    "quantization": "quantization.method",
    "stream": "stream.name",
    "optimizer": "optimizer.name",
    "scheduler": "scheduler.name",
}


@dataclass(frozen=True)
class Winner:
    """The best setting of one strategy on one leaderboard."""

    board: str  # its title
    strategy: str
    row: Row
    score: Estimate
    compared: tuple[Row, ...]  # all settings that it was chosen from, itself among them
    equal: int  # how many others have the same score
    left_out: tuple[str, ...]  # settings that lack a seed or the metric, and so were not compared
    swept: dict[str, str]  # its values of the keys that the compared settings differ in

    @property
    def settings(self) -> int:
        """How many were compared."""
        return len(self.compared)


def select(boards: Sequence[Leaderboard], metric: str = RANKED_BY) -> list[Winner]:
    """Picks the setting with the best mean of a metric, for each strategy of each leaderboard.

    Only settings that were run with all seeds which any setting of the strategy was run with are
    compared: one that was run once may have been lucky once. Of equal ones the first by label.

    Args:
        boards: The leaderboards of runs that were scored on validation data.
        metric: By which.

    Returns:
        One per leaderboard and strategy, in the leaderboards' order; references among them.

    Raises:
        ConfigError: If a run was scored on test data, there is no such metric, or no setting of a
            strategy was run with all seeds.
    """
    if metric not in METRICS:
        raise ConfigError(f"--by {metric} is no metric.{nearest(metric, METRICS)}")
    for board in boards:
        for run in (run for row in board.rows for run in row.runs):
            if run.split != SPLIT:
                raise ConfigError(
                    f"{run.directory} was scored on {run.split} data, by which no setting may be "
                    f"chosen; report on runs with evaluation.split={SPLIT} (experiment=tune) only."
                )
    winners = []
    for board in boards:
        by_strategy: dict[str, list[Row]] = {}
        for row in board.rows:
            by_strategy.setdefault(strategy_name(row.runs[0]), []).append(row)
        winners += [_winner(board.title, name, rows, metric) for name, rows in by_strategy.items()]
    return winners


def _winner(board: str, strategy: str, rows: Sequence[Row], metric: str) -> Winner:
    seeds = {seed for row in rows for seed in row.seeds}
    compared = [
        row
        for row in rows
        if {*row.seeds} == seeds and row.metrics.get(metric, _NONE).n == len(seeds)
    ]
    if not compared:
        wanted = ",".join(map(str, sorted(seeds)))
        raise ConfigError(
            f"No setting of {strategy} has {metric} for all of the seeds {wanted}, so that none "
            f"can be called best; run the missing ones."
        )
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def rank(row: Row) -> tuple[float, str]:
        return sign * round(row.metrics[metric].mean, DIGITS), row.label

    best = min(compared, key=rank)
    return Winner(
        board=board,
        strategy=strategy,
        row=best,
        score=best.metrics[metric],
        compared=tuple(compared),
        equal=sum(rank(row)[0] == rank(best)[0] for row in compared) - 1,
        left_out=tuple(row.label for row in rows if row not in compared),
        swept=_swept(best, compared),
    )


def _swept(best: Row, compared: Sequence[Row]) -> dict[str, str]:
    own = settings(best.runs[0])
    keys = differing_keys([settings(row.runs[0]) for row in compared])
    return {key: own[key] for key in keys}


_NONE = Estimate(0.0, None, 0)


def command(row: Row) -> str:
    """The command line that repeats a family of runs, scored on test data.

    Args:
        row: The family.

    Returns:
        The line. It leaves out what is the default, and where runs, caches and logs go.
    """
    run = row.runs[0]
    seeds = ",".join(map(str, row.seeds))
    flags = ["-m"] if len(row.seeds) > 1 else []
    return shlex.join(["clpeft", *flags, *overrides(run), f"seed={seeds}"])


def overrides(run: Run) -> list[str]:
    """The overrides that give a run's settings, but for its seed and how it was scored."""
    names = run.strategies
    given = [f"strategy={names[0] if len(names) == 1 else '[' + ','.join(names) + ']'}"]
    wanted = settings(run) | _data(run)
    default = _composed(given)
    known = catalogue()
    for group, key in NAMED_BY.items():
        option = wanted.get(key)
        if option != default.get(key) and option in {item.name for item in known[group]}:
            given.append(f"{group}={option}")
    base = _composed(given)
    for key, value in wanted.items():
        if key not in OF_CHOOSING and base.get(key) != value:
            given.append(f"{'' if key in base else '+'}{key}={_written(value)}")
    return given


def _data(run: Run) -> dict[str, str]:
    place = run.config.get("paths", {}).get("data_dir")
    return {} if place is None else {"paths.data_dir": str(place)}


def _composed(given: Sequence[str]) -> dict[str, str]:
    (planned,) = expand(given)
    plain: Any = OmegaConf.to_container(planned.composed, resolve=True)
    return flatten(plain)


def _written(value: str) -> str:
    """A value as Hydra reads it: bare where that is safe, or else quoted."""
    if re.fullmatch(r"[\w./+-]*", value) or value.startswith("["):
        return value or "''"
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def print_winners(winners: Sequence[Winner], metric: str, console: Console) -> None:
    """Prints each winner with its score and the command that repeats it on test data.

    Args:
        winners: From `select`.
        metric: By which they were chosen.
        console: Where to.
    """
    told = metric.replace("_", " ")
    console.print(f"[bold]Chosen by {told} on {SPLIT} data[/]")
    for winner in winners:
        how = f"best of {winner.settings}" if winner.settings > 1 else "the only setting"
        if winner.equal:
            how += f", as good as {winner.equal} other{'s' if winner.equal > 1 else ''}"
        score = f"{winner.score.text()}, n = {winner.score.n}, {how}; {winner.board}"
        console.print(f"[cyan]{escape(winner.strategy)}[/] {escape(score)}", highlight=False)
        for label in winner.left_out:
            text = f"  not compared, for want of seeds or of the metric: {label}"
            console.print(text, style="yellow", markup=False, highlight=False)
        # plain and unbroken, to be copied
        line = command(winner.row)
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print()
