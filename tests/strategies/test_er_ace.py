"""ER-ACE's two competitions, against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from clpeft import experiment
from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.models.objective import ClassificationObjective
from clpeft.strategies.er_ace import ERACE, ERACEConfig, asymmetric_candidates
from clpeft.strategies.replay import Replay, ReplayConfig
from clpeft.streams.batching import Columns
from tests.running import compose_only, run_it
from tests.stepping import backward

Examples = Callable[..., Any]
MEMORY: dict[str, Any] = {"memory_size": 10, "selection": "reservoir", "budget": "total"}


def test_candidates_by_hand() -> None:
    found = asymmetric_candidates(
        torch.tensor([True, False]), torch.tensor([False, True, True, False])
    )
    assert found.tolist() == [[False, True, True, False], [True, True, True, True]]


@pytest.fixture
def classes(regression: Callable[..., Any], examples: Examples) -> Callable[..., Any]:
    """Five labels with the scores 1 to 5; tasks of two labels, and one label still to come.

    Returns the run and the batch of the second task's two examples.
    """

    def make(*strategies: Any) -> tuple[Any, Any]:
        run = regression((0.0, 1.0), [math.log(k) for k in range(1, 6)])
        run.stream.stream = SimpleNamespace(
            label_names="abcde", global_labels=lambda task: [2 * task, 2 * task + 1]
        )
        for strategy in strategies:
            strategy.setup(run)
        old = examples([[1]] * 6, labels=[1] * 6)
        new = examples([[1]] * 2, labels=[2, 3], task=1)
        for index, train in enumerate((old, new)):
            # as in the class-incremental scenario: every label seen so far, for all examples
            seen = torch.arange(5) < 2 * index + 2
            run.objective = ClassificationObjective(seen.repeat(3, 1))
            run.task = SimpleNamespace(index=index, train=train)
            for strategy in strategies:
                strategy.before_task(run, run.task)
            for strategy in strategies:
                assert strategy.train_examples(run, run.task, train) is train
            if index == 0:
                for strategy in strategies:
                    strategy.after_task(run, run.task)
        return run, run.shared_batch(Columns(new), np.arange(2))

    return make


def dealing(strategy: Replay, *rows: int) -> None:
    """The memory deals these rows out: 0 to 5 are of the first task, 6 and 7 of the second."""
    strategy._memory.sample = lambda count: torch.tensor(rows)  # type: ignore[method-assign]


NEW = (math.log(7 / 3) + math.log(7 / 4)) / 2  # 3 and 4 of 3 + 4
OLD = math.log(10 / 2)  # 2 of 1 + 2 + 3 + 4
AGAIN = math.log(10 / 3)  # 3 of all


def test_new_examples_compete_among_themselves_and_replayed_ones_with_all(
    classes: Callable[..., Any],
) -> None:
    strategy = ERACE(ERACEConfig(**MEMORY, ratio=1.5, mixing="separate", weight=2.0))
    run, batch = classes(strategy)
    dealing(strategy, 0, 6, 1)
    (gradient,), logs = backward(run, [strategy], [batch])

    assert logs == {
        "train/loss/task": pytest.approx(NEW, rel=1e-6),
        "train/loss/er_ace": pytest.approx(2 * (2 * OLD + AGAIN) / 3, rel=1e-6),
    }
    # the new examples leave the old labels alone: only the term moves them; nothing moves the last
    expected = [2 / 10, 2 * (2 / 10 - 2 / 3), 2 * (3 / 10 - 1 / 3), 2 * 4 / 10, 0.0]
    expected[2] += 3 / 7 - 1 / 2
    expected[3] += 4 / 7 - 1 / 2
    assert gradient.tolist() == pytest.approx(expected, rel=1e-5)


def test_one_mean_over_both(classes: Callable[..., Any]) -> None:
    strategy = ERACE(ERACEConfig(**MEMORY, ratio=1.5, mixing="ratio", weight=1.0))
    run, batch = classes(strategy)
    dealing(strategy, 0, 6, 1)
    _, logs = backward(run, [strategy], [batch])
    assert logs == {"train/loss/task": pytest.approx((2 * NEW + 2 * OLD + AGAIN) / 5, rel=1e-6)}


def test_memory_has_examples_of_the_current_task(classes: Callable[..., Any]) -> None:
    strategy = ERACE(ERACEConfig(**MEMORY, ratio=1.0, mixing="separate", weight=1.0))
    run, _ = classes(strategy)
    assert strategy._memory.columns.numbers["label"].tolist() == [1] * 6 + [2, 3]
    strategy.after_task(run, run.task)
    assert strategy._memory.seen == 8  # each once


def test_going_on_within_a_task_adds_nothing(classes: Callable[..., Any]) -> None:
    strategy = ERACE(ERACEConfig(**MEMORY, ratio=1.0, mixing="separate", weight=1.0))
    run, _ = classes(strategy)
    again = ERACE(strategy.config)
    again.setup(run)
    again.load_state_dict(strategy.state_dict())
    again.train_examples(run, run.task, run.task.train)
    assert again._memory.seen == 8


def test_nothing_is_replayed_in_the_first_task(
    classes: Callable[..., Any],
) -> None:
    strategy = ERACE(ERACEConfig(**MEMORY, ratio=1.0, mixing="separate", weight=1.0))
    run, batch = classes(strategy)
    strategy.before_task(run, SimpleNamespace(index=0))  # type: ignore[arg-type]
    assert len(strategy.transform_batch(run, batch)) == len(batch)
    strategy.before_task(run, run.task)
    assert len(strategy.transform_batch(run, batch)) == 2 * len(batch)


def test_labels_of_the_task_compete_whatever_is_in_the_batch(
    classes: Callable[..., Any], examples: Examples
) -> None:
    strategy = ERACE(ERACEConfig(**MEMORY, ratio=0.01, mixing="separate", weight=1.0))
    run, _ = classes(strategy)
    alone = run.shared_batch(Columns(examples([[1]], labels=[2], task=1)), np.arange(1))
    _, logs = backward(run, [strategy], [alone])
    assert logs == {"train/loss/task": pytest.approx(math.log(7 / 3), rel=1e-6)}


@pytest.mark.parametrize("turned", [False, True])
def test_what_another_strategy_replays_competes_with_all(
    classes: Callable[..., Any], turned: bool
) -> None:
    strategy = ERACE(ERACEConfig(**MEMORY, ratio=0.01, mixing="separate", weight=1.0))
    replay = Replay(ReplayConfig(**MEMORY, ratio=1.0, mixing="ratio", weight=1.0))
    order = [replay, strategy] if turned else [strategy, replay]
    run, batch = classes(*order)
    dealing(replay, 0, 1)
    _, logs = backward(run, order, [batch])
    assert logs == {"train/loss/task": pytest.approx((2 * NEW + 2 * OLD) / 4, rel=1e-6)}


def test_candidates_of_another_strategy_stay(classes: Callable[..., Any]) -> None:
    strategy = ERACE(ERACEConfig(**MEMORY, ratio=0.01, mixing="separate", weight=1.0))
    run, batch = classes(strategy)
    theirs = torch.tensor([[True, True, True, False, True], [True] * 5])
    found = strategy.transform_batch(run, batch.altered(candidates=theirs)).candidates
    assert found.tolist() == [[False, False, True, False, False], [False, False, True, True, False]]
    assert batch.candidates is None  # what came in is as it was


def test_competitions_of_a_run(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """A head whose scores are all 0 and stay so has the loss log K."""
    build = experiment.build_run

    def headless(*arguments: Any) -> Any:
        run = build(*arguments)
        with torch.no_grad():
            for parameter in run.model.classifier.modules_to_save.default.parameters():
                parameter.zero_()
        return run

    more = ("optimizer.lr=0", "stream.num_tasks=2", "strategies.er_ace.weight=3")
    with mock.patch.object(experiment, "build_run", headless):
        outcome = run_it(tiny("er_ace", *more), tmp_path)

    assert all("train/loss/er_ace" not in step for step in outcome.steps(0))
    for step in outcome.steps(0) + outcome.steps(1):
        assert step["train/loss/task"] == pytest.approx(math.log(4), rel=1e-6)
    for step in outcome.steps(1):
        assert step["train/loss/er_ace"] == pytest.approx(3 * math.log(8), rel=1e-6)


def test_language_models_are_refused_with_the_reason(tiny: Callable[..., list[str]]) -> None:
    told = (
        r"The strategy 'er_ace' does not work with model\.task_type=causal_lm, because a language "
        r"model scores tokens, .*; it works with sequence_classification\."
    )
    with pytest.raises(ConfigError, match=told):
        settle(compose_only(tiny("er_ace", model="tiny_llama")))


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_scenarios_without_old_competitors_are_refused(
    tiny: Callable[..., list[str]], scenario: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"would be plain replay with stream\.scenario={scenario}"
    ):
        settle(compose_only(tiny("er_ace", f"stream.scenario={scenario}")))
