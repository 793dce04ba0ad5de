"""What `clpeft doctor` compares and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from clpeft.config import run_name
from clpeft.doctor.examination import Comparison, Examination, distance, step_seconds
from clpeft.doctor.printing import COLUMNS, show
from clpeft.doubts import counterparts, same_result, with_strategies
from clpeft.evidence import Amount, Exhibit, TaskLog, Verdict
from clpeft.strategies.base import Evidence
from tests.running import compose_only

Overrides = Callable[..., list[str]]


def test_runs_that_a_run_has_to_differ_from(tiny: Overrides) -> None:
    one, two = compose_only(tiny("ewc")), compose_only(tiny("ewc+replay+agem"))

    assert [(lacking, list(c.strategies)) for lacking, c in counterparts(one)] == [
        ("ewc", ["finetune"])
    ]
    assert [(lacking, list(c.strategies)) for lacking, c in counterparts(two)] == [
        ("ewc+replay+agem", ["finetune"]),
        ("ewc", ["replay", "agem"]),
        ("replay", ["ewc", "agem"]),
        ("agem", ["ewc", "replay"]),
    ]
    assert counterparts(compose_only(tiny("cumulative"))) == []
    # which is refused where it has nothing to screen
    screened = compose_only(tiny("replay+quality_control"))
    assert [(lacking, list(c.strategies)) for lacking, c in counterparts(screened)] == [
        ("replay+quality_control", ["finetune"]),
        ("quality_control", ["replay"]),
    ]


def test_counterpart_has_the_name_of_the_run_that_a_command_makes(tiny: Overrides) -> None:
    """By which it is found, whether composed or read from a config.yaml."""
    for names, rest in (("ewc", "finetune"), ("ewc+replay", "replay"), ("ewc+replay", "ewc")):
        wanted = run_name(compose_only(tiny(rest)))
        composed = compose_only(tiny(names))
        frozen = OmegaConf.create(OmegaConf.to_yaml(composed, resolve=True))
        assert run_name(with_strategies(composed, [rest])) == wanted
        assert run_name(with_strategies(frozen, [rest])) == wanted  # type: ignore[arg-type]
        assert list(composed.strategies) == names.split("+")  # not changed


def result(weights: str | None, matrix: list[Any]) -> dict[str, Any]:
    return {"digests": {} if weights is None else {"weights": weights}, "matrix": matrix}


def test_equal_is_in_weights_and_in_scores() -> None:
    assert same_result(result("a", [[0.5]]), result("a", [[0.5]]))
    assert not same_result(result("a", [[0.5]]), result("b", [[0.5]]))
    # routing changes scores and no weights
    assert not same_result(result("a", [[0.5]]), result("a", [[0.25]]))
    # results of earlier versions do not say
    assert not same_result(result(None, [[0.5]]), result(None, [[0.5]]))


def test_distance_by_hand() -> None:
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[1.0]])}
    other = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[4.0]])}
    # ‖(0, −4, −3)‖ / ‖(3, 4, 4)‖
    assert distance(one, other) == pytest.approx(5 / 41**0.5)
    assert distance(one, {**other, "c": torch.zeros(1)}) is None
    assert distance(one, {**other, "b": torch.zeros(2)}) is None
    assert distance({}, {}) is None


def test_seconds_of_a_step_are_the_median_after_the_first_task() -> None:
    def log(*pairs: tuple[int, float]) -> TaskLog:
        return TaskLog("t", 10, 0, tuple({"step": step, "time": time} for step, time in pairs))

    first = log((1, 0.0), (2, 50.0))
    # 2 s, 2 s over two steps each; a pause of 100 s
    later = [log((12, 60.0), (14, 64.0), (16, 164.0)), log((22, 200.0), (24, 204.0))]
    assert step_seconds([first, *later]) == 2.0
    assert step_seconds([first]) is None
    assert step_seconds([first, log((20, 1.0))]) is None


def test_more_tasks_than_fit_are_given_as_a_range(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    def exhibit(count: int) -> Exhibit:
        amounts = tuple(Amount(f"t{i}", i / 10, i / 10, 5, 5, i / 10) for i in range(1, count + 1))
        return Exhibit("ewc", "loss/ewc", Evidence.PENALTY, amounts, ())

    def shown(count: int) -> str:
        compared = (Comparison("ewc", "finetune", False, 0.125, (0.5, None), 1.25),)
        examined = Examination("run", ("ewc",), (exhibit(count),), compared, (), ())
        show(examined, Console(width=120))
        return capsys.readouterr().out

    few, many = shown(COLUMNS), shown(COLUMNS + 6)
    assert "ewc loss/ewc penalty 0.1 × 0.2 × 0.3 × 0.4 × works" in " ".join(few.split())
    assert "t1 to t10" in many
    assert "ewc loss/ewc penalty 0.1 × to 1 × works" in " ".join(many.split())
    assert "ewc finetune 12 % apart 0.50 / – 1.25 × differs" in " ".join(few.split())
    assert "Nothing was found against it." in few


def test_verdict_is_the_worst() -> None:
    assert Exhibit("s", "x/y", Evidence.MASK, (), ()).verdict == Verdict.UNJUDGED
