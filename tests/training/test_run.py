"""What a strategy is given of a run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Finished = Callable[..., Any]


def test_gradients_of_another_batch_leave_the_runs_own_alone(finished: Finished) -> None:
    run = finished("finetune").run
    run.model.eval()
    batch = run.loader(run.stream.tasks[0].train, shuffle=False).batch(0)
    marks = [torch.full_like(p, 7.0) for p in run.trainable.values()]
    for parameter, mark in zip(run.trainable.values(), marks, strict=True):
        parameter.grad = mark.clone()
    try:
        found = run.gradients(batch)
        assert all(
            torch.equal(parameter.grad, mark)
            for parameter, mark in zip(run.trainable.values(), marks, strict=True)
        )
    finally:
        run.model.zero_grad()

    run.mean_loss(batch).backward()
    expected = [parameter.grad.clone() for parameter in run.trainable.values()]
    run.model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert any(gradient.count_nonzero() for gradient in found)


@pytest.mark.parametrize(("scale", "overflows"), [(2.0**10, False), (float("inf"), True)])
def test_scaled_gradients(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, scale: float, overflows: bool
) -> None:
    """A scale is taken out again; where it made a gradient overflow there is no direction."""
    run = finished("finetune").run
    run.model.eval()
    batch = run.loader(run.stream.tasks[0].train, shuffle=False).batch(0)
    plain = run.gradients(batch)
    scaler = SimpleNamespace(get_scale=lambda: scale)
    monkeypatch.setattr(run.accelerator, "scaler", scaler)
    found = run.gradients(batch)

    for one, other in zip(found, plain, strict=True):
        if overflows:
            assert one.count_nonzero() == 0
        else:  # a power of two is exact, where nothing falls out of the range
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
