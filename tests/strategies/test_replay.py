"""What replay does to a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.strategies.agem import AGEM, AGEMConfig
from clpeft.strategies.replay import Replay, ReplayConfig
from clpeft.streams.batching import Columns
from tests.running import compose_only
from tests.stepping import backward

MEMORY: dict[str, Any] = {"memory_size": 10, "selection": "reservoir", "budget": "total"}


@pytest.fixture
def replaying(bigrams: Callable[..., Any], examples: Callable[..., Any]) -> Callable[..., Any]:
    """A run and a replay whose memory holds a first task of ten examples."""

    def make(ratio: float, mixing: str = "ratio", weight: float = 1.0) -> tuple[Any, Replay]:
        run = bigrams(50)
        replay = Replay(ReplayConfig(**MEMORY, ratio=ratio, mixing=mixing, weight=weight))
        replay.setup(run)
        rows = [[40 + i, 30, 31, 32, 33] for i in range(10)]
        task = SimpleNamespace(train=examples(rows, prompt_length=1, task=0))
        replay.after_task(run, task)  # type: ignore[arg-type]
        return run, replay

    return make


def batch(run: Any, examples: Callable[..., Any], size: int) -> Any:
    rows = examples([[1, 2, 3]] * size, prompt_length=2, task=1)
    return run.batch(Columns(rows), np.arange(size))


@pytest.mark.parametrize(("ratio", "replayed"), [(0.5, 4), (1.0, 8), (0.125, 1), (9.0, 10)])
def test_memory_examples_follow_the_new_ones(
    replaying: Callable[..., Any], examples: Callable[..., Any], ratio: float, replayed: int
) -> None:
    run, replay = replaying(ratio)

    mixed = replay.transform_batch(run, batch(run, examples, 8))

    assert mixed.task_ids.tolist() == [1] * 8 + [0] * replayed
    assert len(set(mixed.example_ids[8:].tolist())) == replayed
    assert replay.transform_gradients(run) == {"replay/examples": replayed}


def test_padding_is_masked_and_answers_nothing(
    replaying: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run, replay = replaying(0.5)

    mixed = replay.transform_batch(run, batch(run, examples, 2))

    assert mixed.inputs["input_ids"][0].tolist() == [1, 2, 3, 0, 0]
    assert mixed.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    assert mixed.labels.tolist() == [[-100, -100, 3, -100, -100]] * 2 + [[-100, 30, 31, 32, 33]]
    # the loss is the mean over new and replayed answers' tokens alike
    assert mixed.num_targets == 2 * 1 + 4


@pytest.fixture
def known(replaying: Callable[..., Any]) -> Callable[..., Any]:
    """The same with a model whose losses are known.

    A new example's one token costs ln 2; of a replayed one's four, one costs ln 4/3 and the others
    ln 50 each.
    """

    def make(mixing: str, weight: float = 1.0) -> tuple[Any, Replay]:
        run, replay = replaying(0.5, mixing, weight)
        # odds of 49 to 49 others that are 1 each, and of 3 · 49 to them
        run.model.table.data[2, 3] = math.log(49)
        run.model.table.data[30, 31] = math.log(3 * 49)
        return run, replay

    return make


NEW = math.log(2)
OLD = 3 * math.log(50) + math.log(4 / 3)


def test_ratio_is_one_mean_over_all_targets(
    known: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run, replay = known("ratio")
    _, logs = backward(run, [replay], [batch(run, examples, 4)])
    # four new tokens and two times four replayed ones
    assert logs == {"train/loss/task": pytest.approx((4 * NEW + 2 * OLD) / 12, rel=1e-6)}


def test_separate_is_two_means_of_their_own(
    known: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run, replay = known("separate", 3.0)
    (gradient,), logs = backward(run, [replay], [batch(run, examples, 4)])

    assert logs == {
        "train/loss/task": pytest.approx(NEW, rel=1e-6),
        "train/loss/replay": pytest.approx(3 * OLD / 4, rel=1e-6),
    }
    # each answer's p − e, once per target of its own mean
    assert float(gradient[2, 3]) == pytest.approx(1 / 2 - 1, rel=1e-5)
    assert float(gradient[30, 31]) == pytest.approx(3 * (3 / 4 - 1) / 4, rel=1e-5)
    assert float(gradient[31, 32]) == pytest.approx(3 * (1 / 50 - 1) / 4, rel=1e-5)


def test_weights_of_examples_count_in_their_term(
    known: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run, replay = known("separate", 3.0)
    mixed = replay.transform_batch(run, batch(run, examples, 4))
    mixed = mixed.altered(weights=torch.tensor([2.0, 0.0, 0.0, 0.0, 0.5, 2.5]))
    run.count_targets([mixed])
    outputs = run.objective.forward(run.model, mixed)

    (term,) = replay.loss_terms(run, mixed, outputs).values()
    assert float(term.detach()) == pytest.approx(3 * (0.5 + 2.5) * OLD / 8, rel=1e-6)
    total = float(run.objective.total(outputs, mixed).detach())
    assert total == pytest.approx(2 * NEW, rel=1e-6)


def test_term_is_none_where_nothing_is_replayed(
    known: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run, replay = known("separate")
    given = batch(run, examples, 1)  # half an example is owed
    _, logs = backward(run, [replay], [given])
    assert logs == {"train/loss/task": pytest.approx(NEW, rel=1e-6)}


def test_without_a_memory_the_batch_is_left_alone(
    bigrams: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run = bigrams(50)
    replay = Replay(ReplayConfig(**MEMORY, ratio=0.5, mixing="ratio", weight=1.0))
    replay.setup(run)
    given = batch(run, examples, 4)

    assert replay.transform_batch(run, given) is given
    assert replay.transform_gradients(run) == {"replay/examples": 0}


def test_fractions_of_an_example_add_up(
    replaying: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run, replay = replaying(0.125)

    # half an example a batch of four: one with every second batch, also across a resume
    sizes = [len(replay.transform_batch(run, batch(run, examples, 4))) for _ in range(5)]
    state = replay.state_dict()
    replay.setup(run)
    replay.load_state_dict(state)
    sizes += [len(replay.transform_batch(run, batch(run, examples, 4))) for _ in range(3)]

    assert sizes == [4, 5, 4, 5, 4, 5, 4, 5]


def test_two_strategies_draw_different_examples(
    replaying: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run, replay = replaying(0.5)
    agem = AGEM(AGEMConfig(10, "reservoir", "total", reference_size=8))
    agem.setup(run)
    rows = [[40 + i, 30, 31, 32, 33] for i in range(10)]
    agem.after_task(run, SimpleNamespace(train=examples(rows, prompt_length=1, task=0)))  # type: ignore[arg-type]

    drawn = [replay._memory.draw(run, 8).example_ids.tolist() for _ in range(5)]
    assert drawn != [agem._memory.draw(run, 8).example_ids.tolist() for _ in range(5)]


def test_ratio_is_of_new_examples_whatever_another_strategy_has_added(
    replaying: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run, replay = replaying(0.5)
    mixed = replay.transform_batch(run, batch(run, examples, 4))
    moved = mixed.to("cpu").altered(weights=None)

    # half of the four new ones, not half of the six
    assert len(replay.transform_batch(run, moved)) == 4 + 2 + 2


@pytest.mark.parametrize("name", ["replay", "prioritized_replay", "er_ace"])
def test_weight_of_a_term_that_is_not_there_is_refused(
    tiny: Callable[..., list[str]], name: str
) -> None:
    settings = f"strategies.{name}"
    told = rf"{settings}\.weight=2 is of the term .* {settings}\.mixing=separate, or weight=1\."
    with pytest.raises(ConfigError, match=told):
        settle(compose_only(tiny(name, f"{settings}.mixing=ratio", f"{settings}.weight=2")))

    # each of the two by itself is a way to run it
    settle(compose_only(tiny(name, f"{settings}.mixing=separate", f"{settings}.weight=2")))
    settle(compose_only(tiny(name, f"{settings}.mixing=ratio", f"{settings}.weight=1")))
