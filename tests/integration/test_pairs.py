"""Every two strategies together: both act, or the combination is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import defines
from tests.running import compose_only, run_it
from tests.settings import STRATEGY_SETTINGS, models_of

NAMES = [n for n in sorted(STRATEGY_SETTINGS) if not STRATEGIES[n].target.is_reference]
PAIRS = list(combinations(NAMES, 2))
# a ring through all strategies, so that each is tried with two others; and those of the issues
RING = {tuple(sorted(pair)) for pair in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)}
QUICK = RING | {("ewc", "replay"), ("agem", "si"), ("lwf", "prioritized_replay")}
QUICK |= {("er_ace", "lwf")}  # changes which labels compete; is about those that do not


def reason(one: str, other: str) -> str | None:
    """Why two strategies are declared not to go together; None if they do."""
    first, second = STRATEGIES[one].target, STRATEGIES[other].target
    if other in first.conflicts or one in second.conflicts:
        return first.conflicts.get(other) or second.conflicts[one]
    if first.owns_adapters and second.owns_adapters:
        return "each swaps or grows the adapter itself"
    if not first.task_types & second.task_types:
        return "there is no kind of model for both"
    if all(defines(cls(None), "compute_gradients") for cls in (first, second)):
        return "each replaces forward and backward"
    return None


def supporters(pair: tuple[str, str]) -> list[str]:
    """What else a pair needs: one that rehearses, where it is only screened or looked on."""
    if any(STRATEGIES[name].target.rehearses for name in pair):
        return []
    wanted = [STRATEGY_SETTINGS[name].beside for name in pair]
    return [name for name in wanted if name is not None]


@pytest.mark.parametrize("pair", [p for p in PAIRS if reason(*p) is not None], ids="+".join)
def test_pair_that_is_declared_impossible_is_refused(
    tiny: Callable[..., list[str]], pair: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        settle(compose_only(tiny("+".join(pair), model=models_of(pair[0])[0])))

    message = str(refusal.value)
    assert all(name in message for name in pair) or "model.task_type" in message
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, marks=[] if pair in QUICK else [pytest.mark.slow])
        for pair in PAIRS
        if reason(*pair) is None
    ],
    ids="+".join,
)
def test_pair_acts_together(
    tiny: Callable[..., list[str]], tmp_path: Path, pair: tuple[str, str]
) -> None:
    short = ("stream.num_tasks=2", "stream.train_size=24", "training.epochs=2")
    outcome = run_it(tiny("+".join([*pair, *supporters(pair)]), *short), tmp_path / "run")

    for name in pair:
        setting = STRATEGY_SETTINGS[name]
        # what another strategy leaves it to do may be to look on
        traces = [trace for trace in (setting.trace, setting.beside_replay) if trace]
        values = [step.get(trace, 0.0) for step in outcome.steps(1) for trace in traces]
        assert any(value != 0.0 for value in values), f"{name} left no trace"
