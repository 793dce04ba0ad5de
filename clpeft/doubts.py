"""What makes the result of a run doubtful, from what the run left on the disk."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from clpeft.composition import settle
from clpeft.config import ConfigError, run_name
from clpeft.evidence import Exhibit, Finding, examine, same_bits
from clpeft.registry import STRATEGIES
from clpeft.rundir import RunDirectory
from clpeft.tracking.history import read_events

FINETUNE = "finetune"


def doubts(composed: DictConfig, directory: Path, results: Mapping[str, Any]) -> list[Finding]:
    """All that is found at the end of a run.

    Args:
        composed: The run's config.
        directory: The run directory. The completed runs beside it are what it is compared with.
        results: What its results.json holds or is about to hold.
    """
    found = [finding for shown in exhibits(composed, directory) for finding in shown.findings]
    return [*found, *equalities(composed, directory, results)]


def exhibits(composed: DictConfig, directory: Path) -> list[Exhibit]:
    """What a run's history shows of each of its strategies.

    A strategy of another package that is not installed here declares no evidence.
    """
    settings: Any = OmegaConf.to_container(composed.strategies, resolve=True)
    declared = {n: STRATEGIES[n].target.evidence for n in settings if n in STRATEGIES}
    return examine(read_events(directory), declared, settings)


def equalities(
    composed: DictConfig, directory: Path, results: Mapping[str, Any]
) -> Iterator[Finding]:
    """Findings that a run equals, bit by bit, what it would be without some of its strategies."""
    tasks = results["tasks"]
    if len(tasks) < 2:  # what guards against forgetting has nothing to do yet
        return
    for strategy, other in counterparts(composed):
        name = run_name(other)
        there = RunDirectory(directory.parent / name).completed_results
        if there and same_result(there, results):
            yield same_bits(strategy, "+".join(other.strategies), name, tasks)


def counterparts(composed: DictConfig) -> list[tuple[str, DictConfig]]:
    """The runs that a run has to differ from.

    Args:
        composed: The run's config.

    Returns:
        What the other run has not, and the other run's config: first all of the strategies, so that
        it is finetune, then each of several, where the others can do without it. A reference need
        not differ from anything.
    """
    names = [str(name) for name in composed.strategies]
    if all(name in STRATEGIES and STRATEGIES[name].target.is_reference for name in names):
        return []
    found = [("+".join(names), with_strategies(composed, [FINETUNE]))]
    if len(names) > 1:
        for name in names:
            others = with_strategies(composed, [other for other in names if other != name])
            with suppress(ConfigError):
                settle(others)
                found.append((name, others))
    return found


def with_strategies(composed: DictConfig, names: Sequence[str]) -> DictConfig:
    """The same run under other strategies.

    Args:
        composed: A run's config; not changed.
        names: Some of its strategies, or others that have no settings.
    """
    other = copy.deepcopy(composed)
    with flag_override(other, ["struct", "readonly"], False):
        for name in composed.strategies:
            if name not in names:
                del other.strategies[name]
        for name in names:
            if name not in other.strategies:
                other.strategies[name] = OmegaConf.structured(STRATEGIES[name].config)
    return other


def same_result(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two results.json have the same last weights and every score alike, to the bit."""
    weights = one["digests"].get("weights")  # earlier versions did not write them down
    known = weights is not None and weights == other["digests"].get("weights")
    return known and one["matrix"] == other["matrix"]
