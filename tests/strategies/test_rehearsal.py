"""What all strategies with a memory have in common."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from clpeft.strategies.arrow import from_bytes
from clpeft.strategies.base import Strategy
from clpeft.strategies.rehearsal import Rehearsal, RehearsalConfig
from tests.running import Outcome

Examples = Callable[..., Any]


class Keeping(Rehearsal):
    name = "keeping"


class Picky(Strategy):
    """Objects to examples whose first token is odd, and notes who asked."""

    asked: list[tuple[int, str]]

    def objections(
        self, run: Any, task: Any, examples: Any, beside: Any, source: str
    ) -> dict[int, str]:
        self.asked.append((task.index, source))
        return {row: "odd" for row, ids in enumerate(examples["input_ids"]) if ids[0] % 2}


class First(Strategy):
    """Admits the first three."""

    def objections(
        self, run: Any, task: Any, examples: Any, beside: Any, source: str
    ) -> dict[int, str]:
        return dict.fromkeys(range(3, len(examples)), "late")


def keeping(run: Any, size: int, *others: Strategy) -> Keeping:
    strategy = Keeping(RehearsalConfig(size, "reservoir", "total"))
    run.strategies = [strategy, *others]
    strategy.setup(run)
    return strategy


def test_only_admitted_examples_enter_the_memory(
    bigrams: Callable[..., Any], examples: Examples
) -> None:
    run, picky = bigrams(30), Picky(None)
    picky.asked = []
    strategy = keeping(run, 100, picky, First(None))
    for index in range(2):
        task: Any = SimpleNamespace(index=index, train=examples([[i] for i in range(9)]))
        strategy.after_task(run, task)

    assert strategy._memory.examples is not None
    assert strategy._memory.examples["input_ids"] == [[0], [2], [4]] * 2  # even, and the first
    assert picky.asked == [(0, "keeping"), (1, "keeping")]
    assert strategy._memory.seen == 6


def test_rows_that_are_new_are_told(bigrams: Callable[..., Any], examples: Examples) -> None:
    told: list[list[int]] = []

    class Told(Keeping):
        def _remembered(self, run: Any, task: Any, rows: Any) -> None:
            columns = self._memory.columns.numbers
            told.append(sorted(columns["example_id"][rows.numpy()].tolist()))
            assert set(columns["task_id"][rows.numpy()]) == {task.index}

    run = bigrams(30)
    strategy = Told(RehearsalConfig(4, "reservoir", "per_task"))
    run.strategies = [strategy]
    strategy.setup(run)
    for index in range(2):
        rows = examples([[i] for i in range(3)], task=index)
        strategy.after_task(run, SimpleNamespace(index=index, train=rows))  # type: ignore[arg-type]
    assert told == [[0, 1, 2], [0, 1, 2]]


def test_two_memories_hold_different_examples(
    bigrams: Callable[..., Any], examples: Examples
) -> None:
    class Other(Keeping):
        name = "other"

    run = bigrams(30)
    task: Any = SimpleNamespace(index=0, train=examples([[i % 30] for i in range(200)]))
    held = []
    for kind in (Keeping, Other, Keeping):
        strategy = kind(RehearsalConfig(20, "reservoir", "total"))
        run.strategies = [strategy]
        strategy.setup(run)
        strategy.after_task(run, task)
        assert strategy._memory.examples is not None
        held.append(strategy._memory.examples["example_id"])
    assert held[0] != held[1]
    assert held[0] == held[2]


def test_what_a_memory_holds_is_recorded_after_each_task(
    finished: Callable[..., Outcome],
) -> None:
    outcome = finished("agem+replay")
    recorded = outcome.results["cost"]["facts"]

    assert len(recorded) == 3
    for tasks, facts in enumerate(recorded, 1):
        assert sorted(facts) == ["agem", "replay"]
        for place, name in enumerate(("agem", "replay")):
            memory = outcome.state(tasks)["strategies"][str(place)]["memory"]
            held = from_bytes(memory["arrow"])
            assert facts[name]["memory_examples"] == len(held) == 24
            # tokens and one offset of 4 bytes each, and the numbers of each example
            tokens = sum(len(row) for row in held["input_ids"])
            assert facts[name]["memory_bytes"] == 4 * (tokens + 24) + 24 * (3 * 8 + 4)


def test_strategy_without_facts_is_left_out(finished: Callable[..., Outcome]) -> None:
    assert finished("finetune").results["cost"]["facts"] == [{}, {}, {}]
