"""What leaderboards and their rows are called: by what tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from clpeft.config import RESULT_KEYS, flatten
from clpeft.reports.runs import Run

# how often a run is saved changes nothing that is compared
IGNORED_PREFIXES = ("training.checkpoint.",)


def settings(run: Run) -> dict[str, str]:
    """The part of a run's config that can change its result, flat."""
    chosen = {key: run.config[key] for key in RESULT_KEYS if key in run.config}
    return {k: v for k, v in flatten(chosen).items() if not k.startswith(IGNORED_PREFIXES)}


def differing_keys(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys of flat configs that do not have one value in all of them."""
    keys = sorted({key for config in configs for key in config})
    return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def strategy_name(run: Run) -> str:
    """The strategies of a run as a table names them: `ewc+replay`."""
    return "+".join(run.strategies) or "none"


def board_titles(runs: Sequence[Run]) -> list[str]:
    """One title per leaderboard, with as much in it as tells them apart."""
    titles = []
    for run in runs:
        order = f" {run.order}" if run.order else ""
        split = "" if run.split == "test" else f", {run.split} split"
        titles.append(f"{run.stream}{order}, {run.scenario}-incremental, {run.model}{split}")
    details: list[Callable[[Run], str]] = [
        lambda run: run.task_type,
        lambda run: f"scored by {run.mode}",
        lambda run: f"{len(run.tasks)} tasks",
        lambda run: f"tasks {', '.join(run.tasks)}",
        lambda run: f"test sizes {', '.join(map(str, run.test_sizes or ()))}",
        lambda run: f"examples {run.test[:8]}",
        lambda run: f"base {run.base}",
    ]
    for detail in details:
        for shared in {title for title in titles if titles.count(title) > 1}:
            same = [i for i, title in enumerate(titles) if title == shared]
            if len({detail(runs[i]) for i in same}) > 1:
                for i in same:
                    titles[i] += f", {detail(runs[i])}"
    return titles


def unique(names: Sequence[str]) -> list[str]:
    """Names of which no two are equal: the second `a` becomes `a-2`."""
    seen: dict[str, int] = {}
    told = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        told.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return told


def row_labels(families: Sequence[Sequence[Run]]) -> list[str]:
    """The families' strategies, followed by what tells apart those that have the same."""
    labels = [strategy_name(family[0]) for family in families]
    for label in {label for label in labels if labels.count(label) > 1}:
        same = [i for i, other in enumerate(labels) if other == label]
        configs = [settings(families[i][0]) for i in same]
        keys = differing_keys(configs)
        for i, config in zip(same, configs, strict=True):
            told = ", ".join(f"{_short(key, keys)}={config.get(key, '(none)')}" for key in keys)
            labels[i] = f"{label} ({told or families[i][0].family})"
    # the same config under two digests, as two versions of clpeft may write it
    return [
        label if labels.count(label) == 1 else f"{label} [{family[0].family}]"
        for label, family in zip(labels, families, strict=True)
    ]


def _short(key: str, keys: Iterable[str]) -> str:
    """The last part of a key, or all of it where another key ends alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key
