"""Prioritized replay: draws, weights and priorities, against values worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.strategies.memory import Memory
from clpeft.strategies.prioritized_replay import (
    PrioritizedReplay,
    PrioritizedReplayConfig,
    draw_probabilities,
    importance_weights,
)
from clpeft.streams.batching import Columns
from clpeft.training.state import read_state, write_state
from tests.running import compose_only, run_it
from tests.stepping import backward

Examples = Callable[..., Any]


# The mathematics.


def test_probabilities_by_hand() -> None:
    priorities = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64)
    assert draw_probabilities(priorities, 0.5).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert draw_probabilities(priorities, 1.0).tolist() == pytest.approx(
        [1 / 30, 4 / 30, 9 / 30, 16 / 30]
    )
    assert draw_probabilities(priorities, 0.0).tolist() == [0.25] * 4


def test_what_was_not_replayed_yet_has_the_highest_priority() -> None:
    priorities = torch.tensor([4.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert draw_probabilities(priorities, 1.0).tolist() == pytest.approx(
        [4 / 13, 4 / 13, 1 / 13, 4 / 13]
    )
    assert draw_probabilities(torch.zeros(4), 1.0).tolist() == [0.25] * 4
    assert draw_probabilities(torch.zeros(4), 0.0).tolist() == [0.25] * 4


def test_weights_by_hand() -> None:
    chances = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    drawn = torch.tensor([3, 0])
    # 1 / (4 · 0.4) and 1 / (4 · 0.1)
    assert importance_weights(chances, drawn, 1.0).tolist() == pytest.approx([0.625, 2.5])
    assert importance_weights(chances, drawn, 0.5).tolist() == pytest.approx(
        [math.sqrt(0.625), math.sqrt(2.5)]
    )
    assert importance_weights(chances, drawn, 0.0).tolist() == [1.0, 1.0]


def test_full_weights_take_the_draws_preference_back() -> None:
    """With β = 1 the expected weighted loss of a draw is the mean over the memory."""
    losses = torch.tensor([3.0, 0.1, 1.0, 0.5], dtype=torch.float64)
    chances = draw_probabilities(losses, 0.6)
    every = torch.arange(4)
    weighted = importance_weights(chances, every, 1.0) * losses
    assert float((chances * weighted).sum()) == pytest.approx(float(losses.mean()))


# The draw.


@pytest.fixture
def memory(bigrams: Callable[..., Any], examples: Examples) -> Memory:
    memory = Memory(4, torch.Generator().manual_seed(0))
    memory.add(bigrams(10), examples([[i] for i in range(4)]))
    return memory


CHANCES = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def test_examples_are_drawn_as_often_as_they_should_be(memory: Memory) -> None:
    trials = 5000
    drawn = [int(memory.sample(1, chances=CHANCES)) for _ in range(trials)]
    counts = np.bincount(drawn, minlength=4)
    # the seed is fixed; one right draw in a thousand would fail with another
    assert stats.chisquare(counts, trials * CHANCES.numpy()).pvalue > 0.001
    assert stats.chisquare(counts).pvalue < 1e-10  # and not alike


def test_pairs_are_drawn_one_after_the_other_without_replacement(memory: Memory) -> None:
    trials = 5000
    counts: dict[frozenset[int], int] = {}
    for _ in range(trials):
        pair = frozenset(memory.sample(2, chances=CHANCES).tolist())
        counts[pair] = counts.get(pair, 0) + 1
    p = CHANCES.tolist()
    expected = {
        frozenset((i, j)): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        for i, j in itertools.combinations(range(4), 2)
    }
    assert counts.keys() == expected.keys()  # never the same one twice
    found = [counts[pair] for pair in expected]
    assert stats.chisquare(found, [trials * value for value in expected.values()]).pvalue > 0.001


def test_draw_of_more_than_there_is(memory: Memory) -> None:
    assert sorted(memory.sample(9, chances=CHANCES).tolist()) == [0, 1, 2, 3]


# The strategy.

SETTINGS: dict[str, Any] = {
    "memory_size": 4,
    "selection": "reservoir",
    "budget": "total",
    "ratio": 0.5,
    "mixing": "ratio",
    "weight": 1.0,
    "alpha": 0.5,
    "beta": 0.5,
    "beta_end": 1.0,
    "epsilon": 0.01,
}


def made(run: Any, **changes: Any) -> PrioritizedReplay:
    strategy = PrioritizedReplay(PrioritizedReplayConfig(**SETTINGS | changes))
    strategy.setup(run)
    return strategy


@pytest.fixture
def replaying(bigrams: Callable[..., Any], examples: Examples) -> Callable[..., Any]:
    """A language model and a memory of four texts, whose answers have 1 to 4 tokens."""

    def make(**changes: Any) -> tuple[Any, PrioritizedReplay, Columns]:
        run = bigrams(10)
        run.model.table.data = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
        strategy = made(run, **changes)
        old = examples([[1, 2], [3, 4, 5], [6, 7, 8, 9], [2, 4, 6, 8, 1]], prompt_length=1)
        strategy.after_task(run, SimpleNamespace(train=old, index=0))  # type: ignore[arg-type]
        new = examples([[5, 7, 9]] * 4, prompt_length=1, task=1)
        return run, strategy, Columns(new)

    return make


def priorities(strategy: PrioritizedReplay) -> list[float]:
    """By the memory's rows; asked for as a checkpoint does."""
    return strategy.state_dict()["memory"]["notes"]["priority"].tolist()


def per_token(run: Any, row: list[int]) -> float:
    scores = torch.log_softmax(run.model.table.detach().double(), dim=1)
    losses = [-float(scores[one, other]) for one, other in itertools.pairwise(row)]
    return sum(losses) / len(losses)


def step(run: Any, strategy: PrioritizedReplay, columns: Columns) -> list[int]:
    """One step with a batch of four; which of the memory's rows it replayed."""
    seen: list[int] = []
    original = strategy._mixed

    def mixed(run: Any, batch: Any, drawn: Any) -> Any:
        seen.extend(drawn.example_ids.tolist())
        return original(run, batch, drawn)

    strategy._mixed = mixed  # type: ignore[method-assign]
    backward(run, [strategy], [run.shared_batch(columns, np.arange(4))])
    strategy.transform_gradients(run)
    strategy._mixed = original  # type: ignore[method-assign]
    run.step += 1
    return seen


def test_priority_is_the_loss_per_token_of_the_step_that_replayed_it(
    replaying: Callable[..., Any],
) -> None:
    run, strategy, columns = replaying()
    assert priorities(strategy) == [0.0] * 4
    rows = strategy._memory.examples["input_ids"]  # type: ignore[index]
    for _ in range(6):
        before = priorities(strategy)
        drawn = step(run, strategy, columns)
        assert len(drawn) == len(set(drawn)) == 2
        after = priorities(strategy)
        for row in range(4):
            expected = per_token(run, rows[row]) + 0.01 if row in drawn else before[row]
            assert after[row] == pytest.approx(expected, rel=1e-5)
        # the model changes, and so does what is found the next time
        run.model.table.data *= 1.1
    assert all(value != 0.0 for value in priorities(strategy))


def test_priority_costs_no_forward_pass_of_its_own(
    replaying: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, strategy, columns = replaying()
    forward, calls = run.model.forward, []
    monkeypatch.setattr(
        run.model, "forward", lambda **given: (calls.append(1), forward(**given))[1]
    )
    for _ in range(3):
        step(run, strategy, columns)
        priorities(strategy)
    assert len(calls) == 3


def test_priority_is_of_the_dropout_that_was_trained_with(
    regression: Callable[..., Any], examples: Examples
) -> None:
    run = regression((1.0, 2.0), (0.0, 3.0), dropout=0.5)
    run.model.train()
    strategy = made(run, memory_size=1, ratio=1.0)
    strategy.after_task(run, SimpleNamespace(train=examples([[0]], labels=[0]), index=0))  # type: ignore[arg-type]
    found = set()
    for _ in range(20):
        step(run, strategy, Columns(examples([[1]] * 4, labels=[1] * 4, task=1)))
        found.add(round(priorities(strategy)[0], 4))
    # x is dropped, or counts double: ln 2, or ln (1 + e⁶)
    assert found == {round(math.log(2) + 0.01, 4), round(math.log1p(math.exp(6)) + 0.01, 4)}


def test_new_examples_are_drawn_like_the_worst_known(
    replaying: Callable[..., Any], examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, strategy, columns = replaying(budget="per_task", alpha=1.0)
    step(run, strategy, columns)
    known = priorities(strategy)
    new = examples([[5, 7]] * 3, prompt_length=1, task=1)
    strategy.after_task(run, SimpleNamespace(train=new, index=1))  # type: ignore[arg-type]

    assert priorities(strategy) == [*known, 0.0, 0.0, 0.0]
    assert sorted(known)[:2] == [0.0, 0.0]  # not every old one was replayed either
    given: list[Tensor] = []
    sample = strategy._memory.sample

    def told(count: int, chances: Tensor) -> Tensor:
        given.append(chances)
        return sample(count, chances=chances)

    monkeypatch.setattr(strategy._memory, "sample", told)
    step(run, strategy, columns)
    worst = max(known)
    weights = [value or worst for value in (*known, 0.0, 0.0, 0.0)]
    assert given[0].tolist() == pytest.approx([w / sum(weights) for w in weights])


def test_losses_of_the_last_step_reach_their_examples_before_the_memory_shrinks(
    replaying: Callable[..., Any], examples: Examples
) -> None:
    run, strategy, columns = replaying(selection="task_balanced", ratio=0.75)
    drawn = step(run, strategy, columns)
    old = strategy._memory.examples["input_ids"]  # type: ignore[index]
    new = examples([[9, 8]] * 9, prompt_length=1, task=1)
    strategy.after_task(run, SimpleNamespace(train=new, index=1))  # type: ignore[arg-type]

    values = priorities(strategy)
    kept = [
        (row["example_id"], value)
        for row, value in zip(strategy._memory.examples, values, strict=True)  # type: ignore[arg-type]
        if row["task_id"] == 0
    ]
    assert len(kept) == 2
    assert {example for example, _ in kept} & set(drawn)
    for example, value in kept:
        expected = per_token(run, old[example]) + 0.01 if example in drawn else 0.0
        assert value == pytest.approx(expected, rel=1e-5)


def drawn_weights(
    monkeypatch: pytest.MonkeyPatch, setup: tuple[Any, PrioritizedReplay, Columns]
) -> list[list[float]]:
    """What the micro-batches of a step carry: rows 3 and 0 in one, 2 and 1 in the other."""
    run, strategy, columns = setup
    strategy._memory.notes["priority"].copy_(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    deals = iter([torch.tensor([3, 0]), torch.tensor([2, 1])])
    monkeypatch.setattr(strategy._memory, "sample", lambda count, chances: next(deals))
    batches = [
        strategy.transform_batch(run, run.shared_batch(columns, np.arange(4))) for _ in range(2)
    ]
    return [batch.weights.tolist() for batch in batches]  # type: ignore[union-attr]


@pytest.mark.parametrize("mixing", ["ratio", "separate"])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_weights_of_a_step(
    replaying: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, progress: float, mixing: str
) -> None:
    setup = replaying(mixing=mixing)
    setup[0].steps_of_task, setup[0].step_of_task = 2, round(1 + 2 * progress)
    assert setup[0].progress == progress
    one, other = drawn_weights(monkeypatch, setup)

    # P = 0.1, 0.2, 0.3, 0.4; β goes from ½ to 1. The largest weight is that of row 0
    beta = 0.5 + 0.5 * progress
    raw = [(4 * p) ** -beta for p in (0.1, 0.2, 0.3, 0.4)]
    assert one == pytest.approx([1, 1, 1, 1, raw[3] / raw[0], 1.0])
    # not its own micro-batch's largest
    assert other == pytest.approx([1, 1, 1, 1, raw[2] / raw[0], raw[1] / raw[0]])


def test_larger_weight_of_a_later_micro_batch_counts_for_the_earlier(
    replaying: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, strategy, columns = replaying(beta=1.0)
    strategy._memory.notes["priority"].copy_(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    deals = iter([torch.tensor([3, 2]), torch.tensor([0, 1]), torch.tensor([3, 2])])
    monkeypatch.setattr(strategy._memory, "sample", lambda count, chances: next(deals))
    batches = [
        strategy.transform_batch(run, run.shared_batch(columns, np.arange(4))) for _ in range(2)
    ]
    carried = [batch.weights[4:].tolist() for batch in batches]  # type: ignore[index]
    assert carried == [pytest.approx([0.25, 1 / 3]), pytest.approx([1.0, 0.5])]
    # the next step has a maximum of its own
    run.step += 1
    mixed = strategy.transform_batch(run, run.shared_batch(columns, np.arange(4)))
    assert mixed.weights[4:].tolist() == pytest.approx([0.75, 1.0])  # type: ignore[index]


def test_mean_weight_is_logged(
    replaying: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = replaying(beta=1.0)
    run, strategy, columns = setup
    strategy._memory.notes["priority"].copy_(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    monkeypatch.setattr(strategy._memory, "sample", lambda count, chances: torch.tensor([3, 0]))
    backward(run, [strategy], [run.shared_batch(columns, np.arange(4))])
    assert strategy.transform_gradients(run) == {
        "prioritized_replay/examples": 2,
        "prioritized_replay/weight": pytest.approx((0.25 + 1) / 2),
    }


@pytest.mark.parametrize("mixing", ["ratio", "separate"])
def test_weights_are_in_the_loss(
    replaying: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mixing: str
) -> None:
    run, strategy, columns = replaying(mixing=mixing, beta=1.0, weight=3.0)
    strategy._memory.notes["priority"].copy_(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    monkeypatch.setattr(strategy._memory, "sample", lambda count, chances: torch.tensor([3, 0]))
    rows = strategy._memory.examples["input_ids"]  # type: ignore[index]
    _, logs = backward(run, [strategy], [run.shared_batch(columns, np.arange(4))])

    # four new answers of two tokens; row 3 has four tokens and the weight 1/4, row 0 one token
    new = 8 * per_token(run, [5, 7, 9])
    old = 0.25 * 4 * per_token(run, rows[3]) + 1 * per_token(run, rows[0])
    if mixing == "ratio":
        assert logs == {"train/loss/task": pytest.approx((new + old) / 13, rel=1e-5)}
    else:
        assert logs == {
            "train/loss/task": pytest.approx(new / 8, rel=1e-5),
            "train/loss/prioritized_replay": pytest.approx(3 * old / 5, rel=1e-5),
        }


def test_draws_follow_the_priorities(
    replaying: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, strategy, columns = replaying(ratio=0.25)
    strategy._memory.notes["priority"].copy_(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    counts, trials = np.zeros(4), 1500
    for run.step in range(trials):
        mixed = strategy.transform_batch(run, run.shared_batch(columns, np.arange(4)))
        counts[int(mixed.example_ids[4])] += 1
    assert stats.chisquare(counts, trials * np.array([0.1, 0.2, 0.3, 0.4])).pvalue > 0.001


def test_loss_that_is_no_number_leaves_the_priority(replaying: Callable[..., Any]) -> None:
    run, strategy, columns = replaying()
    run.model.table.data[:] = torch.nan
    step(run, strategy, columns)
    assert priorities(strategy) == [0.0] * 4


def test_step_that_was_left_out_leaves_the_priorities(replaying: Callable[..., Any]) -> None:
    run, strategy, columns = replaying()
    # the loop asks for no gradients' transformation where a loss is not finite
    backward(run, [strategy], [run.shared_batch(columns, np.arange(4))] * 2)
    run.step += 1
    assert priorities(strategy) == [0.0] * 4
    drawn = step(run, strategy, columns)
    changed = [row for row, value in enumerate(priorities(strategy)) if value != 0.0]
    assert changed == sorted(drawn)


def test_micro_batch_that_brings_nothing(replaying: Callable[..., Any]) -> None:
    run, strategy, columns = replaying(ratio=0.25)
    # a fourth of an example per new one: none with the first two, one with the next three
    cuts = [np.arange(2), np.arange(3), np.arange(1)]
    backward(run, [strategy], [run.shared_batch(columns, rows) for rows in cuts])
    assert strategy.transform_gradients(run)["prioritized_replay/examples"] == 1
    assert sum(value != 0.0 for value in priorities(strategy)) == 1


def test_goes_on_alike_from_between_any_two_steps(
    replaying: Callable[..., Any], tmp_path: Path
) -> None:
    run, strategy, columns = replaying(ratio=0.3)
    drawn, after = [], []
    for number in range(8):
        write_state(tmp_path / str(number), strategy.state_dict())
        drawn.append(step(run, strategy, columns))
        after.append(priorities(strategy))
    assert len({tuple(rows) for rows in drawn}) > 4
    for number in range(8):
        again, resumed, columns = replaying(ratio=0.3)
        resumed.setup(again)
        resumed.load_state_dict(read_state(tmp_path / str(number)))
        again.step = number
        for later in range(number, 8):
            assert step(again, resumed, columns) == drawn[later]
            assert priorities(resumed) == after[later]


def test_asking_for_the_state_changes_nothing(replaying: Callable[..., Any]) -> None:
    """A run that is saved at every step draws what one draws that is never saved."""
    found = []
    for asks in (True, False):
        run, strategy, columns = replaying()
        drawn = []
        for _ in range(6):
            drawn.append(step(run, strategy, columns))
            if asks:
                strategy.state_dict()
        found.append((drawn, priorities(strategy)))
    assert found[0] == found[1]


def test_beta_that_falls_is_refused(tiny: Callable[..., list[str]]) -> None:
    more = ("strategies.prioritized_replay.beta=0.8", "strategies.prioritized_replay.beta_end=0.5")
    with pytest.raises(ConfigError, match=r"beta_end=0\.5 is less than .*beta=0\.8.* 0\.8 or more"):
        settle(compose_only(tiny("prioritized_replay", *more)))


def test_progress_goes_from_task_to_task(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = PrioritizedReplay.transform_batch, []

    def noting(self: PrioritizedReplay, run: Any, batch: Any) -> Any:
        seen.append(run.progress)
        return original(self, run, batch)

    monkeypatch.setattr(PrioritizedReplay, "transform_batch", noting)
    run_it(
        tiny("prioritized_replay", "stream.num_tasks=2", "training.gradient_accumulation=2"),
        tmp_path,
    )
    assert seen == [k / 4 for _ in range(2) for k in range(4) for _ in range(2)]


def test_priorities_are_in_the_state_of_a_run(finished: Callable[..., Any]) -> None:
    states: list[Tensor] = [
        finished("prioritized_replay").state(tasks)["strategies"]["0"]["memory"]["notes"][
            "priority"
        ]
        for tasks in (1, 2, 3)
    ]
    assert states[0].tolist() == [0.0] * 24
    assert len(set(states[2].tolist())) > 12
