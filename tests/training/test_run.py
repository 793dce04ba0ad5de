"""What a strategy is given of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clpeft.streams.batch import NO_EXAMPLE, Part
from clpeft.streams.batching import Columns
from clpeft.training.run import Run

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


# Terms that are means over a step's targets.


def counting(targets: int, **parts: int) -> Any:
    """What `count_targets` looks at of a micro-batch."""
    named = {name: Part(slice(0, 0), number, number) for name, number in parts.items()}
    return SimpleNamespace(num_targets=targets, parts=named)


@pytest.fixture
def plain_run(finished: Finished) -> Iterator[Any]:
    """A run; what is counted for a step is as it was afterwards."""
    run = finished("finetune").run
    kept = run.targets, run.micro_batches
    yield run
    run.targets, run.micro_batches = kept


def test_terms_are_means_over_the_targets_of_a_whole_step(plain_run: Any) -> None:
    sums = {"task": (3.0, 5.0, 4.0), "replay": (7.0, 1.0, 2.5)}
    targets = {"task": (2, 1, 3), "replay": (4, 1, 5)}
    # as many micro-batches as there are sums, of unequal sizes
    plain_run.count_targets(
        [counting(own, replay=more) for own, more in zip(*targets.values(), strict=True)]
    )
    for part, values in sums.items():
        # the loop divides every term by the number of micro-batches
        found = sum(float(plain_run.per_target(torch.tensor(x), part)) / 3 for x in values)
        assert found == pytest.approx(sum(values) / sum(targets[part]))


def test_part_that_only_some_micro_batches_have(plain_run: Any) -> None:
    # half an example is owed per batch: every second one brings it
    plain_run.count_targets([counting(2), counting(2, replay=3)])
    assert plain_run.targets == {"task": 4, "replay": 3}
    assert float(plain_run.per_target(torch.tensor(6.0), "replay")) / 2 == pytest.approx(6 / 3)


def test_terms_of_two_processes_are_those_of_one(
    plain_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one of them has three targets and the sum 5, the other one and the sum 2
    monkeypatch.setattr(Run, "world_size", 2)
    monkeypatch.setattr(plain_run, "summed", lambda numbers: np.array([6.0, 3.0 + 1.0, 2.0]))
    plain_run.count_targets([counting(3, replay=3)])
    parts = [float(plain_run.per_target(torch.tensor(x), "replay")) for x in (5.0, 2.0)]

    # gradients are averaged over processes
    assert sum(parts) / 2 == pytest.approx((5.0 + 2.0) / 4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_term_without_any_targets_is_nothing(
    plain_run: Any, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(Run, "world_size", world_size)
    monkeypatch.setattr(plain_run, "summed", lambda numbers: numbers * world_size)
    plain_run.count_targets([counting(2, replay=0)])
    assert float(plain_run.per_target(torch.tensor(0.0), "replay")) == 0.0


@pytest.mark.parametrize("size", [1, 2, 5])
def test_shares_of_processes_are_the_whole(
    plain_run: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    columns = Columns(plain_run.stream.tasks[0].train)
    rows = np.array([9, 3, 4, 0, 7])[:size]
    monkeypatch.setattr(Run, "world_size", 3)
    seen: list[int] = []
    targets = 0
    for rank in range(3):
        monkeypatch.setattr(Run, "rank", rank)
        batch = plain_run.shared_batch(columns, rows)
        own = plain_run.share_of(rows)
        assert batch.rows == size
        if rank < size:
            ids = columns.numbers["example_id"][own]
            assert batch.example_ids.tolist() == ids.tolist()
            seen += own.tolist()
        else:  # it runs the model as the others do, and adds nothing
            assert (len(batch), batch.num_targets) == (1, 0)
            assert (batch.labels == -100).all()
            assert batch.example_ids.tolist() == [NO_EXAMPLE]
        targets += batch.num_targets
    assert sorted(seen) == sorted(rows.tolist())
    assert targets == plain_run.batch(columns, rows).num_targets
