"""MAS's importance, against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from clpeft.strategies.mas import MAS, MASConfig, squared_outputs
from clpeft.strategies.per_example import mean_over_examples


def test_squared_outputs() -> None:
    logits = torch.tensor([[1.0, -2.0, -math.inf], [3.0, 0.0, 1.0]])
    # a label that does not compete says nothing
    assert squared_outputs(logits, torch.tensor([0, 2])).tolist() == [5.0, 10.0]


def test_squared_outputs_of_a_language_model_are_of_its_answers() -> None:
    logits = torch.tensor([[[1.0, 1.0], [2.0, 0.0], [0.0, 3.0]]])
    labels = torch.tensor([[-100, 1, 0]])
    assert squared_outputs(logits, labels).tolist() == [4.0 + 9.0]


def test_importance_by_hand(regression: Callable[..., Any], examples: Callable[..., Any]) -> None:
    # logits w_c x with w = (1, −3): ∂(Σ w_c² x²)/∂w_c = 2 w_c x²; x = 1 and 2: mean x² = 2.5
    run = regression((0.0, 1.0, 2.0), (1.0, -3.0))
    config = MASConfig(lambda_=1.0, examples=10, normalize="none")
    strategy = MAS(config)
    strategy.setup(run)
    for expected in ([5.0, 15.0], [10.0, 30.0]):  # every task adds its own
        strategy.after_task(run, SimpleNamespace(train=examples([[1], [2]])))  # type: ignore[arg-type]
        assert strategy._anchors.curvature[0].tolist() == expected
    assert strategy._anchors.centre[0].tolist() == [1.0, -3.0]


def test_labels_play_no_part(regression: Callable[..., Any], examples: Callable[..., Any]) -> None:
    found = []
    for labels in ([0, 0], [1, 1]):
        run = regression((0.0, 1.0, 2.0), (1.0, -3.0))
        strategy = MAS(MASConfig(lambda_=1.0, examples=10, normalize="none"))
        strategy.setup(run)
        task: Any = SimpleNamespace(train=examples([[1], [2]], labels=labels))
        strategy.after_task(run, task)
        found.append(strategy._anchors.curvature[0].tolist())
    assert found[0] == found[1]


def test_mean_is_over_absolute_gradients_of_single_examples(
    regression: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    """Two examples that pull against each other do not cancel."""
    run = regression((0.0, 1.0, -1.0), (1.0, -3.0))

    def scored(batch: Any, seeds: torch.Tensor) -> Any:
        outputs = run.objective.forward(run.model, batch)
        yield outputs.logits.sum(dim=1), torch.ones(len(batch))

    (found,) = mean_over_examples(
        run,
        examples([[1], [2]]),
        torch.abs,
        scored,
        examples=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.tolist() == [1.0, 1.0]
