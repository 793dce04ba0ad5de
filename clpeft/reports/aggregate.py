"""Leaderboards: families of runs side by side, each a mean and an interval over its seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clpeft.evaluation.metrics import (
    LOWER_IS_BETTER,
    METRICS,
    compute_metrics,
    confidence_interval,
    paired_difference,
)
from clpeft.reports.naming import board_titles, row_labels, settings, unique
from clpeft.reports.runs import Matrix, Run

RANKED_BY = "average_accuracy"
BASELINE = ("finetune",)  # what the other strategies are compared with
INDEPENDENT = ("independent",)  # whose diagonal is the S_i of intransigence
DPI = 150  # of the pictures
DIGITS = 3  # after the point, wherever a score is shown
# what two runs must share for one to be the other's baseline, besides their setting
TRAINING_KEYS = ("optimizer", "scheduler", "training")


@dataclass(frozen=True)
class Estimate:
    """A number over seeds: its mean and the half width of its 95 % interval."""

    mean: float
    half_width: float | None  # None for one seed
    n: int

    def text(self, *, signed: bool = False) -> str:
        """`0.912 ± 0.034`; without the interval where there is one seed only."""
        sign = "+" if signed else ""
        mean = f"{self.mean:{sign}z.{DIGITS}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{DIGITS}f}"


@dataclass(frozen=True)
class Row:
    """One family of runs: the same in everything but the seed."""

    label: str
    runs: tuple[Run, ...]  # one per seed, in order of seed
    scores: tuple[dict[str, float], ...]  # the metrics of each of them
    metrics: dict[str, Estimate]
    undefined: dict[str, str]
    differences: dict[str, Estimate]  # to the baseline, paired by seed
    baseline: str | None  # the label of the family that `differences` and `step_ratio` refer to
    cost: dict[str, float]

    @property
    def bound(self) -> bool:
        """Whether this is a reference rather than a contender."""
        return self.runs[0].bound

    @property
    def task_id_given(self) -> bool:
        """Whether the model was told at test which task an example is of."""
        return self.runs[0].task_id_given

    @property
    def seeds(self) -> list[int]:
        """The seeds that were run."""
        return [run.seed for run in self.runs]

    def mean_matrix(self) -> Matrix:
        """The matrix averaged over seeds; None where any seed has no score."""
        return [
            [
                _mean([value for value in values if value is not None])
                if None not in values
                else None
                for values in zip(*rows, strict=True)
            ]
            for rows in zip(*(run.matrix for run in self.runs), strict=True)
        ]


@dataclass(frozen=True)
class Leaderboard:
    """Families that were scored on the same thing."""

    title: str
    slug: str  # the title as a part of a file name; unique in a report
    tasks: tuple[str, ...]
    contenders: tuple[Row, ...]  # best first
    bounds: tuple[Row, ...]  # references, best first; never called best

    @property
    def rows(self) -> tuple[Row, ...]:
        """The references, then the contenders."""
        return self.bounds + self.contenders

    @property
    def metrics(self) -> list[str]:
        """The metrics that any family has, in the order in which tables show them."""
        return [name for name in METRICS if any(name in row.metrics for row in self.rows)]

    def best(self, metric: str) -> set[str]:
        """The labels of the contenders that lead in a metric.

        More than one where they are equal in the digits that are shown; none where all are
        equal, or only one has a value, because there is nothing to be better than.
        """
        shown = {
            row.label: round(row.metrics[metric].mean, DIGITS)
            for row in self.contenders
            if metric in row.metrics
        }
        if len({*shown.values()}) < 2:
            return set()
        top = min(shown.values()) if metric in LOWER_IS_BETTER else max(shown.values())
        return {label for label, value in shown.items() if value == top}


def leaderboards(runs: Sequence[Run]) -> list[Leaderboard]:
    """Sorts runs into leaderboards.

    Runs share a leaderboard when they were scored on the same thing: stream, order of tasks,
    scenario, base model, split, way of scoring, and the very examples. Its rows are families.

    Args:
        runs: Any completed runs.

    Returns:
        The leaderboards, in the order of their titles.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_comparable(run), []).append(run)
    titles = board_titles([group[0] for group in groups.values()])
    slugs = unique([re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in titles])
    boards = [
        _leaderboard(title, slug, group)
        for title, slug, group in zip(titles, slugs, groups.values(), strict=True)
    ]
    return sorted(boards, key=lambda board: (board.title, board.slug))


def _comparable(run: Run) -> str:
    same: list[Any] = [run.stream, run.tasks, run.scenario, run.model, run.task_type, run.split]
    same += [run.mode, run.test_sizes, run.scorers, run.test, run.base]
    return json.dumps(same)


def _leaderboard(title: str, slug: str, runs: Sequence[Run]) -> Leaderboard:
    families: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        families.setdefault(run.family, []).append(run)
    labels = row_labels(list(families.values()))
    scored = {
        label: {run.seed: _complete_metrics(run, runs) for run in family}
        for label, family in zip(labels, families.values(), strict=True)
    }
    by_label = dict(zip(labels, families.values(), strict=True))
    rows = [_row(label, by_label, scored) for label in labels]
    rows.sort(key=_rank)
    return Leaderboard(
        title=title,
        slug=slug,
        tasks=runs[0].tasks,
        contenders=tuple(row for row in rows if not row.bound),
        bounds=tuple(row for row in rows if row.bound),
    )


def _rank(row: Row) -> tuple[bool, float, str]:
    score = row.metrics.get(RANKED_BY)
    return (score is None, 0.0 if score is None else -score.mean, row.label)


def _same_training(a: Run, b: Run) -> bool:
    own, other = settings(a), settings(b)
    return all(
        own.get(key) == other.get(key)
        for key in {*own, *other}
        if key.partition(".")[0] in TRAINING_KEYS
    )


def _complete_metrics(run: Run, runs: Sequence[Run]) -> tuple[dict[str, float], dict[str, str]]:
    """A run's metrics with the intransigence that needs another run."""
    alone, reason = _independent_scores(run, runs)
    metrics, undefined = compute_metrics(
        run.matrix, chance=run.chance, independent=alone, test_sizes=run.test_sizes
    )
    if alone is None:
        undefined["intransigence"] = reason
    return metrics, undefined


def _independent_scores(run: Run, runs: Sequence[Run]) -> tuple[list[float | None] | None, str]:
    """The S_i for a run: from the independent run of its setting and seed; or why there are none.

    Where several fit, that with the run's own optimizer, scheduler and training does.
    """
    if run.strategies == INDEPENDENT:
        return None, "the independent runs are themselves the reference"
    fitting = [
        other
        for other in runs
        if other.strategies == INDEPENDENT
        and (other.setting, other.seed) == (run.setting, run.seed)
    ]
    if len(fitting) > 1:
        fitting = [other for other in fitting if _same_training(run, other)]
        if len(fitting) != 1:
            return None, "several independent runs of this setting and seed, none trained alike"
    if fitting:
        diagonal = [fitting[0].matrix[i + 1][i] for i in range(len(run.tasks))]
        return diagonal, ""
    if "independent" in run.references:
        return run.references["independent"], ""
    return None, "no completed independent run of the same setting and seed"


def _row(
    label: str,
    families: Mapping[str, Sequence[Run]],
    scored: Mapping[str, Mapping[int, tuple[dict[str, float], dict[str, str]]]],
) -> Row:
    runs = families[label]
    metrics: dict[str, Estimate] = {}
    undefined: dict[str, str] = {}
    for name in METRICS:
        values = [found[name] for found, _ in scored[label].values() if name in found]
        if values:
            metrics[name] = _estimate(values)
        if len(values) < len(runs):
            undefined[name] = _reason(
                {seed: why[name] for seed, (_, why) in scored[label].items() if name in why},
                len(runs),
            )
    baseline = _baseline(label, families, scored)
    return Row(
        label=label,
        runs=tuple(runs),
        scores=tuple(scored[label][run.seed][0] for run in runs),
        metrics=metrics,
        undefined=undefined,
        differences={} if baseline is None else _differences(scored[label], scored[baseline]),
        baseline=baseline,
        cost=_cost(runs, [] if baseline is None else families[baseline]),
    )


def _reason(by_seed: Mapping[int, str], seeds: int) -> str:
    """Why a metric is undefined, naming the seeds where it is not so for all."""
    reasons = sorted({*by_seed.values()})
    if len(by_seed) == seeds and len(reasons) == 1:
        return reasons[0]
    parts = []
    for reason in reasons:
        named = [str(seed) for seed, why in by_seed.items() if why == reason]
        parts.append(f"seed {', '.join(named)}: {reason}")
    return "; ".join(parts)


def _baseline(
    label: str,
    families: Mapping[str, Sequence[Run]],
    scored: Mapping[str, Mapping[int, tuple[dict[str, float], dict[str, str]]]],
) -> str | None:
    """The fine-tuning family that a family is compared with; None for itself and without any.

    Where several fine-tuning families share a leaderboard, it is the one with the same setting
    and training; where none has, the best of them, which is the hardest to beat.
    """
    run = families[label][0]
    if run.strategies == BASELINE:
        return None
    seeds = {other.seed for other in families[label]}
    candidates = [
        name
        for name, family in families.items()
        if family[0].strategies == BASELINE and seeds & {other.seed for other in family}
    ]
    alike = [
        name
        for name in candidates
        if families[name][0].setting == run.setting and _same_training(run, families[name][0])
    ]
    pool = alike or candidates

    def average(name: str) -> float:
        values = [found[RANKED_BY] for found, _ in scored[name].values() if RANKED_BY in found]
        return _mean(values) if values else -1.0

    return max(pool, key=average) if pool else None


def _differences(
    own: Mapping[int, tuple[dict[str, float], dict[str, str]]],
    other: Mapping[int, tuple[dict[str, float], dict[str, str]]],
) -> dict[str, Estimate]:
    differences = {}
    for name in METRICS:
        a = {seed: found[name] for seed, (found, _) in own.items() if name in found}
        b = {seed: found[name] for seed, (found, _) in other.items() if name in found}
        if {*a} & {*b}:
            differences[name] = Estimate(*paired_difference(a, b))
    return differences


def _cost(runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, float]:
    """Means over seeds, except the peak of memory, which is the highest of all."""
    cost: dict[str, float] = {}
    for name in (
        *("train_seconds", "strategy_seconds", "evaluation_seconds", "total_seconds"),
        *("seconds_per_step", "steps_per_second"),
        *("trained_bytes", "adapter_bytes", "base_bytes"),
    ):
        values = [run.cost[name] for run in runs if run.cost.get(name) is not None]
        if values:
            cost[name] = _mean(values)
    peaks = [run.cost["peak_memory_bytes"] for run in runs if run.cost.get("peak_memory_bytes")]
    if peaks:
        cost["peak_memory_bytes"] = max(peaks)
    # what a strategy keeps grows over tasks; what it ends with is its price
    states = [run.cost["state_bytes"][-1] for run in runs if run.cost.get("state_bytes")]
    if states:
        cost["state_bytes"] = _mean(states)
    steps = {run.seed: run.cost.get("seconds_per_step") for run in baseline}
    ratios = [
        run.cost["seconds_per_step"] / steps[run.seed]
        for run in runs
        if run.cost.get("seconds_per_step") and steps.get(run.seed)
    ]
    if ratios:
        cost["step_ratio"] = _mean(ratios)
    return cost


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(*confidence_interval(values), len(values))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
