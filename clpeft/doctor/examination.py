"""What the files of a run, and of those beside it, show of its strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig

from clpeft.config import run_name
from clpeft.doubts import counterparts, doubts, exhibits, same_result
from clpeft.evidence import Exhibit, Finding, TaskLog, Verdict, task_logs
from clpeft.rundir import RunDirectory
from clpeft.tracking.history import read_events


@dataclass(frozen=True)
class Comparison:
    """A run beside one without some of its strategies."""

    strategy: str  # what the other run has not
    reference: str  # the other run's strategies
    same: bool  # the weights and every score, bit by bit
    distance: float | None  # ‖θ − θ'‖ / ‖θ'‖; None where the parameters are others, or not kept
    learned: tuple[float | None, float | None]  # learning accuracy of this run and of the other
    step_ratio: float | None  # seconds of a step after the first task, this run's by the other's


@dataclass(frozen=True)
class Examination:
    """All that is found of one run."""

    title: str
    strategies: tuple[str, ...]
    exhibits: tuple[Exhibit, ...]
    comparisons: tuple[Comparison, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]  # what could not be looked at

    @property
    def healthy(self) -> bool:
        """Whether nothing says that a strategy does nothing."""
        return all(finding.verdict != Verdict.NOTHING for finding in self.findings)


def examination(composed: DictConfig, directory: Path) -> Examination:
    """What the files of a run, and of those beside it, show.

    Args:
        composed: The run's config.
        directory: Its directory.
    """
    record = RunDirectory(directory)
    shown = exhibits(composed, directory)
    results = record.completed_results
    logs = task_logs(read_events(directory))
    names = [str(name) for name in composed.strategies]
    notes = [
        f"{name} declares no evidence, so that only weights and results can be compared."
        for name in names
        if not any(exhibit.strategy == name for exhibit in shown)
    ]
    if len(logs) < 2:
        notes.append("Fewer than two tasks were trained, and a strategy shows from the second on.")
    comparisons: list[Comparison] = []
    if results:
        findings = doubts(composed, directory, results)
        for strategy, other in counterparts(composed):
            there = directory.parent / run_name(other)
            if RunDirectory(there).completed_results:
                comparisons.append(compare(strategy, directory, there, logs))
            else:
                notes.append(
                    f"Weights and scores are not compared with those of "
                    f"{'+'.join(other.strategies)}: there is no completed run of the same settings "
                    f"in {there}."
                )
    else:
        findings = [finding for exhibit in shown for finding in exhibit.findings]
        notes.append("The run is not completed, so its weights and scores are not compared.")
    steps = sum(log.steps for log in logs)
    title = f"{'+'.join(names)} on {composed.stream.name}, {composed.model.name}: "
    title += f"{len(logs)} tasks, {steps} steps, seed {composed.seed}"
    return Examination(
        title, tuple(names), tuple(shown), tuple(comparisons), tuple(findings), tuple(notes)
    )


def compare(strategy: str, directory: Path, there: Path, logs: Sequence[TaskLog]) -> Comparison:
    """How far a run is from another, completed one."""
    from clpeft.training.checkpoint import last_parameters

    own, other = RunDirectory(directory).results, RunDirectory(there).results
    seconds = [step_seconds(found) for found in (logs, task_logs(read_events(there)))]
    return Comparison(
        strategy,
        "+".join(other["strategies"]),
        same_result(own, other),
        distance(last_parameters(directory), last_parameters(there)),
        (own["metrics"].get("learning_accuracy"), other["metrics"].get("learning_accuracy")),
        seconds[0] / seconds[1] if seconds[0] and seconds[1] else None,
    )


def distance(parameters: dict[str, Any], others: dict[str, Any]) -> float | None:
    """‖θ − θ'‖ / ‖θ'‖ over named tensors; None where their names or shapes differ."""
    shapes, other_shapes = (
        {name: tensor.shape for name, tensor in tensors.items()} for tensors in (parameters, others)
    )
    if shapes != other_shapes:
        return None
    apart = norm = 0.0
    for name, there in others.items():
        apart += float((parameters[name].double() - there.double()).square().sum())
        norm += float(there.double().square().sum())
    return (apart / norm) ** 0.5 if norm else None


def step_seconds(logs: Sequence[TaskLog]) -> float | None:
    """Seconds of a step after the first task: the median over pairs of logged steps.

    Unlike a mean, it is not moved by a checkpoint or by the pause before a resume.
    """
    found = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for log in logs[1:]
        for before, after in zip(log.logged, log.logged[1:], strict=False)
    ]
    return median(found) if found else None
