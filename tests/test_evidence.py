"""What is found in histories made up so that every number can be worked out on paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest

from clpeft.evidence import (
    Exhibit,
    Verdict,
    examine,
    rounded,
    same_bits,
    task_logs,
)
from clpeft.strategies.base import Evidence

Steps = Mapping[int, Mapping[str, float | None]]  # step of the task, from 1 -> what was logged


def history(*tasks: Steps, steps: int = 10) -> list[dict[str, Any]]:
    """The events of a run whose tasks (a, b, c, ...) have ten steps each."""
    events: list[dict[str, Any]] = [{"event": "evaluation", "task": None, "step": 0}]
    for index, logged in enumerate(tasks):
        begun = index * steps
        start = {"event": "task_start", "name": "abcdefgh"[index], "steps": steps}
        events.append({**start, "task": index, "step": begun})
        for step, logs in logged.items():
            values = {f"train/{key}": value for key, value in logs.items()}
            events.append({"event": "step", "task": index, "step": begun + step, **values})
        events.append({"event": "task_end", "task": index, "step": begun + steps})
    return events


def every(values: Sequence[float | None], key: str = "x/y", loss: float = 1.0) -> Steps:
    """A task of which every step is logged, from the first on."""
    return {step: {key: v, "loss/task": loss} for step, v in enumerate(values, 1)}


QUIET = {step: {"loss/task": 1.0} for step in range(1, 11)}  # a first task


def shown(
    kind: Evidence, *tasks: Steps, settings: Mapping[str, Any] | None = None, key: str = "x/y"
) -> Exhibit:
    (exhibit,) = examine(history(*tasks), {"s": {key: kind}}, {"s": settings or {}})
    return exhibit


def verdicts(exhibit: Exhibit) -> list[tuple[str, tuple[str, ...]]]:
    return [(str(finding.verdict), finding.tasks) for finding in exhibit.findings]


# Nothing.


@pytest.mark.parametrize("kind", [Evidence.PENALTY, Evidence.TERM])
def test_term_that_stayed_0(kind: Evidence) -> None:
    exhibit = shown(kind, QUIET, every([0.0] * 10), every([0.0] * 10))

    assert exhibit.verdict == Verdict.NOTHING
    assert verdicts(exhibit) == [("does nothing", ("b", "c"))]
    (finding,) = exhibit.findings
    # the first step of each task is not looked at
    assert "x/y stayed 0 from the second task on (18 logged steps of 20)" in finding.text
    assert (finding.strategy, finding.what, finding.numbers) == ("s", "x/y", (0.0, 0.0))


@pytest.mark.parametrize("kind", [Evidence.PENALTY, Evidence.TERM])
def test_term_that_stayed_0_in_one_task(kind: Evidence) -> None:
    exhibit = shown(kind, QUIET, every([0.0, 0.1] * 5), every([0.0] * 10))

    assert verdicts(exhibit) == [("does nothing", ("c",))]
    assert "stayed 0 in c (9 logged steps of 10)" in exhibit.findings[0].text


def test_terms_of_the_loss_are_called_so() -> None:
    for key, told in (("loss/y", "its term loss/y stayed 0"), ("y/kept", "its y/kept stayed 0")):
        exhibit = shown(Evidence.TERM, QUIET, every([0.0] * 10, key=key), key=key)
        assert told in exhibit.findings[0].text


@pytest.mark.parametrize("kind", [Evidence.PENALTY, Evidence.TERM])
def test_term_that_was_never_logged(kind: Evidence) -> None:
    exhibit = shown(kind, QUIET, QUIET, QUIET)

    assert verdicts(exhibit) == [("does nothing", ("b", "c"))]
    assert "x/y, which should show it, was not logged from the second" in exhibit.findings[0].text
    assert exhibit.findings[0].advice == (
        "See that the hook that logs it is reached after the first task."
    )


def test_term_that_was_logged_in_some_tasks_was_logged() -> None:
    (finding,) = shown(Evidence.TERM, QUIET, QUIET, every([0.0] * 10)).findings
    assert "its x/y stayed 0 from the second task on" in finding.text


@pytest.mark.parametrize("kind", list(Evidence))
def test_first_task_is_not_judged(kind: Evidence) -> None:
    # at work in the second task; what the first one shows does not matter
    at_work = every([1.0, 2.0] * 5)
    assert shown(kind, QUIET, at_work).verdict == Verdict.WORKS
    assert shown(kind, every([0.0] * 10), at_work).verdict == Verdict.WORKS
    alone = shown(kind, every([0.0] * 10))
    assert (alone.verdict, alone.amounts, alone.findings) == (Verdict.UNJUDGED, (), ())


def test_first_step_of_a_task_is_not_judged() -> None:
    # a spring is slack where it begins
    only_first = {1: {"x/y": 0.0, "loss/task": 1.0}}
    exhibit = shown(Evidence.PENALTY, QUIET, only_first)
    assert (exhibit.verdict, exhibit.findings) == (Verdict.UNJUDGED, ())
    # but where it is already pulled, that is passed over too
    exhibit = shown(Evidence.PENALTY, QUIET, every([50.0] + [0.0] * 9))
    assert verdicts(exhibit) == [("does nothing", ("b",))]


def test_last_step_alone_is_enough_for_nothing() -> None:
    # tracking.log_every is larger than a task: the loop still logs the last step
    last = {10: {"x/y": 0.0, "loss/task": 1.0}}
    assert shown(Evidence.PENALTY, QUIET, last).verdict == Verdict.NOTHING
    assert shown(Evidence.TERM, QUIET, last).verdict == Verdict.NOTHING
    assert shown(Evidence.MEMORY, QUIET, last).verdict == Verdict.NOTHING


def test_tasks_that_were_not_trained_are_no_first_task() -> None:
    # joint skips all but the last; so do the events of one whose history began later
    events = history({}, {}, every([0.0] * 10))
    (exhibit,) = examine(events, {"s": {"x/y": Evidence.TERM}}, {})
    assert (exhibit.amounts, exhibit.findings) == ((), ())
    assert [log.name for log in task_logs(events)] == ["c"]


def test_values_that_are_no_numbers_are_left_out() -> None:
    # NaN is written as null
    exhibit = shown(Evidence.TERM, QUIET, every([0.0, None, 0.25, None]))
    assert exhibit.amounts[0].value == 0.25
    exhibit = shown(Evidence.PENALTY, QUIET, every([None] * 10))
    assert verdicts(exhibit) == [("does nothing", ("b",))]


# Penalties as multiples of the task's loss.


def test_ratio_is_of_the_median_to_the_mean_loss() -> None:
    losses = [9.0, 4.0, 1.0, 0.5, 0.4, 0.1]  # without the first step: mean 1.2
    penalties = [0.0, 0.6, 12.0, 1.2, 2.4, 0.3]  # median 1.2, largest 12
    task = {
        step: {"x/y": penalty, "loss/task": loss}
        for step, (penalty, loss) in enumerate(zip(penalties, losses, strict=True), 1)
    }
    (amount,) = shown(Evidence.PENALTY, QUIET, task).amounts
    assert amount.value == pytest.approx(1.0)
    assert amount.largest == pytest.approx(10.0)


@pytest.mark.parametrize(("ratio", "strong"), [(10.0, False), (10.01, True), (-10.01, True)])
def test_penalty_that_is_too_strong(ratio: float, strong: bool) -> None:
    exhibit = shown(
        Evidence.PENALTY,
        QUIET,
        every([0.0] + [0.5] * 9),
        every([0.0] + [ratio * 0.25] * 9, loss=0.25),
        settings={"lambda_": 40.0, "fisher": "exact"},
    )
    assert verdicts(exhibit) == ([("too strong", ("c",))] if strong else [])
    if strong:
        (finding,) = exhibit.findings
        assert exhibit.verdict == Verdict.TOO_STRONG
        assert finding.numbers == pytest.approx((10.01,))
        assert "was 10 × the task's own loss in c" in finding.text
        assert "(strategies.s.lambda_=40.0): divided by 10, the two" in finding.advice


def test_a_loss_that_falls_to_0_makes_no_penalty_strong() -> None:
    # at the last steps the penalty is 1000 times the loss; over the task it is a fifth
    losses = [2.0] * 5 + [1e-4] * 5
    task = {step: {"x/y": 0.2, "loss/task": loss} for step, loss in enumerate(losses, 1)}
    exhibit = shown(Evidence.PENALTY, QUIET, task)
    assert exhibit.findings == ()
    assert exhibit.amounts[0].value == pytest.approx(0.2 / (8.0005 / 9))


def test_a_few_strong_steps_do_not_make_a_penalty_strong() -> None:
    exhibit = shown(Evidence.PENALTY, QUIET, every([0.0, 500.0, 500.0, 500.0] + [0.1] * 6))
    assert exhibit.findings == ()


@pytest.mark.parametrize(("logged", "strong"), [(4, False), (5, True)])
def test_few_logged_steps_say_nothing_of_strength(logged: int, strong: bool) -> None:
    # the loss at the last steps is not the task's
    task = {step: {"x/y": 1.0, "loss/task": 1e-3} for step in range(11 - logged, 11)}
    assert bool(shown(Evidence.PENALTY, QUIET, task).findings) == strong


@pytest.mark.parametrize(("logged", "strong"), [(2, False), (3, True)])
def test_strength_in_a_task_of_few_steps_is_judged_by_all_but_the_first(
    logged: int, strong: bool
) -> None:
    task = {step: {"x/y": 100.0, "loss/task": 1.0} for step in range(5 - logged, 5)}
    (exhibit,) = examine(history(QUIET, task, steps=4), {"s": {"x/y": Evidence.PENALTY}}, {"s": {}})
    assert bool(exhibit.findings) == strong


@pytest.mark.parametrize(("largest", "weak"), [(0.99e-4, True), (1e-4, False), (-0.99e-4, True)])
def test_penalty_that_is_too_weak(largest: float, weak: bool) -> None:
    # it is the largest that counts: a penalty grows from 0 with every task
    task = every([0.0, 0.0, 0.0, 0.0, largest], loss=1.0)
    exhibit = shown(Evidence.PENALTY, QUIET, task, task, settings={"lambda_": 3.0})
    assert verdicts(exhibit) == ([("too weak", ("b", "c"))] if weak else [])
    if weak:
        (finding,) = exhibit.findings
        assert "at most 0.0001 × the task's own loss" in finding.text
        # 0.01 / 0.99e-4 is 101, so more than a hundred times
        assert "(strategies.s.lambda_=3.0): 1000 times as much" in finding.advice


def test_penalty_that_is_weak_in_some_tasks_only_is_not_too_weak() -> None:
    weak, enough = every([0.0] + [1e-6] * 9), every([0.0] + [1e-3] * 9)
    assert shown(Evidence.PENALTY, QUIET, weak, enough).findings == ()


def test_penalty_without_a_loss_to_compare_it_with() -> None:
    exhibit = shown(Evidence.PENALTY, QUIET, every([0.0] + [0.5] * 9, loss=0.0))
    assert (exhibit.verdict, exhibit.amounts[0].value) == (Verdict.WORKS, None)


def test_only_penalties_are_compared_with_the_loss() -> None:
    # an imitation's loss may be of any size
    for value in (1e-6, 1e6):
        assert shown(Evidence.TERM, QUIET, every([0.0] + [value] * 9)).verdict == Verdict.WORKS


# Gradients.


def test_gradients_that_were_never_changed() -> None:
    exhibit = shown(Evidence.GRADIENT, QUIET, every([0.0] * 10), every([0.0] * 10))
    assert verdicts(exhibit) == [("does nothing", ("b", "c"))]
    assert "it changed no gradient, x/y stayed 0" in exhibit.findings[0].text
    assert "(20 logged steps of 20)" in exhibit.findings[0].text


def test_gradients_need_not_be_changed_in_every_task() -> None:
    # two tasks may happen not to conflict
    exhibit = shown(Evidence.GRADIENT, QUIET, every([0.0] * 10), every([0.0] * 9 + [1.0]))
    assert (exhibit.verdict, exhibit.findings) == (Verdict.WORKS, ())
    assert [amount.value for amount in exhibit.amounts] == pytest.approx([0.0, 0.1])


def test_changes_at_a_tasks_first_step_count() -> None:
    assert shown(Evidence.GRADIENT, QUIET, every([1.0] + [0.0] * 9)).verdict == Verdict.WORKS


@pytest.mark.parametrize(("logged", "judged"), [(19, False), (20, True)])
def test_gradients_are_not_judged_by_few_of_many_steps(logged: int, judged: bool) -> None:
    # a change may have fallen between the steps that were logged
    task = {step: {"x/y": 0.0, "loss/task": 1.0} for step in range(1, logged + 1)}
    (exhibit,) = examine(
        history(QUIET, task, steps=100), {"s": {"x/y": Evidence.GRADIENT}}, {"s": {}}
    )
    assert exhibit.verdict == (Verdict.NOTHING if judged else Verdict.UNJUDGED)


def test_gradients_are_judged_by_all_steps_however_few() -> None:
    assert shown(Evidence.GRADIENT, QUIET, every([0.0] * 10)).verdict == Verdict.NOTHING


def test_gradients_that_nothing_was_logged_of_are_judged_by_any_step() -> None:
    exhibit = shown(Evidence.GRADIENT, QUIET, {10: {"loss/task": 1.0}})
    assert exhibit.verdict == Verdict.NOTHING
    assert "x/y, which should show it, was not logged" in exhibit.findings[0].text


# Memories.


def test_memory_that_grows() -> None:
    exhibit = shown(Evidence.MEMORY, every([0.0] * 10), every([8.0, 16.0, 24.0]), every([32.0]))
    assert (exhibit.verdict, exhibit.findings) == (Verdict.WORKS, ())
    assert [amount.value for amount in exhibit.amounts] == [24.0, 8.0]


@pytest.mark.parametrize("first", [QUIET, every([0.0] * 10)])
def test_memory_that_was_never_read(first: Steps) -> None:
    exhibit = shown(
        Evidence.MEMORY,
        first,
        every([0.0] * 10),
        every([0.0] * 10),
        settings={"memory_size": 1, "ratio": 0.01},
    )
    assert verdicts(exhibit) == [("does nothing", ("b", "c"))]
    (finding,) = exhibit.findings
    assert "its memory was not read, x/y stayed 0 from the second task on" in finding.text
    assert "(strategies.s.memory_size=1 strategies.s.ratio=0.01)" in finding.advice


def test_memory_that_was_not_read_any_more() -> None:
    exhibit = shown(Evidence.MEMORY, QUIET, every([8.0, 16.0]), every([16.0] * 10))
    assert verdicts(exhibit) == [("does nothing", ("c",))]
    assert "x/y stayed 16 in c" in exhibit.findings[0].text


def test_memory_that_was_read_at_the_first_step_only() -> None:
    assert shown(Evidence.MEMORY, QUIET, every([8.0] * 10)).verdict == Verdict.WORKS


# Masks.


def test_mask_that_changes_from_task_to_task() -> None:
    tasks = [every([share] * 10) for share in (0.2, 0.4, 0.6)]
    exhibit = shown(Evidence.MASK, *tasks)
    assert (exhibit.verdict, exhibit.findings) == (Verdict.WORKS, ())
    assert [amount.last for amount in exhibit.amounts] == [0.4, 0.6]


def test_mask_that_changes_within_a_task() -> None:
    exhibit = shown(Evidence.MASK, every([0.5] * 10), every([0.5, 0.4, 0.5]))
    assert exhibit.verdict == Verdict.WORKS


def test_mask_that_never_changed() -> None:
    exhibit = shown(Evidence.MASK, *[every([0.5] * 10)] * 3, settings={"share": 0.5})
    assert verdicts(exhibit) == [("does nothing", ("b", "c"))]
    assert "its mask did not change, x/y stayed 0.5" in exhibit.findings[0].text
    assert "(strategies.s.share=0.5)" in exhibit.findings[0].advice


def test_mask_need_not_change_in_every_task() -> None:
    tasks = [every([share] * 10) for share in (0.5, 0.5, 0.6)]
    assert shown(Evidence.MASK, *tasks).findings == ()


# What to try, and the rest.


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lambda_": 0.0, "gamma": 0.0}, "strategies.s.lambda_ is 0: raise it."),
        (
            {"lambda1": 0, "lambda2": 0.0},
            "strategies.s.lambda1 and strategies.s.lambda2 are 0: raise it.",
        ),
        ({"lambda_": 2.0, "gamma": 0.0}, "(strategies.s.lambda_=2.0)"),
        ({"lambda1": 2.0, "lambda2": 0.0, "r": 1}, "strategies.s.lambda2 is 0: raise it."),
        ({"strength": 2.0}, "(strategies.s.strength=2.0)"),
        ({}, "(s has no settings)"),
    ],
)
def test_strength_of_0_is_named(settings: dict[str, Any], told: str) -> None:
    (finding,) = shown(Evidence.PENALTY, QUIET, every([0.0] * 10), settings=settings).findings
    assert told in finding.advice


def test_many_tasks_are_counted_rather_than_listed() -> None:
    at_work, dead = every([0.0, 1.0]), every([0.0, 0.0])
    (finding,) = shown(Evidence.TERM, QUIET, at_work, *[dead] * 5).findings
    assert "stayed 0 in c, d, e, f and 1 more" in finding.text
    assert finding.tasks == ("c", "d", "e", "f", "g")


def test_each_strategy_is_judged_by_what_it_declares() -> None:
    tasks = [{2: {"loss/task": 1.0, "loss/a": 0.0, "b/read": 8.0 * k}} for k in range(3)]
    exhibits = examine(
        history(*tasks),
        {"a": {"loss/a": Evidence.PENALTY}, "b": {"b/read": Evidence.MEMORY}, "c": {}},
        {"a": {"lambda_": 0.0}, "b": {}, "c": {}},
    )
    assert [(e.strategy, e.key, e.verdict) for e in exhibits] == [
        ("a", "loss/a", Verdict.NOTHING),
        ("b", "b/read", Verdict.WORKS),
    ]


def test_several_things_may_be_found_of_one_piece() -> None:
    exhibit = shown(
        Evidence.PENALTY, QUIET, every([0.0] * 10), every([0.0] + [100.0] * 9), every([0.0, 0.5])
    )
    assert verdicts(exhibit) == [("does nothing", ("b",)), ("too strong", ("c",))]
    assert exhibit.verdict == Verdict.NOTHING


def test_findings_are_plain_values() -> None:
    (finding,) = shown(Evidence.TERM, QUIET, every([0.0] * 10)).findings
    written = json.loads(json.dumps(asdict(finding)))
    assert written["verdict"] == "does nothing"
    assert written["tasks"] == ["b"]
    assert written["text"].startswith("s does nothing: its x/y stayed 0")


def test_of_several_strengths_those_that_are_on_are_named() -> None:
    task = every([0.0] + [2000.0] * 9)
    settings = {"lambda1": 100.0, "lambda2": 0.0, "r": 8}
    (finding,) = shown(Evidence.PENALTY, QUIET, task, settings=settings).findings
    assert "was 2000 × the task's own loss" in finding.text
    assert "Lower its strength (strategies.s.lambda1=100.0): divided by 2000," in finding.advice


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        # DER's: what its penalty is multiplied by
        ({"memory_size": 9, "alpha": 0.5}, "(strategies.s.alpha=0.5)"),
        # RWalk's: beside a λ an α is something else
        ({"alpha": 0.1, "lambda_": 3.0}, "(strategies.s.lambda_=3.0)"),
        ({"size": 9, "kind": "sum"}, "(strategies.s.size=9 strategies.s.kind=sum)"),
    ],
)
def test_what_to_lower_is_what_the_penalty_is_multiplied_by(
    settings: dict[str, Any], told: str
) -> None:
    task = every([0.0] + [2000.0] * 9)
    (finding,) = shown(Evidence.PENALTY, QUIET, task, settings=settings).findings
    assert f"Lower its strength {told}: divided by" in finding.advice


def test_settings_that_may_be_why_are_all_given_as_a_command_line_has_them() -> None:
    # no λ, however large, makes up for a ratio that asks for no example
    settings = {"ratio": 0.001, "lambda_": 1.0, "limit": None, "strict": True, "kind": "sum"}
    (finding,) = shown(Evidence.TERM, QUIET, every([0.0] * 10), settings=settings).findings
    s = "strategies.s"
    told = f"{s}.ratio=0.001 {s}.lambda_=1.0 {s}.limit=null {s}.strict=true {s}.kind=sum"
    assert f"Look at its settings ({told})" in finding.advice


@pytest.mark.parametrize(
    ("number", "digits", "told"),
    [(1642.3, 2, "1600"), (1642.3, 1, "2000"), (0.01642, 2, "0.016"), (1.64e-7, 2, "1.6e-07")],
)
def test_rounded(number: float, digits: int, told: str) -> None:
    assert rounded(number, digits) == told


def test_equal_bits() -> None:
    finding = same_bits("s", "finetune", "finetune-s0-1a2b3c4d", ("a", "b", "c"))
    assert (finding.verdict, finding.what, finding.tasks) == ("does nothing", "weights", ("b", "c"))
    assert "weights and scores of finetune to the bit (finetune-s0-1a2b3c4d)" in finding.text
