"""RWalk's score and Fisher, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clpeft.strategies.rwalk import (
    RWalk,
    RWalkConfig,
    moving_average,
    riemannian_score,
    unit_range,
)
from tests.running import Outcome

TASK: Any = SimpleNamespace(index=0)


def test_moving_average_by_hand() -> None:
    fisher = [torch.tensor([4.0, 1.0]), torch.tensor([8.0])]
    moving_average(fisher, [torch.tensor([1.0, -2.0]), torch.tensor([0.0])], alpha=0.25)
    # ¼ g² + ¾ F
    assert [tensor.tolist() for tensor in fisher] == [[3.25, 1.75], [6.0]]


def test_score_by_hand() -> None:
    (found,) = riemannian_score(
        [torch.tensor([2.0, -1.0, 3.0])],
        [torch.tensor([4.0, 1.0, 0.0])],
        [torch.tensor([1.0, 2.0, -5.0])],
        epsilon=0.5,
    )
    # 2 / (½·4·1 + ½); nothing for a weight whose moves raised the loss; 3 / (0 + ½)
    assert found.tolist() == pytest.approx([0.8, 0.0, 6.0])


def test_largest_entry_of_all_parameters_is_one() -> None:
    found = unit_range([torch.tensor([1.0, 0.0]), torch.tensor([[4.0], [2.0]])])
    assert [tensor.tolist() for tensor in found] == [[0.25, 0.0], [[1.0], [0.5]]]
    assert unit_range([torch.zeros(2)])[0].tolist() == [0.0, 0.0]


class Walk:
    """A strategy on two weights that are moved by hand, from (1, −3)."""

    def __init__(self, make: Callable[..., Any], **settings: Any) -> None:
        values = {"lambda_": 1.0, "alpha": 0.25, "every": 2, "epsilon": 0.5, **settings}
        self.run = make((0.0, 1.0), (1.0, -3.0))
        self.run.optimizer = SimpleNamespace(step_was_skipped=False)
        (self.weight,) = self.run.trainable.values()
        self.strategy = RWalk(RWalkConfig(**values))
        self.strategy.setup(self.run)

    def step(
        self, gradient: Sequence[float], move: Sequence[float], *, skipped: bool = False
    ) -> None:
        self.weight.grad = torch.tensor(gradient)
        self.strategy.task_gradients(self.run)
        self.strategy.transform_gradients(self.run)
        self.run.optimizer.step_was_skipped = skipped
        with torch.no_grad():
            self.weight += torch.tensor(move)
        self.strategy.after_step(self.run)

    def end_task(self) -> None:
        self.strategy.after_task(self.run, TASK)

    @property
    def score(self) -> Tensor:
        return self.strategy._score[0]

    @property
    def fisher(self) -> Tensor:
        return self.strategy._fisher[0]


Regression = Callable[..., Any]


def two_steps(walk: Walk) -> None:
    """F: (4, 1), then ¼(1, 4) + ¾(4, 1) = (3.25, 1.75); −g·Δθ: (2, ½), then (½, 2)."""
    walk.step((2.0, -1.0), (-1.0, 0.5))
    walk.step((1.0, 2.0), (-0.5, -1.0))


def test_interval_of_two_steps(regression: Regression) -> None:
    walk = Walk(regression)
    two_steps(walk)

    assert walk.fisher.tolist() == [3.25, 1.75]
    # 2.5 / (½ F Δ² + ½) with Δ = (−1.5, −0.5) over both steps
    expected = [2.5 / (0.5 * 3.25 * 2.25 + 0.5), 2.5 / (0.5 * 1.75 * 0.25 + 0.5)]
    assert walk.score.tolist() == pytest.approx(expected)


def test_each_step_its_own_interval(regression: Regression) -> None:
    walk = Walk(regression, every=1)
    two_steps(walk)

    first = [2.0 / (0.5 * 4.0 * 1.0 + 0.5), 0.5 / (0.5 * 1.0 * 0.25 + 0.5)]
    second = [0.5 / (0.5 * 3.25 * 0.25 + 0.5), 2.0 / (0.5 * 1.75 * 1.0 + 0.5)]
    expected = [one + other for one, other in zip(first, second, strict=True)]
    assert walk.score.tolist() == pytest.approx(expected)


def test_negative_falls_count_within_an_interval_and_not_beyond(regression: Regression) -> None:
    walk = Walk(regression, every=2, alpha=0.0)  # F stays (1, 1)
    walk.step((1.0, 1.0), (1.0, -1.0))  # −g·Δθ = (−1, 1)
    walk.step((1.0, 1.0), (-3.0, 0.0))  # (3, 0)
    # (2, 1) for Δ = (−2, −1): 2 / (2 + ½) and 1 / (½ + ½)
    assert walk.score.tolist() == pytest.approx([0.8, 1.0])
    walk.step((1.0, 1.0), (1.0, 0.0))
    walk.step((1.0, 1.0), (1.0, 0.0))  # raised the loss by 2
    assert walk.score.tolist() == pytest.approx([0.8, 1.0])


def test_what_is_left_of_an_interval_counts(regression: Regression) -> None:
    scores = []
    for every in (2, 5):
        walk = Walk(regression, every=every)
        two_steps(walk)
        walk.end_task()
        scores.append(walk.score.tolist())
    assert scores[0] == scores[1]
    assert min(scores[0]) > 0.5


def test_interval_does_not_go_on_into_the_next_task(regression: Regression) -> None:
    walk = Walk(regression, every=2, alpha=0.0, lambda_=0.0)
    walk.step((1.0, 1.0), (-1.0, -1.0))
    walk.end_task()  # s = 1 / (½ + ½)
    assert walk.score.tolist() == [1.0, 1.0]
    walk.step((1.0, 1.0), (-1.0, -1.0))
    assert walk.score.tolist() == [1.0, 1.0]  # the interval's second step is yet to come
    walk.step((1.0, 1.0), (-1.0, -1.0))
    # 2 / (½·4 + ½) since the task began
    assert walk.score.tolist() == pytest.approx([1.8, 1.8])


def test_scores_of_tasks_are_averaged_and_the_fisher_goes_on(regression: Regression) -> None:
    walk = Walk(regression, every=1, alpha=0.5, lambda_=0.0)
    walk.step((2.0, 1.0), (-1.0, -1.0))
    walk.end_task()
    # the first task's as it is: 2 / (2 + ½), 1 / (½ + ½)
    assert walk.score.tolist() == pytest.approx([0.8, 1.0])
    walk.step((0.0, 1.0), (-1.0, -1.0))
    walk.end_task()
    # F = ½(0, 1) + ½(4, 1), not begun anew; s_task = 0 and 1 / (½ + ½)
    assert walk.fisher.tolist() == [2.0, 1.0]
    assert walk.score.tolist() == pytest.approx([0.4, 1.0])
    walk.end_task()  # a task that nothing was learned in
    assert walk.score.tolist() == pytest.approx([0.2, 0.5])


def test_penalty_by_hand(regression: Regression) -> None:
    walk = Walk(regression, every=1, alpha=0.5, lambda_=3.0)
    walk.step((2.0, 1.0), (-1.0, -1.0))
    walk.end_task()  # F = (4, 1), s = (0.8, 1); θ* = (0, −4)
    stiffness = [4 / 4 + 0.8 / 1, 1 / 4 + 1 / 1]
    walk.run.logging = True
    with torch.no_grad():
        walk.weight.copy_(torch.tensor([2.0, -3.0]))
    walk.weight.grad = torch.tensor([10.0, 20.0])
    logged = walk.strategy.transform_gradients(walk.run)

    # λ Σ (F̂ + ŝ) δ² with δ = (2, 1), and its gradient 2λ (F̂ + ŝ) δ: no ½ as in EWC
    assert float(logged["loss/rwalk"]) == pytest.approx(3 * (stiffness[0] * 4 + stiffness[1] * 1))
    assert walk.weight.grad.tolist() == pytest.approx(
        [10 + 2 * 3 * stiffness[0] * 2, 20 + 2 * 3 * stiffness[1] * 1]
    )


def test_pull_of_the_penalty_is_no_part_of_the_fisher_or_the_score(regression: Regression) -> None:
    found = []
    for strength in (0.0, 100.0):
        walk = Walk(regression, every=1, lambda_=strength)
        two_steps(walk)
        walk.end_task()
        two_steps(walk)  # away from the anchor
        found.append((walk.fisher.tolist(), walk.score.tolist()))
    assert found[0] == found[1]


def test_step_that_was_skipped_leaves_everything(regression: Regression) -> None:
    walk, other = Walk(regression), Walk(regression)
    walk.step((torch.inf, 1.0), (0.0, 0.0), skipped=True)
    for each in (walk, other):
        two_steps(each)
    assert walk.fisher.tolist() == other.fisher.tolist()
    assert walk.score.tolist() == other.score.tolist()


def test_descent_on_a_quadratic_gives_its_fall_over_its_divergence(regression: Regression) -> None:
    """½ Σ a θ², F held at the first gradient's square: all in closed form as steps shrink."""
    curvature, epsilon, errors = torch.tensor([1.0, 4.0]), 0.1, []
    start = torch.tensor([1.0, -3.0])
    for rate in (0.02, 0.01, 0.005):
        walk = Walk(regression, every=10_000, alpha=0.0, epsilon=epsilon)
        for _ in range(round(0.4 / rate)):
            gradient = curvature * walk.weight.detach()
            walk.step(gradient.tolist(), (-rate * gradient).tolist())
        end = walk.weight.detach().clone()
        walk.end_task()
        fall = 0.5 * curvature * (start**2 - end**2)
        expected = fall / (0.5 * (curvature * start) ** 2 * (end - start) ** 2 + epsilon)
        errors.append((walk.score / expected - 1).abs())
    for coarse, fine in pairwise(errors):
        # −g·Δθ is the fall to first order: half the step, half the error
        assert ((fine / coarse - 0.5).abs() < 0.03).all()
    assert (errors[-1] < 0.02).all()


def test_saved_within_an_interval_it_goes_on_alike(regression: Regression) -> None:
    whole, saved = Walk(regression, every=3), Walk(regression, every=3)
    for walk in (whole, saved):
        two_steps(walk)
        walk.end_task()
        two_steps(walk)
    later = Walk(regression, every=3)
    later.weight.data.copy_(saved.weight)
    later.strategy.load_state_dict(saved.strategy.state_dict())
    for walk in (whole, later):
        two_steps(walk)
        walk.end_task()
    assert later.score.tolist() == whole.score.tolist()
    assert later.fisher.tolist() == whole.fisher.tolist()
    for one, other in zip(
        later.strategy._anchors.curvature, whole.strategy._anchors.curvature, strict=True
    ):
        assert torch.equal(one, other)


def test_first_task_is_followed_too(finished: Callable[..., Outcome]) -> None:
    state = finished("rwalk").state(1)["strategies"]["0"]

    largest = max(float(tensor.max()) for tensor in state["curvature"])
    # 2 (F̂ + ŝ), each up to 1
    assert 2.0 <= largest <= 4.0
    assert all(tensor.count_nonzero() > 0 for tensor in state["curvature"])
    # begun anew for the next task
    assert all(tensor.count_nonzero() == 0 for tensor in state["falls"])
    assert all(
        torch.equal(one, other)
        for one, other in zip(state["departed"], state["centre"], strict=True)
    )
