"""A-GEM's projection, against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from clpeft.strategies.agem import AGEM, AGEMConfig, project_conflicting
from clpeft.streams.batching import Columns
from clpeft.training.run import Run


def test_conflict_is_projected_away() -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([1.0])]
    reference = [torch.tensor([-1.0]), torch.tensor([1.0])]

    cosine, projected = project_conflicting(gradients, reference)

    # g·r = −2, ‖r‖² = 2: g + r = (2, 2), which is orthogonal to r
    assert [g.tolist() for g in gradients] == [[2.0], [2.0]]
    assert float(projected) == 1.0
    # −2 / (√10 √2)
    assert float(cosine) == pytest.approx(-1 / math.sqrt(5), rel=1e-6)


def test_without_conflict_every_bit_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 3, generator=generator), torch.randn(7, generator=generator)]
    reference = [g + 0.1 * torch.randn(g.shape, generator=generator) for g in gradients]
    before = [g.clone() for g in gradients]

    cosine, projected = project_conflicting(gradients, reference)

    assert all(torch.equal(g, b) for g, b in zip(gradients, before, strict=True))
    assert float(projected) == 0.0
    assert float(cosine) > 0.9


def test_what_counts_is_the_whole_vector() -> None:
    # the first tensors conflict (−1), the second agree (+2); together g·r = 1 > 0
    gradients = [torch.tensor([1.0]), torch.tensor([2.0])]

    _, projected = project_conflicting(gradients, [torch.tensor([-1.0]), torch.tensor([1.0])])

    assert [g.tolist() for g in gradients] == [[1.0], [2.0]]
    assert float(projected) == 0.0


def test_tensors_that_agree_change_too_when_the_whole_conflicts() -> None:
    # −4 and +1: together −3, ‖r‖² = 5: g + 3/5 r
    gradients = [torch.tensor([2.0]), torch.tensor([1.0])]

    project_conflicting(gradients, [torch.tensor([-2.0]), torch.tensor([1.0])])

    assert gradients[0].item() == pytest.approx(2 - 6 / 5, rel=1e-6)
    assert gradients[1].item() == pytest.approx(1 + 3 / 5, rel=1e-6)


def test_result_is_orthogonal_to_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = [torch.randn(50, generator=generator), torch.randn(8, 8, generator=generator)]
    gradients = [-r + torch.randn(r.shape, generator=generator) for r in reference]

    project_conflicting(gradients, reference)

    dot = sum(float((g * r).sum()) for g, r in zip(gradients, reference, strict=True))
    # sums of about a hundred float32 products of size 1
    assert dot == pytest.approx(0.0, abs=1e-4)


def test_reference_of_zero_changes_nothing() -> None:
    gradients = [torch.tensor([1.0, -2.0])]

    cosine, projected = project_conflicting(gradients, [torch.zeros(2)])

    assert gradients[0].tolist() == [1.0, -2.0]
    assert (float(cosine), float(projected)) == (0.0, 0.0)


def test_half_precision_gradients_keep_their_type() -> None:
    gradients = [torch.tensor([3.0, 1.0], dtype=torch.bfloat16)]

    project_conflicting(gradients, [torch.tensor([-1.0, 1.0])])

    assert gradients[0].dtype == torch.bfloat16
    assert gradients[0].tolist() == [2.0, 2.0]


def test_step_that_would_hurt_the_memory_is_turned(
    regression: Callable[..., Run], examples: Callable[..., Dataset]
) -> None:
    # token 1 is x = 1; all logits 0, so p = 1/3 each
    run = regression([0.0, 1.0], [0.0, 0.0, 0.0])
    agem = AGEM(AGEMConfig(4, "reservoir", "total", reference_size=4))
    agem.setup(run)
    agem.after_task(run, SimpleNamespace(train=examples([[1]], labels=[1])))  # type: ignore[arg-type]
    new = run.batch(Columns(examples([[1]], labels=[0])), [0])
    (weight,) = run.trainable.values()
    run.objective.total(run.objective.forward(run.model, new), new).backward()
    expected = torch.tensor([-2 / 3, 1 / 3, 1 / 3])
    assert torch.allclose(weight.grad, expected)  # type: ignore[arg-type]

    logs = agem.transform_gradients(run)

    # r = (1/3, −2/3, 1/3); g·r = −1/3, ‖r‖² = 2/3: g + r/2
    assert torch.allclose(weight.grad, torch.tensor([-1 / 2, 0.0, 1 / 2]), atol=1e-6)  # type: ignore[arg-type]
    assert float(logs["agem_projected"]) == 1.0
    assert float(logs["agem_cosine"]) == pytest.approx(-1 / 2, rel=1e-6)
