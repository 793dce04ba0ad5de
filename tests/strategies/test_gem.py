"""GEM's projection, against solutions worked out by hand and by trying every active set."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clpeft.strategies.agem import project_conflicting
from clpeft.strategies.gem import GEM, GEMConfig, multipliers, project_to_cone
from tests.running import run_it

Examples = Callable[..., Any]


def solved(references: Tensor, gradient: Tensor, *, margin: float, eps: float) -> list[float]:
    g, rows = gradient.double(), references.double()
    return multipliers(rows @ rows.T, rows @ g, margin=margin, eps=eps).tolist()


@pytest.mark.parametrize(
    ("margin", "eps", "expected"),
    [
        (0.0, 1e-12, 2.0),  # ½v² − 2v
        (0.0, 1.0, 1.0),  # ½·2·v² − 2v
        (0.5, 1e-12, 2.0),  # a bound, not an addition: it is kept without
        (3.0, 1e-12, 3.0),  # at the bound
    ],
)
def test_one_constraint(margin: float, eps: float, expected: float) -> None:
    found = solved(torch.tensor([[0.0, 1.0]]), torch.tensor([1.0, -2.0]), margin=margin, eps=eps)
    assert found == pytest.approx([expected], rel=1e-9)


TWO = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("gradient", "v", "turned"),
    [
        # K = [[1, 1], [1, 2]], q = (−2, −3): v = K⁻¹(2, 3), both at work
        ([-2.0, -1.0, 5.0], [1.0, 1.0], [0.0, 0.0, 5.0]),
        # q = (−1, −4): K⁻¹(1, 4) = (−2, 3) is not allowed. The second alone, 4/2, suffices for
        # both; one projection after the other would end in (3/2, −3/2, 5)
        ([-1.0, -3.0, 5.0], [0.0, 2.0], [1.0, -1.0, 5.0]),
        # only the second objects, q = (1, −2); after it the first still does not
        ([1.0, -3.0, 5.0], [0.0, 1.0], [2.0, -2.0, 5.0]),
    ],
)
def test_two_constraints(gradient: list[float], v: list[float], turned: list[float]) -> None:
    found = solved(TWO, torch.tensor(gradient), margin=0.0, eps=1e-12)
    assert found == pytest.approx(v, abs=1e-9)

    gradients = [torch.tensor(gradient[:1]), torch.tensor(gradient[1:]).view(2, 1)]
    logs = project_to_cone(gradients, TWO, margin=0.0, eps=1e-9)

    # float32 sums of three products
    assert torch.cat([g.flatten() for g in gradients]).tolist() == pytest.approx(turned, abs=1e-5)
    assert gradients[1].shape == (2, 1)
    against = (TWO @ torch.tensor(gradient)).tolist()
    assert logs["gem_violated"] == sum(dot < 0 for dot in against) / 2
    size = torch.tensor(gradient).norm()
    lengths = (TWO.norm(dim=1) * size).tolist()
    cosines = [dot / length for dot, length in zip(against, lengths, strict=True)]
    assert logs["gem_cosine"] == pytest.approx(min(cosines), rel=1e-6)
    change = (torch.tensor(turned) - torch.tensor(gradient)).norm() / size
    assert logs["gem_change"] == pytest.approx(float(change), rel=1e-5)


def test_margin_adds_of_every_task_once_one_objects() -> None:
    gradients = [torch.tensor([1.0, -3.0, 5.0])]
    # min ½vᵀKv + qᵀv with v ≥ ½: the first at its bound, then 2·v₂ = 2 − ½
    assert solved(TWO, gradients[0], margin=0.5, eps=1e-12) == pytest.approx([0.5, 0.75])

    project_to_cone(gradients, TWO, margin=0.5, eps=1e-9)

    assert gradients[0].tolist() == pytest.approx([2.25, -2.25, 5.0], abs=1e-6)


def enumerated(curvature: np.ndarray, slope: np.ndarray, margin: float) -> np.ndarray:
    """The best of the minimisers over every choice of multipliers that lie at their bound."""
    size = len(slope)
    best, least = np.full(size, margin), np.inf
    for count in range(size + 1):
        for free in combinations(range(size), count):
            v = np.full(size, margin)
            chosen = list(free)
            held = [i for i in range(size) if i not in free]
            pull = -slope[chosen] - curvature[np.ix_(chosen, held)].sum(axis=1) * margin
            v[chosen] = np.linalg.solve(curvature[np.ix_(chosen, chosen)], pull)
            value = 0.5 * v @ curvature @ v + slope @ v
            if (v >= margin - 1e-12).all() and value < least:
                best, least = v, value
    return best


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_random_problems_meet_the_conditions_of_an_optimum(size: int, margin: float) -> None:
    generator = torch.Generator().manual_seed(size)
    active = 0
    for _ in range(50):
        # tasks that resemble each other, and a gradient against most of them
        shared = torch.randn(8, generator=generator, dtype=torch.float64)
        rows = 0.7 * shared + torch.randn(size, 8, generator=generator, dtype=torch.float64)
        g = -0.5 * shared + torch.randn(8, generator=generator, dtype=torch.float64)
        products, against, eps = rows @ rows.T, rows @ g, 1e-3
        v = multipliers(products, against, margin=margin, eps=eps)

        curvature = products + eps * torch.eye(size, dtype=torch.float64)
        slack = curvature @ v + against  # g̃·g_k + ε v_k
        assert (v >= margin).all()
        assert (slack >= -1e-9).all()
        assert ((v - margin) * slack).abs().max() < 1e-9
        assert (rows @ (g + rows.T @ v) >= -eps * v - 1e-9).all()
        expected = enumerated(curvature.numpy(), against.numpy(), margin)
        np.testing.assert_allclose(v.numpy(), expected, rtol=1e-7, atol=1e-9)
        active += int((v > margin + 1e-9).sum())
    assert 50 * size > active > 0  # some multipliers at work, some at their bound


def test_references_that_are_the_same_count_once() -> None:
    # K = [[2, 2], [2, 2]] has no inverse, and its rounding may have a negative eigenvalue
    same = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    gradients = [torch.tensor([-3.0, 1.0])]

    project_to_cone(gradients, same, margin=0.0, eps=1e-9)

    assert gradients[0].tolist() == pytest.approx([-2.0, 2.0], abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_one_task_without_margin_is_agem(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (7,), (2, 2, 2)]
    reference = [torch.randn(shape, generator=generator) for shape in shapes]
    one = [
        torch.randn(r.shape, generator=generator) - (0.5 if seed else 1.5) * r for r in reference
    ]
    other = [g.clone() for g in one]

    project_conflicting(one, reference)
    row = torch.cat([r.flatten() for r in reference])[None]
    logs = project_to_cone(other, row, margin=0.0, eps=1e-9)

    assert logs["gem_violated"] == 1.0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_conflict_every_bit_stays_whatever_the_margin() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 3, generator=generator), torch.randn(7, generator=generator)]
    flat = torch.cat([g.flatten() for g in gradients])
    references = flat + 0.1 * torch.randn(3, 19, generator=generator)
    before = [g.clone() for g in gradients]

    logs = project_to_cone(gradients, references, margin=0.5, eps=1e-3)

    assert all(torch.equal(g, b) for g, b in zip(gradients, before, strict=True))
    assert (logs["gem_violated"], logs["gem_change"]) == (0.0, 0.0)
    assert logs["gem_cosine"] > 0.9


def test_what_counts_is_the_whole_vector() -> None:
    # the first tensors conflict (−1), the second agree (+2); together g·r = 1 > 0
    gradients = [torch.tensor([1.0]), torch.tensor([2.0])]

    project_to_cone(gradients, torch.tensor([[-1.0, 1.0]]), margin=0.5, eps=1e-3)

    assert [g.tolist() for g in gradients] == [[1.0], [2.0]]


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_size_of_the_gradients_does_not_matter(scale: float) -> None:
    results = []
    for factor in (1.0, scale):
        gradients = [factor * torch.tensor([-2.0, -1.0, 5.0])]
        project_to_cone(gradients, factor * TWO, margin=0.0, eps=1e-3)
        results.append(gradients[0] / factor)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    assert results[0][:2].abs().max() < 0.01  # turned indeed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_overflowed_is_left_to_others(bad: float) -> None:
    gradients = [torch.tensor([-1.0, bad])]
    before = gradients[0].clone()

    logs = project_to_cone(gradients, torch.tensor([[1.0, 0.0]]), margin=0.0, eps=1e-3)

    assert logs == {}
    assert torch.equal(gradients[0].isnan(), before.isnan())
    assert gradients[0][0] == -1.0


def test_reference_of_zero_objects_to_nothing() -> None:
    # as `run.gradients` gives it where one overflowed in fp16
    gradients = [torch.tensor([1.0, -2.0])]
    references = torch.tensor([[0.0, 0.0], [0.0, 1.0]])

    logs = project_to_cone(gradients, references, margin=0.0, eps=1e-9)

    assert gradients[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert logs["gem_violated"] == 0.5
    zeros = [torch.tensor([1.0, -2.0])]
    assert project_to_cone(zeros, torch.zeros(2, 2), margin=0.5, eps=1e-9)["gem_violated"] == 0.0
    assert zeros[0].tolist() == [1.0, -2.0]


def test_half_precision_gradients_keep_their_type() -> None:
    gradients = [torch.tensor([3.0, 1.0], dtype=torch.bfloat16)]

    project_to_cone(gradients, torch.tensor([[-1.0, 1.0]]), margin=0.0, eps=1e-6)

    assert gradients[0].dtype == torch.bfloat16
    assert gradients[0].tolist() == [2.0, 2.0]


# The strategy.


def settings(**changes: Any) -> GEMConfig:
    given: dict[str, Any] = {
        "memory_size": 20,
        "selection": "task_balanced",
        "budget": "total",
        "reference_size": 4,
        "margin": 0.0,
        "eps": 1e-9,
    }
    return GEMConfig(**(given | changes))


def remember(run: Any, gem: GEM, data: Any) -> None:
    gem.after_task(run, SimpleNamespace(train=data))  # type: ignore[arg-type]


def test_step_is_turned_by_gradients_of_the_model_as_it_is(
    regression: Examples, examples: Examples
) -> None:
    # token 1 is x = 1; remembered while the logits were far from 0
    run = regression([0.0, 1.0], [5.0, -3.0, 1.0])
    run.objective.allowed = torch.ones(3, 3, dtype=torch.bool)
    gem = GEM(settings())
    gem.setup(run)
    remember(run, gem, examples([[1]], labels=[0], task=0))
    remember(run, gem, examples([[1]], labels=[1], task=1))
    (weight,) = run.trainable.values()
    with torch.no_grad():
        weight.zero_()
    weight.grad = torch.tensor([2.0, 1.0, -1.0])

    logs = gem.transform_gradients(run)

    # p = 1/3 each, so the tasks' gradients are a = (−2, 1, 1)/3 and b = (1, −2, 1)/3, and
    # g·a = −4/3, g·b = −1/3. K = [[2, −1], [−1, 2]]/3, K⁻¹ = [[2, 1], [1, 2]]:
    # v = K⁻¹ (4, 1)/3 = (3, 2), and g + 3a + 2b = (2/3, 2/3, 2/3)
    assert torch.allclose(weight.grad, torch.full((3,), 2 / 3), atol=1e-5)
    assert logs["gem_violated"] == 1.0


def test_every_earlier_task_has_a_gradient_of_its_own_drawn_afresh(
    regression: Examples, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = regression([0.0, 1.0], [0.0, 0.0, 0.0])
    run.objective.allowed = torch.ones(4, 3, dtype=torch.bool)
    gem = GEM(settings(memory_size=24, reference_size=3))
    gem.setup(run)
    seen: list[tuple[list[int], list[int]]] = []
    original = run.gradients

    def gradients(batch: Any) -> Any:
        seen.append((batch.task_ids.tolist(), sorted(batch.example_ids.tolist())))
        return original(batch)

    monkeypatch.setattr(run, "gradients", gradients)
    assert gem.transform_gradients(run) == {}  # nothing to remember yet
    for task in (0, 2, 3):  # none of task 1: not a constraint
        remember(run, gem, examples([[1]] * 8, labels=[0] * 8, task=task))
    for _ in range(4):
        gem.transform_gradients(run)

    assert [tasks for tasks, _ in seen] == [[0] * 3, [2] * 3, [3] * 3] * 4
    assert all(len(set(ids)) == 3 for _, ids in seen)
    for task in range(3):  # not the same examples at every step
        assert len({tuple(ids) for _, ids in seen[task::3]}) > 1


def test_it_goes_on_with_the_draws_that_it_stopped_at(
    regression: Examples, examples: Examples
) -> None:
    run = regression([0.0, 1.0, 2.0], [0.3, -0.2])
    run.objective.allowed = torch.ones(2, 2, dtype=torch.bool)
    gem, other = GEM(settings()), GEM(settings())
    for each in (gem, other):
        each.setup(run)
    remember(run, gem, examples([[1], [2]] * 6, labels=[0, 1, 1] * 4))
    gem.transform_gradients(run)
    other.load_state_dict(gem.state_dict())

    one, two = (each._memory.sample(4).tolist() for each in (gem, other))
    assert one == two


def test_beside_olora_whose_adapters_come_and_go(tiny: Examples, tmp_path: Path) -> None:
    outcome = run_it(tiny("olora+gem"), tmp_path)

    found = [step for task in (1, 2) for step in outcome.steps(task)]
    for step in found:
        # what is turned is the gradient of the newest adapter
        assert (step["train/gradient/gem_violated"] > 0) == (step["train/gradient/gem_change"] > 0)
        assert (step["train/gradient/gem_cosine"] < 0) == (step["train/gradient/gem_violated"] > 0)
    assert {step["train/gradient/gem_violated"] for step in found} >= {0.0, 1.0}
