"""One name, one meaning: every metric as a pure function of the matrix of scores."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import TypeVar

Matrix = Sequence[Sequence[float | None]]
Seed = TypeVar("Seed", bound=Hashable)

# A task whose training raised its score by no more than this over chance has learned too little
# for the share of it that is left to mean anything.
LEARNED_AT_LEAST = 0.05
NAMED_ENTRIES = 6  # of the missing ones, in a reason


class _Undefined(Exception):
    """Why a metric has no value."""


def compute_metrics(
    matrix: Matrix,
    *,
    chance: Sequence[float | None] | None = None,
    independent: Sequence[float | None] | None = None,
    test_sizes: Sequence[int] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Everything that a matrix of scores says about a run.

    With T tasks, `R[t][i]` is the score on task i (1 to T) after t tasks were trained; row 0 is
    the untrained model. `b_i` is the chance level of task i: declared, or else `R[0][i]`. `S_i` is
    the score of a model trained on task i alone.

    - `average_accuracy`: mean over i of R[T][i]
    - `average_accuracy_micro`: the same, each task weighted by the size of its test set
    - `average_anytime_accuracy`: mean over t of (mean over i ≤ t of R[t][i])
    - `average_anytime_accuracy_micro`: the same, each inner mean weighted by test size
    - `learning_accuracy`: mean over i of R[i][i]
    - `backward_transfer`: mean over i < T of R[T][i] − R[i][i]
    - `forgetting`: mean over i < T of (max over i ≤ l < T of R[l][i]) − R[T][i]
    - `forward_transfer`: mean over i ≥ 2 of R[i−1][i] − b_i
    - `intransigence`: mean over i of S_i − R[i][i]
    - `retained_learning`: mean over i < T of (R[T][i] − b_i) / (R[i][i] − b_i), over the tasks
      whose denominator exceeds 0.05

    Args:
        matrix: T + 1 rows of T scores, fractions from 0 to 1, higher is better; None where a task
            was not evaluated.
        chance: T declared chance levels; None in a place: the untrained model's score is b_i.
        independent: T scores of models that each saw one task only, on the same test sets.
        test_sizes: T numbers of test examples.

    Returns:
        The metrics, and for each one that cannot be computed the reason, which names what is
        missing. Every name is in exactly one of the two.

    Raises:
        ValueError: Something has the wrong shape, or is no score.

    Source:
        Lopez-Paz & Ranzato 2017 (average accuracy, backward and forward transfer; there b_i is a
        model with random weights), Chaudhry et al. 2018 (forgetting, intransigence), Rebuffi et
        al. 2017 (anytime accuracy, micro), Riemer et al. 2019 (learning accuracy).
    """
    scores = _Scores(matrix, chance, independent, test_sizes)
    metrics: dict[str, float] = {}
    undefined: dict[str, str] = {}
    for name, compute in _METRICS.items():
        try:
            metrics[name] = compute(scores)
        except _Undefined as reason:
            undefined[name] = str(reason)
    return metrics, undefined


class _Scores:
    """A checked matrix and its references, read with tasks counted from 1."""

    def __init__(
        self,
        matrix: Matrix,
        chance: Sequence[float | None] | None,
        independent: Sequence[float | None] | None,
        test_sizes: Sequence[int] | None,
    ) -> None:
        self.tasks = _count_tasks(matrix)
        self._matrix = [
            [_score(value, f"matrix[{t}][{i}]") for i, value in enumerate(row)]
            for t, row in enumerate(matrix)
        ]
        self._chance = self._reference(chance, "chance") or [None] * self.tasks
        self._independent = self._reference(independent, "independent")
        self._sizes = self._checked_sizes(test_sizes)

    def _reference(
        self, values: Sequence[float | None] | None, name: str
    ) -> list[float | None] | None:
        if values is None:
            return None
        if len(values) != self.tasks:
            raise ValueError(f"{name} has {len(values)} values for {self.tasks} tasks.")
        return [_score(value, f"{name}[{i}]") for i, value in enumerate(values)]

    def _checked_sizes(self, sizes: Sequence[int] | None) -> list[int] | None:
        if sizes is None:
            return None
        if len(sizes) != self.tasks:
            raise ValueError(f"test_sizes has {len(sizes)} values for {self.tasks} tasks.")
        for i, size in enumerate(sizes):
            if isinstance(size, bool) or not isinstance(size, Real) or not 0 < size < math.inf:
                raise ValueError(f"test_sizes[{i}] is {size!r}, not a positive number of examples.")
        return list(sizes)

    def entries(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """R[t][i] for pairs (t, i), all of them or none."""
        found: dict[tuple[int, int], float] = {}
        missing: list[str] = []
        for t, i in wanted:
            value = self._matrix[t][i - 1]
            if value is None:
                missing.append(f"R[{t}][{i}]")
            else:
                found[t, i] = value
        _require(missing, "not evaluated")
        return found

    def chance(self, tasks: Iterable[int]) -> dict[int, float]:
        """b_i: what was declared, or else the untrained model's score."""
        found: dict[int, float] = {}
        missing: list[str] = []
        for i in tasks:
            declared = self._chance[i - 1]
            value = self._matrix[0][i - 1] if declared is None else declared
            if value is None:
                missing.append(f"R[0][{i}]")
            else:
                found[i] = value
        _require(missing, "no chance level declared, and not evaluated")
        return found

    def independent(self) -> list[float]:
        """S_i of every task."""
        if self._independent is None:
            raise _Undefined("needs the scores of independently trained models, and none are given")
        missing = [f"S[{i}]" for i, value in enumerate(self._independent, 1) if value is None]
        _require(missing, "no score of an independently trained model")
        return [value for value in self._independent if value is not None]

    def sizes(self) -> list[int]:
        """The number of test examples of every task."""
        if self._sizes is None:
            raise _Undefined("needs the sizes of the test sets, and none are given")
        return self._sizes

    def earlier(self) -> range:
        """The tasks before the last one."""
        if self.tasks == 1:
            raise _Undefined("needs at least two tasks, and there is one")
        return range(1, self.tasks)


def _count_tasks(matrix: Matrix) -> int:
    if not matrix or not matrix[0]:
        raise ValueError("The matrix is empty; it needs T + 1 rows of T scores.")
    tasks = len(matrix) - 1
    for t, row in enumerate(matrix):
        if len(row) != tasks:
            raise ValueError(
                f"The matrix has {len(matrix)} rows and row {t} has {len(row)} scores; "
                "it needs T + 1 rows of T scores, row 0 being the untrained model."
            )
    return tasks


def _score(value: float | None, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{place} is {value!r}, not a number or None.")
    if not 0 <= value <= 1:  # also catches NaN
        raise ValueError(f"{place} is {value!r}; scores are fractions from 0 to 1.")
    return float(value)


def _require(missing: list[str], why: str) -> None:
    if not missing:
        return
    named = ", ".join(missing[:NAMED_ENTRIES])
    rest = f" and {len(missing) - NAMED_ENTRIES} more" if len(missing) > NAMED_ENTRIES else ""
    legend = " (R[t][i]: task i after t trained tasks)" if missing[0].startswith("R") else ""
    raise _Undefined(f"{why}: {named}{rest}{legend}")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    total = math.fsum(value * weight for value, weight in zip(values, weights, strict=True))
    return total / sum(weights)


def _average_accuracy(scores: _Scores) -> float:
    last = scores.tasks
    return _mean(scores.entries((last, i) for i in range(1, last + 1)).values())


def _average_accuracy_micro(scores: _Scores) -> float:
    last = scores.tasks
    final = scores.entries((last, i) for i in range(1, last + 1))
    return _weighted_mean(list(final.values()), scores.sizes())


def _seen(scores: _Scores) -> dict[tuple[int, int], float]:
    return scores.entries((t, i) for t in range(1, scores.tasks + 1) for i in range(1, t + 1))


def _average_anytime_accuracy(scores: _Scores) -> float:
    seen = _seen(scores)
    return _mean(_mean(seen[t, i] for i in range(1, t + 1)) for t in range(1, scores.tasks + 1))


def _average_anytime_accuracy_micro(scores: _Scores) -> float:
    seen, sizes = _seen(scores), scores.sizes()
    return _mean(
        _weighted_mean([seen[t, i] for i in range(1, t + 1)], sizes[:t])
        for t in range(1, scores.tasks + 1)
    )


def _learning_accuracy(scores: _Scores) -> float:
    return _mean(scores.entries((i, i) for i in range(1, scores.tasks + 1)).values())


def _backward_transfer(scores: _Scores) -> float:
    last, earlier = scores.tasks, scores.earlier()
    r = scores.entries((t, i) for i in earlier for t in (i, last))
    return _mean(r[last, i] - r[i, i] for i in earlier)


def _forgetting(scores: _Scores) -> float:
    last, earlier = scores.tasks, scores.earlier()
    r = scores.entries((t, i) for i in earlier for t in range(i, last + 1))
    return _mean(max(r[t, i] for t in range(i, last)) - r[last, i] for i in earlier)


def _forward_transfer(scores: _Scores) -> float:
    scores.earlier()  # no task comes after a first one
    later = range(2, scores.tasks + 1)
    r = scores.entries((i - 1, i) for i in later)
    b = scores.chance(later)
    return _mean(r[i - 1, i] - b[i] for i in later)


def _intransigence(scores: _Scores) -> float:
    alone = scores.independent()
    r = scores.entries((i, i) for i in range(1, scores.tasks + 1))
    return _mean(alone[i - 1] - r[i, i] for i in range(1, scores.tasks + 1))


def _retained_learning(scores: _Scores) -> float:
    last, earlier = scores.tasks, scores.earlier()
    r = scores.entries((t, i) for i in earlier for t in (i, last))
    b = scores.chance(earlier)
    shares = [
        (r[last, i] - b[i]) / (r[i, i] - b[i]) for i in earlier if r[i, i] - b[i] > LEARNED_AT_LEAST
    ]
    if not shares:
        raise _Undefined(
            f"no task before the last was learned by more than {LEARNED_AT_LEAST} over chance"
        )
    return _mean(shares)


_METRICS = {
    "average_accuracy": _average_accuracy,
    "average_accuracy_micro": _average_accuracy_micro,
    "average_anytime_accuracy": _average_anytime_accuracy,
    "average_anytime_accuracy_micro": _average_anytime_accuracy_micro,
    "learning_accuracy": _learning_accuracy,
    "backward_transfer": _backward_transfer,
    "forgetting": _forgetting,
    "forward_transfer": _forward_transfer,
    "intransigence": _intransigence,
    "retained_learning": _retained_learning,
}
METRICS = tuple(_METRICS)  # every name, in the order in which tables show them
LOWER_IS_BETTER = frozenset({"forgetting", "intransigence"})


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """The mean over seeds and the half width of its interval.

    Args:
        values: One number per seed.
        level: The share of such intervals that should cover the true mean.

    Returns:
        The mean, and the half width by Student's t with n − 1 degrees of freedom; None for one
        value, which says nothing about its spread.

    Raises:
        ValueError: There are no values, one is not finite, or the level is not between 0 and 1.

    Source:
        Student 1908, "The probable error of a mean".
    """
    if not values:
        raise ValueError("A confidence interval needs at least one value.")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"A confidence interval needs finite values, not {list(values)}.")
    if not 0 < level < 1:
        raise ValueError(f"The level of a confidence interval is between 0 and 1, not {level}.")
    mean = _mean(values)
    freedom = len(values) - 1
    if freedom == 0:
        return mean, None

    from scipy.special import (
        stdtrit,
    )  # the quantile of Student's t, without scipy.stats' half second

    variance = math.fsum((value - mean) ** 2 for value in values) / freedom
    quantile = float(stdtrit(freedom, (1 + level) / 2))
    return mean, quantile * math.sqrt(variance / len(values))


def paired_difference(
    a: Mapping[Seed, float], b: Mapping[Seed, float], level: float = 0.95
) -> tuple[float, float | None, int]:
    """How much better `a` is than `b`, seed by seed.

    Args:
        a: Seed → value of one metric.
        b: Seed → value of the same metric for the other strategy.
        level: Of the confidence interval.

    Returns:
        The mean of a − b over the seeds that both have, the half width of its interval (None for
        one seed), and the number of those seeds.

    Raises:
        ValueError: They have no seed in common.
    """
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    if not differences:
        raise ValueError(
            f"Seeds {list(a)} and {list(b)} have none in common, so nothing can be paired."
        )
    mean, half = confidence_interval(differences, level)
    return mean, half, len(differences)
