"""GDumb: what the memory holds is all that the model ever learns from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clpeft.composition import settle
from clpeft.config import ConfigError, RunError
from clpeft.strategies.gdumb import GDumb, GDumbConfig
from clpeft.training.loop import Loop
from clpeft.training.state import read_state, write_state
from tests.running import Outcome, compose_only, run_it, same_bits

Examples = Callable[..., Any]


def made(run: Any, size: int = 8) -> GDumb:
    strategy = GDumb(GDumbConfig(size, "class_balanced", "total"))
    strategy.setup(run)
    return strategy


def a_task(examples: Examples, index: int) -> Any:
    """Twelve examples, nine of one label and three of another, both its own."""
    labels = [2 * index + (i % 4 == 3) for i in range(12)]
    rows = examples([[i % 10] for i in range(12)], labels=labels, task=index)
    return SimpleNamespace(index=index, name=f"task {index}", train=rows)


def ids(dataset: Any) -> list[tuple[int, int]]:
    return list(zip(dataset["task_id"], dataset["example_id"], strict=True))


def test_every_task_begins_with_the_first_values(regression: Callable[..., Any]) -> None:
    run = regression((0.0, 1.0), (0.25, -3.0))
    strategy = made(run)
    (weight,) = run.trainable.values()
    for index in range(2):
        weight.data.copy_(torch.tensor([7.0, 8.0]))  # in place, as an optimizer does
        strategy.before_task(run, SimpleNamespace(index=index))  # type: ignore[arg-type]
        assert weight.tolist() == [0.25, -3.0]
        assert run.trainable["weight"] is weight  # the same parameter, for the optimizer


def test_training_set_is_the_memory(regression: Callable[..., Any], examples: Examples) -> None:
    run = regression((0.0,) * 10, (0.0,) * 4)
    strategy = made(run)
    first = strategy.train_examples(run, a_task(examples, 0), "ignored")  # type: ignore[arg-type]

    # eight of the twelve: all three of the rare label, five of the other
    assert sorted(first["label"]) == [0] * 5 + [1] * 3
    assert strategy.transform_gradients(run) == {"gdumb/earlier_examples": 0}
    strategy.after_task(run, a_task(examples, 0))
    assert strategy._memory.seen == 12  # each once
    second = strategy.train_examples(run, a_task(examples, 1), "ignored")  # type: ignore[arg-type]
    assert sorted(second["label"]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(ids(second)[:4]) < set(ids(first))
    assert strategy.transform_gradients(run) == {"gdumb/earlier_examples": 4}


def test_going_on_within_a_task_adds_nothing(
    regression: Callable[..., Any], examples: Examples, tmp_path: Path
) -> None:
    run = regression((0.0,) * 10, (0.0,) * 4)
    strategy = made(run)
    strategy.train_examples(run, a_task(examples, 0), "ignored")  # type: ignore[arg-type]
    held = strategy.train_examples(run, a_task(examples, 1), "ignored")  # type: ignore[arg-type]
    write_state(tmp_path / "state", strategy.state_dict())
    again = made(run)
    again.load_state_dict(read_state(tmp_path / "state"))
    found = again.train_examples(run, a_task(examples, 1), "ignored")  # type: ignore[arg-type]

    assert found.to_dict() == held.to_dict()
    assert again._memory.seen == 24
    assert again.transform_gradients(run) == {"gdumb/earlier_examples": 4}
    # the next task's are new to both, and the same of them are kept
    both = [s.train_examples(run, a_task(examples, 2), "ignored") for s in (strategy, again)]  # type: ignore[arg-type]
    assert ids(both[0]) == ids(both[1])
    assert strategy._memory.seen == again._memory.seen == 36


def test_state_holds_no_weights(regression: Callable[..., Any]) -> None:
    assert made(regression((0.0,), (0.0, 1.0))).state_dict().keys() == {"memory", "entered"}


def test_only_admitted_examples_enter(regression: Callable[..., Any], examples: Examples) -> None:
    run = regression((0.0,) * 10, (0.0,) * 4)

    def admit(run: Any, task: Any, given: Any, source: str) -> Any:
        assert source == "gdumb"
        return given.select(range(2))

    run.admitted = lambda task, given, source: admit(run, task, given, source)
    found = made(run).train_examples(run, a_task(examples, 0), "ignored")  # type: ignore[arg-type]
    assert ids(found) == [(0, 0), (0, 1)]


def test_nothing_admitted_is_told(regression: Callable[..., Any], examples: Examples) -> None:
    run = regression((0.0,) * 10, (0.0,) * 4)
    run.admitted = lambda task, given, source: given.select([])
    with pytest.raises(RunError, match=r"^gdumb has nothing to train on: no example of 'task 0'"):
        made(run).train_examples(run, a_task(examples, 0), "ignored")  # type: ignore[arg-type]


def test_memory_of_everything_is_finetuning_at_first(
    tiny: Callable[..., list[str]], tmp_path: Path, finished: Callable[..., Outcome]
) -> None:
    outcome = run_it(tiny("gdumb", "strategies.gdumb.memory_size=1000"), tmp_path)

    # of the first task the same examples in the same order
    assert same_bits(outcome.state(1)["parameters"], finished("finetune").state(1)["parameters"])
    # later as many as cumulative training has
    assert [len(outcome.steps(task)) for task in range(3)] == [8, 16, 24]
    assert [step["train/gdumb/earlier_examples"] for step in outcome.logged_steps] == (
        [0.0] * 8 + [32.0] * 16 + [64.0] * 24
    )
    held = [facts["gdumb"]["memory_examples"] for facts in outcome.results["cost"]["facts"]]
    assert held == [32, 64, 96]


def test_what_earlier_training_left_plays_no_part(
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    finished: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every weight spoilt after each task, the next one ends in the same bits."""
    whole, train_task = finished("gdumb"), Loop.train_task

    def spoiling(self: Loop, task: Any, examples: Any) -> None:
        train_task(self, task, examples)
        if task.index < 2:
            with torch.no_grad():
                for parameter in self.run.trainable.values():
                    parameter.fill_(3.0)

    monkeypatch.setattr(Loop, "train_task", spoiling)
    outcome = run_it(tiny("gdumb"), tmp_path)

    assert not same_bits(outcome.state(2)["parameters"], whole.state(2)["parameters"])
    assert same_bits(outcome.after, whole.after)
    assert outcome.results["matrix"][3] == whole.results["matrix"][3]


def test_memory_is_balanced(finished: Callable[..., Outcome]) -> None:
    run = finished("gdumb").run
    (strategy,) = run.strategies
    labels = np.bincount(strategy._memory.columns.numbers["label"])  # type: ignore[attr-defined]
    assert labels.tolist() == [8, 8, 8, 8]  # 32 of 96, four desks


@pytest.mark.parametrize("other", sorted(GDumb.conflicts))
def test_strategies_that_nothing_is_left_for_are_refused(
    tiny: Callable[..., list[str]], other: str
) -> None:
    model = "tiny_bert" if other == "er_ace" else None
    overrides = tiny("gdumb", f"strategy=[gdumb,{other}]", model=model)
    with pytest.raises(ConfigError, match=f"'gdumb' and '{other}' cannot be combined: the one"):
        settle(compose_only(overrides))


def test_strategies_that_change_the_adapter_are_refused(tiny: Callable[..., list[str]]) -> None:
    with pytest.raises(
        ConfigError, match="gdumb and olora cannot be combined: each swaps or grows"
    ):
        settle(compose_only(tiny("gdumb+olora")))
