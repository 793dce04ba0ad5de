"""What a run's history shows of its strategies: whether each did anything, and how much of it.

Pure functions over the events of history.jsonl; docs/doctor.md has the definitions and the reasons
for the thresholds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean, median
from typing import Any

from clpeft.strategies.base import Evidence

# of a penalty as a multiple of the task's own loss: more than this leaves little to learn the task
# by, and less cannot be seen beside it
TOO_STRONG, TOO_WEAK = 10.0, 1e-4
# logged steps of a task without which a median says little of it, unless they are all but the first
STEPS_FOR_MEDIAN = 5
# logged steps without which it is no wonder that a change of gradients fell between them
STEPS_FOR_GRADIENTS = 20
NAMED = 4  # tasks in a sentence, at most

Event = Mapping[str, Any]
Settings = Mapping[str, Any]


class Verdict(StrEnum):
    """What is to be thought of one piece of evidence."""

    WORKS = "works"
    NOTHING = "does nothing"
    TOO_STRONG = "too strong"
    TOO_WEAK = "too weak"
    UNJUDGED = "not judged"


@dataclass(frozen=True)
class Finding:
    """Something that makes a result doubtful."""

    strategy: str
    verdict: Verdict
    what: str  # the evidence's key, or `weights`
    tasks: tuple[str, ...]
    numbers: tuple[float, ...]  # by task, what was judged
    text: str  # what was found
    advice: str  # what to try

    def __str__(self) -> str:
        return f"{self.text} {self.advice}"


@dataclass(frozen=True)
class Amount:
    """How much of a piece of evidence one task shows."""

    task: str
    value: float | None  # what stands for the task; None where it cannot be told
    largest: float | None  # the largest of its steps; 0 is nothing
    logged: int  # steps that were looked at
    steps: int  # steps that the task has
    last: float | None = None  # what was logged last, as it was; None if nothing was


@dataclass(frozen=True)
class Exhibit:
    """One piece of evidence through a run's tasks, from the second that was trained on."""

    strategy: str
    key: str
    kind: Evidence
    amounts: tuple[Amount, ...]
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst that was found."""
        for verdict in (Verdict.NOTHING, Verdict.TOO_STRONG, Verdict.TOO_WEAK):
            if any(finding.verdict == verdict for finding in self.findings):
                return verdict
        return Verdict.WORKS if any(a.largest for a in self.amounts) else Verdict.UNJUDGED


@dataclass(frozen=True)
class TaskLog:
    """The logged steps of one task."""

    name: str
    steps: int  # that the task has
    begun: int  # steps of the run before it
    logged: tuple[Event, ...]

    def values(self, key: str, *, from_step: int = 1) -> list[float]:
        """What was logged under a key, from some step of the task on; nulls left out."""
        found = [event.get(f"train/{key}") for event in self.since(from_step)]
        return [value for value in found if value is not None]

    def since(self, step: int) -> list[Event]:
        """The logged steps from some step of the task on, counted from 1."""
        return [event for event in self.logged if event["step"] - self.begun >= step]


def task_logs(events: Iterable[Event]) -> list[TaskLog]:
    """The tasks that were trained, in their order, each with what was logged of its steps.

    Args:
        events: Of a history.jsonl. A task without a logged step is left out.
    """
    starts: dict[int, Event] = {}
    logged: dict[int, list[Event]] = {}
    for event in events:
        if event["event"] == "task_start":
            starts[event["task"]], logged[event["task"]] = event, []
        elif event["event"] == "step" and event["task"] in starts:
            logged[event["task"]].append(event)
    return [
        TaskLog(start["name"], start["steps"], start["step"], tuple(logged[index]))
        for index, start in starts.items()
        if logged[index]
    ]


def examine(
    events: Iterable[Event],
    declared: Mapping[str, Mapping[str, Evidence]],
    settings: Mapping[str, Settings],
) -> list[Exhibit]:
    """Judges every piece of evidence that strategies declare.

    Args:
        events: Of a history.jsonl.
        declared: Strategy → logged key → kind of evidence.
        settings: Strategy → its settings, for what there is to try.

    Returns:
        One exhibit per key. The first task that was trained shows nothing of a method against
        forgetting, so that a run of one task has exhibits without amounts.
    """
    logs = task_logs(events)
    return [
        _exhibit(strategy, key, kind, logs, settings.get(strategy, {}))
        for strategy, kinds in declared.items()
        for key, kind in kinds.items()
    ]


def same_bits(strategy: str, reference: str, name: str, tasks: Sequence[str]) -> Finding:
    """The finding that a run has the weights and scores of another one without some strategy.

    Args:
        strategy: Which the other run has not.
        reference: The other run's strategies.
        name: The other run's name.
        tasks: The stream's.
    """
    return Finding(
        strategy,
        Verdict.NOTHING,
        "weights",
        tuple(tasks[1:]),
        (0.0,),
        f"{strategy} does nothing: the run has the weights and scores of {reference} to the bit "
        f"({name}).",
        "Its strength may be 0, its memory empty, or its hooks never reached.",
    )


def _exhibit(
    strategy: str, key: str, kind: Evidence, logs: Sequence[TaskLog], settings: Settings
) -> Exhibit:
    amounts = [_amount(key, kind, logs[:i], logs[i]) for i in range(1, len(logs))]
    judged = [amount for amount in amounts if amount.logged]
    exhibit = Exhibit(strategy, key, kind, tuple(judged), ())
    findings = [*_nothing(exhibit, settings), *_strength(exhibit, settings)]
    return replace(exhibit, findings=tuple(findings))


def _amount(key: str, kind: Evidence, before: Sequence[TaskLog], log: TaskLog) -> Amount:
    """What one task shows: a ratio, a largest value, a mean, or a change, as its kind has it."""
    # before a task's first step nothing has moved, and what measures moves is rightly 0
    first = 2 if kind in (Evidence.PENALTY, Evidence.TERM) else 1
    values = log.values(key, from_step=first)
    sizes = [abs(value) for value in values]
    seen = len(log.since(first))
    last = values[-1] if values else None
    if not any(sizes) and kind not in (Evidence.MEMORY, Evidence.MASK):
        return Amount(log.name, 0.0, 0.0, seen, log.steps, last)
    if kind == Evidence.PENALTY:
        own = fmean(log.values("loss/task", from_step=first) or [0.0])
        if own <= 0:
            return Amount(log.name, None, max(sizes), seen, log.steps, last)
        return Amount(log.name, median(sizes) / own, max(sizes) / own, seen, log.steps, last)
    if kind == Evidence.TERM:
        return Amount(log.name, max(sizes), max(sizes), seen, log.steps, last)
    if kind == Evidence.GRADIENT:
        return Amount(log.name, fmean(sizes), max(sizes), seen, log.steps, last)
    earlier = next((found for other in reversed(before) if (found := other.values(key))), [0.0])
    moved = [abs(value - earlier[-1]) for value in values] or [0.0]
    return Amount(log.name, moved[-1], max(moved), seen, log.steps, last)


def _nothing(exhibit: Exhibit, settings: Settings) -> list[Finding]:
    """Evidence of nothing: a term that stayed 0, a memory never read, a mask that never changed."""
    amounts = exhibit.amounts
    dead = [amount for amount in amounts if amount.largest == 0]
    whole = len(dead) == len(amounts)
    if not dead:
        return []
    if exhibit.kind in (Evidence.GRADIENT, Evidence.MASK) and not whole:
        return []  # a task may give it nothing to do
    logged, steps = sum(a.logged for a in dead), sum(a.steps for a in dead)
    absent = all(amount.last is None for amount in dead)
    few = logged < min(steps, STEPS_FOR_GRADIENTS)
    if exhibit.kind == Evidence.GRADIENT and few and not absent:
        return []
    tasks = tuple(amount.task for amount in dead)
    where = "from the second task on" if whole else f"in {_named(tasks)}"
    told = _told_of_nothing(exhibit, dead[-1].last, where)
    if absent:
        told = f"{exhibit.key}, which should show it, was not logged {where}"
    return [
        Finding(
            exhibit.strategy,
            Verdict.NOTHING,
            exhibit.key,
            tasks,
            tuple(0.0 for _ in dead),
            f"{exhibit.strategy} does nothing: {told} ({logged} logged steps of {steps}).",
            _advice_on_nothing(exhibit, absent, settings),
        )
    ]


def _told_of_nothing(exhibit: Exhibit, last: float | None, where: str) -> str:
    stayed = f"{exhibit.key} stayed {0.0 if last is None else last:g}"
    return {
        Evidence.PENALTY: f"its penalty {stayed} {where}",
        Evidence.TERM: f"its {'term ' * exhibit.key.startswith('loss/')}{stayed} {where}",
        Evidence.GRADIENT: f"it changed no gradient, {stayed} {where}",
        Evidence.MEMORY: f"its memory was not read, {stayed} {where}",
        Evidence.MASK: f"its mask did not change, {stayed} {where}",
    }[exhibit.kind]


def _advice_on_nothing(exhibit: Exhibit, absent: bool, settings: Settings) -> str:
    name = exhibit.strategy
    off = [key for key, value in settings.items() if key.startswith("lambda") and value == 0]
    if exhibit.kind in (Evidence.PENALTY, Evidence.TERM) and off:
        keys = " and ".join(f"strategies.{name}.{key}" for key in off)
        return f"{keys} {'is' if len(off) == 1 else 'are'} 0: raise it."
    if absent:
        return "See that the hook that logs it is reached after the first task."
    return {
        Evidence.PENALTY: "Look at what it keeps after a task: an importance of 0, or anchors "
        f"that move along, give 0 whatever the strength ({_strengths(name, settings)}).",
        Evidence.TERM: f"Look at its settings ({_overrides(name, settings)}), and at what it keeps "
        "after a task.",
        Evidence.GRADIENT: "Either these tasks give it nothing to change, or what it compares "
        "gradients with is empty: look at what it keeps after a task.",
        Evidence.MEMORY: "See that examples are kept after a task and that a batch takes some "
        f"({_overrides(name, settings)}).",
        Evidence.MASK: "See that each task's mask is chosen anew, and that there is capacity "
        f"left to choose from ({_overrides(name, settings)}).",
    }[exhibit.kind]


def _strength(exhibit: Exhibit, settings: Settings) -> list[Finding]:
    """Penalties that are all of the loss in some task, or are lost beside it in every one."""
    if exhibit.kind != Evidence.PENALTY:
        return []
    known = [(a, a.value, a.largest) for a in exhibit.amounts if a.value is not None and a.largest]
    strong = [
        (a.task, value)
        for a, value, _ in known
        if value > TOO_STRONG and a.logged >= min(STEPS_FOR_MEDIAN, a.steps - 1)
    ]
    if strong:
        return [_too_strong(exhibit, strong, settings)]
    weak = [(a.task, largest) for a, _, largest in known if largest and largest < TOO_WEAK]
    if weak and len(weak) == len(known):
        return [_too_weak(exhibit, weak, settings)]
    return []


def _too_strong(
    exhibit: Exhibit, strong: Sequence[tuple[str, float]], settings: Settings
) -> Finding:
    tasks, ratios = zip(*strong, strict=True)
    most = max(ratios)
    return Finding(
        exhibit.strategy,
        Verdict.TOO_STRONG,
        exhibit.key,
        tasks,
        ratios,
        f"{exhibit.strategy} is too strong: its penalty {exhibit.key} was {rounded(most, 3)} × "
        f"the task's own loss in {_named(tasks)}, so that little else is learned.",
        f"Lower its strength ({_strengths(exhibit.strategy, settings)}): divided by "
        f"{rounded(most, 1)}, the two would be about equal.",
    )


def _too_weak(exhibit: Exhibit, weak: Sequence[tuple[str, float]], settings: Settings) -> Finding:
    tasks, ratios = zip(*weak, strict=True)
    most = max(ratios)
    factor = 10 ** math.ceil(math.log10(0.01 / most))
    return Finding(
        exhibit.strategy,
        Verdict.TOO_WEAK,
        exhibit.key,
        tasks,
        ratios,
        f"{exhibit.strategy} is too weak: its penalty {exhibit.key} was at most "
        f"{rounded(most, 1)} × the task's own loss from the second task on.",
        f"Raise its strength ({_strengths(exhibit.strategy, settings)}): {factor:g} times as much "
        f"would make it about a hundredth of the task's loss.",
    )


def rounded(number: float, digits: int) -> str:
    """A number with so many digits that count: 1600, 0.016, 1.6e-07."""
    return f"{float(f'{number:.{digits}g}'):g}"


def _strengths(name: str, settings: Settings) -> str:
    """What a penalty is multiplied by, as overrides: λ, else α; all settings where it has neither.

    Beside a λ an α is something else, such as the weight of a running mean.
    """
    for beginning in ("lambda", "alpha"):
        if found := {k: v for k, v in settings.items() if k.startswith(beginning) and v}:
            return _overrides(name, found)
    return _overrides(name, settings)


def _overrides(name: str, settings: Settings) -> str:
    """Settings of a strategy, as a command line would have them."""
    shown = [
        f"strategies.{name}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]
    return " ".join(shown) or f"{name} has no settings"


def _named(tasks: Sequence[str]) -> str:
    more = f" and {len(tasks) - NAMED} more" if len(tasks) > NAMED else ""
    return ", ".join(tasks[:NAMED]) + more
