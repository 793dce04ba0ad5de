"""Every strategy with every PEFT method, base and kind of model: it trains, or it is refused.

CI runs a sample in which each strategy and each PEFT method meets each kind of base and of model;
`make test-matrix` runs all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clpeft.combinations import MODELS, QUANTIZATIONS, Cell, cells, table, verdict
from clpeft.composition import settle
from clpeft.config import ConfigError
from tests.running import compose_only, run_it
from tests.settings import PEFT_SETTINGS, STRATEGY_SETTINGS, TINY

ALL = cells()
STRATEGIES = list(dict.fromkeys(cell.strategy for cell in ALL))
METHODS = list(dict.fromkeys(cell.peft for cell in ALL))
KINDS = [(quantization, kind) for quantization in QUANTIZATIONS for kind in MODELS]
SHORT = (
    "stream.num_tasks=2",
    "stream.train_size=16",
    "stream.validation_size=4",
    "stream.test_size=4",
    "training.epochs=1",
    "training.checkpoint.enabled=false",
    "evaluation.ahead=false",
)


def in_sample(cell: Cell) -> bool:
    """One PEFT method for each strategy and kind, another one for the next strategy or kind."""
    kind = KINDS.index((cell.quantization, cell.task_type))
    turn = STRATEGIES.index(cell.strategy) - METHODS.index(cell.peft) + 5 * kind
    return turn % len(METHODS) == 0


def test_sample_covers_every_strategy_and_method() -> None:
    sample = [cell for cell in ALL if in_sample(cell)]
    for kind in KINDS:
        met = [cell for cell in sample if (cell.quantization, cell.task_type) == kind]
        assert {cell.strategy for cell in met} == set(STRATEGIES)
        assert {cell.peft for cell in met} == set(METHODS)


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=[] if in_sample(cell) else [pytest.mark.slow]) for cell in ALL],
    ids=str,
)
def test_it_trains_or_is_refused(
    cell: Cell, bases: Callable[[str], Path], cache_dir: Path, tmp_path: Path
) -> None:
    found = verdict(cell)
    asked = [*found.overrides, *TINY, *SHORT]
    if found.refusal is not None:
        with pytest.raises(ConfigError) as refusal:
            settle(compose_only(asked))
        assert str(refusal.value) == found.refusal
        assert "\n" not in found.refusal
        assert any(name in found.refusal for name in (cell.strategy, f"peft={cell.peft}"))
        return
    small = STRATEGY_SETTINGS[cell.strategy].overrides + PEFT_SETTINGS[cell.peft].overrides
    model = MODELS[cell.task_type][0]
    if cell.quantization != "none":  # narrower layers are left in floating point
        model = model.replace("tiny", "wide")
    where = [f"model.path={bases(model)}", f"paths.cache_dir={cache_dir}"]
    outcome = run_it([*asked, *small, *where], tmp_path / "run")

    assert outcome.status["status"] == "completed"
    assert outcome.run.config.quantization.method == cell.quantization
    in_four_bits = any(type(m).__name__ == "Params4bit" for m in outcome.run.model.parameters())
    assert in_four_bits == (cell.quantization == "nf4")
    matrix = outcome.results["matrix"]
    if cell.strategy != "joint":  # which trains once, at the end
        assert [[score is None for score in row] for row in matrix[1:]] == [
            [False, True],
            [False, False],
        ]
    assert all(0 <= score <= 1 for row in matrix for score in row if score is not None)
    losses = [step["train/loss/task"] for step in outcome.logged_steps]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    trained = outcome.trainable
    assert trained
    assert any(not torch.equal(outcome.before[name], trained[name]) for name in trained)


def test_every_cell_of_the_table_is_accounted_for() -> None:
    lines = list(table())
    rows = lines[2 : 2 + len(STRATEGIES)]
    run = sum(
        # a capital letter stands for two: on a plain base and on a quantized one
        sum(2 if mark.isupper() else 1 for mark in cell.strip() if mark.isalpha())
        for row in rows
        for cell in row.split("|")[2:-1]
    )
    assert run == sum(verdict(cell).refusal is None for cell in ALL)
    refused = sum(int(line.rpartition("(")[2].rstrip(")")) for line in lines if line[:2] == "- ")
    assert run + refused == len(ALL)
