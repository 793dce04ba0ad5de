"""A step with replayed examples is the same, however it is cut and whoever shares it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clpeft.models.objective import ClassificationObjective
from clpeft.strategies.er_ace import ERACE, ERACEConfig
from clpeft.strategies.memory import Memory
from clpeft.strategies.prioritized_replay import PrioritizedReplay, PrioritizedReplayConfig
from clpeft.strategies.replay import Replay, ReplayConfig
from clpeft.streams.batch import Batch
from clpeft.streams.batching import Columns
from tests.stepping import as_processes, backward

MEMORY: dict[str, Any] = {"memory_size": 20, "selection": "reservoir", "budget": "total"}
SIZES = [5, 1, 3, 2, 4, 1, 2]  # tokens of the new examples' answers

Examples = Callable[..., Any]
# a strategy with a memory of one task, its run, and the rows of the next task
Setup = tuple[Any, Replay, Columns]


@pytest.fixture
def text(bigrams: Callable[..., Any], examples: Examples) -> Callable[[Replay], Setup]:
    """A language model's table of next tokens."""

    def make(strategy: Replay) -> Setup:
        run = bigrams(12)
        run.model.table.data = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
        old = [[1 + (i * j) % 11 for j in range(1, 3 + i % 4)] for i in range(1, 15)]
        new = [[2 + (i + j) % 9 for j in range(1 + size)] for i, size in enumerate(SIZES)]
        return _filled(run, strategy, examples(old, prompt_length=1), new, examples)

    def _filled(run: Any, strategy: Replay, old: Any, new: Any, examples: Examples) -> Setup:
        strategy.setup(run)
        strategy.after_task(run, SimpleNamespace(train=old, index=0))  # type: ignore[arg-type]
        run.step = 7
        return run, strategy, Columns(examples(new, prompt_length=1, task=1))

    return make


@pytest.fixture
def head(regression: Callable[..., Any], examples: Examples) -> Callable[[Replay], Setup]:
    """Softmax regression with four labels, two of each task, all of which compete."""

    def make(strategy: Replay) -> Setup:
        run = regression((0.3, 1.0, -2.0, 0.5, 1.5), (0.5, -1.0, 2.0, 0.1))
        run.objective = ClassificationObjective(torch.ones(2, 4, dtype=torch.bool))
        run.stream.stream = SimpleNamespace(
            label_names="abcd", global_labels=lambda task: [2 * task, 2 * task + 1]
        )
        strategy.setup(run)
        old = examples([[i % 5] for i in range(14)], labels=[i % 2 for i in range(14)], task=0)
        new = examples([[i % 5] for i in range(7)], labels=[2 + i % 2 for i in range(7)], task=1)
        for index, train in enumerate((old, new)):
            run.task = SimpleNamespace(train=train, index=index)
            strategy.before_task(run, run.task)
            strategy.train_examples(run, run.task, train)
            if index == 0:
                strategy.after_task(run, run.task)
        run.step = 7
        return run, strategy, Columns(new)

    return make


def replaying(mixing: str, ratio: float) -> Replay:
    return Replay(ReplayConfig(**MEMORY, ratio=ratio, mixing=mixing, weight=2.5))


def prioritized(mixing: str, ratio: float) -> Replay:
    return PrioritizedReplay(
        PrioritizedReplayConfig(
            **MEMORY,
            ratio=ratio,
            mixing=mixing,
            weight=2.5,
            alpha=0.7,
            beta=0.5,
            beta_end=1.0,
            epsilon=0.01,
        )
    )


def asymmetric(mixing: str, ratio: float) -> Replay:
    return ERACE(ERACEConfig(**MEMORY, ratio=ratio, mixing=mixing, weight=2.5))


CASES = [
    (maker, model, mixing)
    for maker, models in (
        (replaying, ("text", "head")),
        (prioritized, ("text", "head")),
        (asymmetric, ("head",)),
    )
    for model in models
    for mixing in ("ratio", "separate")
]


@pytest.fixture
def dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories deal their examples out in order, so that every cut of a step gets the same."""

    def sample(
        self: Memory, count: int, rows: Tensor | None = None, chances: Tensor | None = None
    ) -> Tensor:
        start = vars(self).setdefault("dealt", 0)
        self.dealt = start + count  # type: ignore[attr-defined]
        # from the end too, where a memory may hold examples of the current task
        return torch.arange(start, start + count) * 3 % len(self)

    monkeypatch.setattr(Memory, "sample", sample)


def unequal(strategy: Replay) -> None:
    """Priorities as they may have come to be."""
    if isinstance(strategy, PrioritizedReplay):
        notes = strategy._memory.notes["priority"]
        notes.copy_(torch.rand(len(notes), generator=torch.Generator().manual_seed(3)) ** 2 + 0.02)


def stepped(
    setup: Setup, cuts: list[list[int]]
) -> tuple[list[Tensor], dict[str, float], dict[str, Any]]:
    """Gradients, logs and the memory's notes after a step whose micro-batches have these rows."""
    run, strategy, columns = setup
    unequal(strategy)
    batches: list[Batch] = [run.shared_batch(columns, np.array(rows)) for rows in cuts]
    gradients, logs = backward(run, [strategy], batches)
    strategy.transform_gradients(run)
    return gradients, logs, strategy.state_dict()["memory"]["notes"]


CUTS = [
    [[0, 1, 2], [3, 4, 5, 6]],
    [[0], [1, 2, 3, 4, 5], [6]],
    [[number] for number in range(7)],
]


@pytest.mark.usefixtures("dealt")
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("maker", "model", "mixing"), CASES)
def test_micro_batches_of_unequal_size_make_the_step_of_one_batch(
    request: pytest.FixtureRequest,
    maker: Callable[..., Replay],
    model: str,
    mixing: str,
    cuts: list[list[int]],
) -> None:
    make = request.getfixturevalue(model)
    ((whole,), logs, notes) = stepped(make(maker(mixing, 1.0)), [list(range(7))])
    ((parts,), other, updated) = stepped(make(maker(mixing, 1.0)), cuts)

    # float32 sums in another order
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert whole.abs().max() > 0.05
    assert other == pytest.approx(logs, rel=1e-5)
    assert (mixing == "separate") == (len(logs) == 2)
    for name, note in notes.items():
        torch.testing.assert_close(updated[name], note, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("dealt")
@pytest.mark.parametrize("cuts", [[list(range(7))], CUTS[0], CUTS[1]])
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("ratio", [1.0, 0.15])  # 0.15: one example, so that one process has none
@pytest.mark.parametrize(("maker", "model", "mixing"), CASES)
def test_processes_make_the_step_of_one(
    request: pytest.FixtureRequest,
    maker: Callable[..., Replay],
    model: str,
    mixing: str,
    ratio: float,
    processes: int,
    cuts: list[list[int]],
) -> None:
    make = request.getfixturevalue(model)
    ((whole,), logs, notes) = stepped(make(maker(mixing, ratio)), cuts)
    setups = [make(maker(mixing, ratio)) for _ in range(processes)]
    by_run = {id(setup[0]): setup for setup in setups}
    ranks = as_processes([setup[0] for setup in setups], lambda run: stepped(by_run[id(run)], cuts))

    # what data-parallel training makes of them
    mean = torch.stack([gradients[0] for gradients, _, _ in ranks]).mean(dim=0)
    torch.testing.assert_close(mean, whole, rtol=1e-4, atol=1e-6)
    for name, value in logs.items():
        assert np.mean([other[name] for _, other, _ in ranks]) == pytest.approx(value, rel=1e-5)
    for name, note in notes.items():
        for _, _, updated in ranks:
            torch.testing.assert_close(updated[name], note, rtol=1e-5, atol=0)
            assert torch.equal(updated[name], ranks[0][2][name])  # alike, bit by bit
