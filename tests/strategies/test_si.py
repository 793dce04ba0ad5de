"""SI's path integral, against the fall of a loss that is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from clpeft.strategies.si import SI, consolidated, path_integral
from tests.running import Outcome, run_it

CURVATURE = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
START = torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64)


def descended(rate: float, time: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient descent on ½ Σ a θ²: the integral ω, and where it ends."""
    theta, integral = START.clone(), torch.zeros(3, dtype=torch.float64)
    for _ in range(round(time / rate)):
        gradient = CURVATURE * theta
        move = -rate * gradient
        path_integral([integral], [gradient], [move])
        theta = theta + move
    return integral, theta


def test_integral_adds_up_to_the_fall_of_the_loss_as_steps_shrink() -> None:
    errors = []
    for rate in (0.02, 0.01, 0.005):
        integral, end = descended(rate)
        # each coordinate's own part of the loss
        fall = 0.5 * CURVATURE * (START**2 - end**2)
        errors.append((integral - fall).abs())
        assert (integral > 0).all()
    for coarse, fine in pairwise(errors):
        # −g·Δθ is the fall to first order: half the step, half the error
        assert ((fine / coarse - 0.5).abs() < 0.02).all()
    assert (errors[-1] < 0.02 * 0.5 * CURVATURE * START**2).all()


def test_consolidated_by_hand() -> None:
    found = consolidated([torch.tensor([2.0, -1.0, 3.0])], [torch.tensor([1.0, 2.0, 0.0])], xi=0.5)
    # 2 / (1 + ½); nothing for a weight whose move raised the loss; 3 / (0 + ½)
    assert found[0].tolist() == pytest.approx([4 / 3, 0.0, 6.0])


def test_order_of_strategies_does_not_reach_the_integral(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """SI sees the task's own gradient, also after another strategy that adds to it."""
    states = []
    for names in ("si+l2", "l2+si"):
        outcome = run_it(tiny(names, "stream.num_tasks=2"), tmp_path / names)
        strategies = outcome.state(2)["strategies"]
        states.append(strategies[str(names.split("+").index("si"))])
    for one, other in zip(states[0]["curvature"], states[1]["curvature"], strict=True):
        # both pulls are added, in another order: only rounding may differ
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_gradient_of_the_integral_is_neither_clipped_nor_pulled(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = SI.task_gradients

    def spying(self: SI, run: Any) -> None:
        original(self, run)
        if self._tasks:
            own = run.gradients(self._batch)
            seen.append(
                (
                    torch.cat([g.flatten() for g in self._gradients]),
                    torch.cat([g.flatten() for g in own]),
                )
            )

    def keep(self: SI, run: Any, batch: Any) -> Any:
        self._batch = batch  # type: ignore[attr-defined]
        return batch

    monkeypatch.setattr(SI, "task_gradients", spying)
    monkeypatch.setattr(SI, "transform_batch", keep)
    run_it(
        tiny("l2+si", "stream.num_tasks=2", "training.max_grad_norm=0.01", "peft.dropout=0"),
        tmp_path,
    )
    assert len(seen) == 8
    for integrated, own in seen:
        torch.testing.assert_close(integrated, own, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["si", "rwalk"])
def test_between_steps_no_more_is_held_than_is_saved(
    finished: Callable[..., Outcome], name: str
) -> None:
    """Gradients and weights of a step are not kept on for evaluation and the next task."""
    outcome = finished(name)
    (strategy,) = outcome.run.strategies
    held = [*vars(strategy).values(), *vars(strategy._anchors).values()]  # type: ignore[attr-defined]
    tensors = [tensor for value in held if isinstance(value, list) for tensor in value]
    saved = [v for v in outcome.state(3)["strategies"]["0"].values() if isinstance(v, list)]
    assert sum(t.nbytes for t in tensors) <= sum(t.nbytes for value in saved for t in value)


def test_first_task_is_followed_too(finished: Callable[..., Outcome]) -> None:
    state = finished("si").state(1)["strategies"]["0"]

    assert all(tensor.count_nonzero() > 0 for tensor in state["curvature"])
    # begun anew for the next task
    assert all(tensor.count_nonzero() == 0 for tensor in state["integral"])
