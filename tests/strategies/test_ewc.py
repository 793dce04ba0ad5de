"""EWC's penalty and gradient, against sums over separate anchors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clpeft.strategies.anchors import Anchors, quadratic_gradient, quadratic_penalty
from clpeft.strategies.ewc import EWC, EWCConfig
from clpeft.training.state import read_state, write_state


def folded(anchors: list[tuple[list[Tensor], list[Tensor]]]) -> Anchors:
    """Weights and importances of several tasks, folded."""
    together = Anchors.none(anchors[0][0])
    for weights, fisher in anchors:
        together.add(weights, fisher)
    return together


def test_by_hand() -> None:
    # θ = 3; anchors 1, 2, 0 with importance 2, 1, 4
    anchors = folded(
        [
            ([torch.tensor([at])], [torch.tensor([f])])
            for at, f in ((1.0, 2.0), (2.0, 1.0), (0.0, 4.0))
        ]
    )
    theta = [torch.tensor([3.0])]

    # ½ · ½ · (2·2² + 1·1² + 4·3²) = 45/4
    assert quadratic_penalty(theta, anchors, 0.5).item() == 11.25
    # ½ · (2·2 + 1·1 + 4·3)
    assert quadratic_gradient(theta, anchors, 0.5)[0].tolist() == [8.5]


def test_folded_anchors_are_the_sum_of_separate_ones() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float = 1.0) -> list[Tensor]:
        return [torch.randn(*shape, generator=generator) * scale for shape in ((4, 3), (5,))]

    tasks = [(draw(), [f.square() for f in draw()]) for _ in range(3)]
    theta = draw()
    anchors = folded(tasks)
    # the definition, in double precision, with autograd for the gradient
    exact = [t.double().requires_grad_() for t in theta]
    penalty = sum(
        0.5 * 7.0 * (f.double() * (t - a.double()) ** 2).sum()
        for weights, fisher in tasks
        for t, a, f in zip(exact, weights, fisher, strict=True)
    )
    penalty.backward()  # type: ignore[union-attr]

    # float32 tensors, summed in double: 2⁻²⁴ per term
    torch.testing.assert_close(
        quadratic_penalty(theta, anchors, 7.0), penalty.detach(), rtol=1e-6, atol=0
    )
    for found, t in zip(quadratic_gradient(theta, anchors, 7.0), exact, strict=True):
        torch.testing.assert_close(found.double(), t.grad, rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_the_penalty() -> None:
    generator = torch.Generator().manual_seed(1)
    anchors = folded(
        [
            ([torch.randn(3, generator=generator)], [torch.rand(3, generator=generator)])
            for _ in range(3)
        ]
    )
    theta = torch.randn(3, generator=generator)
    (gradient,) = quadratic_gradient([theta], anchors, 2.0)

    for i in range(3):
        # central differences of a quadratic are exact but for rounding; h is large on purpose
        step = torch.zeros(3)
        step[i] = 0.5
        up, down = (quadratic_penalty([theta + sign * step], anchors, 2.0) for sign in (1, -1))
        assert float(up - down) == pytest.approx(float(gradient[i]), rel=1e-4)


def test_nothing_cancels_far_from_the_origin() -> None:
    # anchors and weights near 1000, a hundredth apart: Aθ² − 2bθ + c uncentred would be differences
    # of numbers around 10⁶, where float32 has steps of 0.06
    anchors = folded(
        [([torch.tensor([at])], [torch.tensor([1.0])]) for at in (1000.0, 1000.25, 1000.5)]
    )
    theta = [torch.tensor([1000.75])]

    assert quadratic_penalty(theta, anchors, 2.0).item() == 0.75**2 + 0.5**2 + 0.25**2
    assert quadratic_gradient(theta, anchors, 2.0)[0].item() == 2 * (0.75 + 0.5 + 0.25)


def test_zero_at_a_single_anchor() -> None:
    weights = [torch.tensor([0.3, -1.7])]
    anchors = folded([(weights, [torch.tensor([2.0, 5.0])])])

    assert quadratic_penalty(weights, anchors, 3.0).item() == 0.0
    assert quadratic_gradient(weights, anchors, 3.0)[0].tolist() == [0.0, 0.0]


@pytest.fixture
def trained(regression: Callable[..., Any], examples: Callable[..., Any]) -> Callable[..., Any]:
    """EWC after one task on softmax regression, with the run and the task."""

    def make(**settings: Any) -> tuple[EWC, Any, Any]:
        run = regression((0.0, 1.0, 2.0), (0.0, 1.0986122886681098))
        values = {"lambda_": 2.0, "fisher": "exact", "fisher_examples": 8, "normalize": "none"}
        strategy = EWC(EWCConfig(**(values | settings)))
        strategy.setup(run)
        task = SimpleNamespace(train=examples([[1], [2]]))
        strategy.after_task(run, task)  # type: ignore[arg-type]
        return strategy, run, task

    return make


def test_gradient_is_added_to_what_is_there(trained: Callable[..., Any]) -> None:
    strategy, run, _ = trained()
    with torch.no_grad():
        run.model.weight += torch.tensor([0.5, -1.0])
    run.model.weight.grad = torch.tensor([10.0, 20.0])
    run.logging = True

    logged = strategy.transform_gradients(run)

    f = (0.1875 + 0.36) / 2  # as in test_fisher.test_exact
    expected = torch.tensor([10.0 + 2 * f * 0.5, 20.0 - 2 * f * 1.0])
    torch.testing.assert_close(run.model.weight.grad, expected, rtol=1e-6, atol=0)
    # ½ · 2 · f · (½² + 1²)
    assert float(logged["loss/ewc"]) == pytest.approx(f * 1.25, rel=1e-6)


def test_first_task_is_left_alone(regression: Callable[..., Any]) -> None:
    run = regression((0.0, 1.0), (0.0, 0.0))
    strategy = EWC(EWCConfig(lambda_=2.0, fisher="exact", fisher_examples=8, normalize="none"))
    strategy.setup(run)
    run.model.weight.grad = torch.tensor([1.0, 2.0])
    run.logging = True

    assert strategy.transform_gradients(run) == {}
    assert run.model.weight.grad.tolist() == [1.0, 2.0]


def test_normalised_importance_has_mean_one(trained: Callable[..., Any]) -> None:
    strategy, run, task = trained(normalize="mean")
    (curvature,) = strategy.state_dict()["curvature"]
    # both labels matter alike here, so each is the mean
    torch.testing.assert_close(curvature, torch.ones(2), rtol=1e-6, atol=0)

    strategy.after_task(run, task)
    (curvature,) = strategy.state_dict()["curvature"]
    torch.testing.assert_close(curvature, torch.full((2,), 2.0), rtol=1e-6, atol=0)


def test_state_goes_through_the_disk(trained: Callable[..., Any], tmp_path: Any) -> None:
    strategy, run, task = trained(fisher="sampled")
    write_state(tmp_path / "state", strategy.state_dict())
    other = EWC(strategy.config)
    other.setup(run)
    other.load_state_dict(read_state(tmp_path / "state"))
    with torch.no_grad():
        run.model.weight += 0.1
    for each in (strategy, other):
        each.after_task(run, task)  # draws labels, too

    one, two = strategy.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert one["tasks"] == two["tasks"] == 2
    for name in ("centre", "curvature", "pull"):
        assert torch.equal(one[name][0], two[name][0])
    assert torch.equal(one["constant"], two["constant"])
    assert torch.equal(one["generator"], two["generator"])
