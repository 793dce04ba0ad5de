"""What a batch says of its rows: weights, candidates, parts; and two batches as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clpeft.models.objective import CausalObjective, ClassificationObjective
from clpeft.streams.batch import Batch, Part, concatenate, set_aside

LN3 = math.log(3)


def heads(size: int, **more: Any) -> Batch:
    """Examples of a classification head, one token each; the k-th has the label k mod 2."""
    ids = torch.arange(size)
    inputs = {"input_ids": torch.full((size, 1), 5), "attention_mask": torch.ones(size, 1).long()}
    return Batch(inputs, ids % 2, torch.zeros(size, dtype=torch.int64), ids, **more)


def texts(labels: list[list[int]], **more: Any) -> Batch:
    """Examples of a language model, by their labels."""
    found = torch.tensor(labels)
    ids = torch.arange(len(labels))
    inputs = {
        "input_ids": torch.where(found == -100, torch.full_like(found, 3), found),
        "attention_mask": torch.ones_like(found),
    }
    return Batch(inputs, found, torch.zeros_like(ids), ids, **more)


def head_loss(logits: Tensor, batch: Batch) -> Tensor:
    objective = ClassificationObjective(torch.ones(1, logits.shape[1], dtype=torch.bool))
    return objective.total(SimpleNamespace(logits=logits), batch)


def test_weights_multiply_each_rows_loss_and_gradient() -> None:
    # p = (1/4, 3/4) in each row: losses ln 4 and ln 4/3
    logits = torch.tensor([[0.0, LN3], [0.0, LN3]], requires_grad=True)
    loss = head_loss(logits, heads(2, weights=torch.tensor([0.5, 3.0])))
    loss.backward()

    assert loss.item() == pytest.approx(0.5 * math.log(4) + 3 * math.log(4 / 3))
    # w (p − e_y)
    expected = [[0.5 * (1 / 4 - 1), 0.5 * 3 / 4], [3 * 1 / 4, 3 * (3 / 4 - 1)]]
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([x for row in expected for x in row])


def test_weight_of_a_text_multiplies_all_its_tokens() -> None:
    # position t foretells token t + 1: two targets in the first row, one in the second
    logits = torch.tensor([[[0.0, LN3], [LN3, 0.0], [7.0, 1.0]]] * 2, requires_grad=True)
    batch = texts([[-100, 1, 1], [-100, -100, 0]], weights=torch.tensor([2.0, 0.25]))
    loss = CausalObjective().total(SimpleNamespace(logits=logits), batch)
    loss.backward()

    assert loss.item() == pytest.approx(
        2 * (math.log(4 / 3) + math.log(4)) + 0.25 * math.log(4 / 3)
    )
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx([2 * 1 / 4, 2 * -1 / 4])
    assert logits.grad[1, 1].tolist() == pytest.approx([0.25 * -1 / 4, 0.25 * 1 / 4])
    assert logits.grad[1, 0].count_nonzero() == 0  # no target there
    assert batch.num_targets == 3  # however much each counts


def test_weights_of_one_change_nothing() -> None:
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    plain = head_loss(logits, heads(4))
    assert float(head_loss(logits, heads(4, weights=torch.ones(4)))) == pytest.approx(float(plain))


def test_candidates_compete_alone() -> None:
    candidates = torch.tensor([[True, True, False], [True, True, True]])
    logits = torch.tensor([[0.0, LN3, 9.0], [0.0, LN3, LN3]], requires_grad=True)
    loss = head_loss(logits, heads(2, candidates=candidates))
    loss.backward()

    # 1/4 of two, then 3/7 of three
    assert loss.item() == pytest.approx(math.log(4) + math.log(7 / 3))
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-3 / 4, 3 / 4, 0.0])
    assert logits.grad[1].tolist() == pytest.approx([1 / 7, 3 / 7 - 1, 3 / 7])


def test_candidates_are_of_the_labels_that_the_scenario_allows() -> None:
    allowed = torch.tensor([[True, True, False]])
    candidates = torch.tensor([[True, True, True], [False, True, True]])
    objective = ClassificationObjective(allowed)
    logits, _ = objective.predicted(
        SimpleNamespace(logits=torch.zeros(2, 3)), heads(2, candidates=candidates)
    )
    assert logits.isfinite().tolist() == [[True, True, False], [False, True, False]]


def test_rows_of_a_part_are_not_the_task_losses() -> None:
    parts = {"aside": Part(slice(1, 3), 2, 2)}
    logits = torch.tensor([[0.0, LN3]] * 4, requires_grad=True)
    for weights, factors in ((None, (1.0, 1.0)), (torch.tensor([2.0, 9.0, 9.0, 3.0]), (2.0, 3.0))):
        batch = heads(4, parts=parts, weights=weights)
        loss = head_loss(logits, batch)
        (gradient,) = torch.autograd.grad(loss, logits)
        # rows 0 and 3 are left, with the labels 0 and 1
        assert loss.item() == pytest.approx(factors[0] * math.log(4) + factors[1] * math.log(4 / 3))
        assert gradient[1:3].count_nonzero() == 0
        assert gradient[0, 0].item() == pytest.approx(factors[0] * -3 / 4)
        assert gradient[3, 0].item() == pytest.approx(factors[1] * 1 / 4)
        assert batch.num_targets == 2


def test_batch_of_nothing_but_a_part_has_no_task_loss() -> None:
    aside = set_aside(heads(3), "aside")
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = head_loss(logits, aside)
    loss.backward()

    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.count_nonzero() == 0
    assert aside.num_targets == 0


def test_set_aside_takes_all_rows_with_their_targets() -> None:
    given = texts([[-100, 4, 5], [-100, -100, 6]]).counted(3, 2, 9)  # a share of nine rows
    aside = set_aside(given, "replay")

    assert aside.parts == {"replay": Part(slice(0, 2), 3, 2)}
    assert (aside.num_targets, aside.target_width, aside.rows) == (0, 2, 9)
    assert given.parts == {}  # as it was
    assert given.num_targets == 3


def test_altered_batch_knows_what_was_counted() -> None:
    given = texts([[-100, 4, 5], [-100, -100, 6]]).counted(3, 2, 9).to("meta")
    found = given.altered(weights=torch.tensor([0.5, 2.0]))

    assert found.weights is not None
    assert found.weights.tolist() == [0.5, 2.0]
    assert (found.num_targets, found.target_width, found.rows) == (3, 2, 9)
    assert given.weights is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_parts_keep_to_their_rows_when_batches_join(order: tuple[int, ...]) -> None:
    batches = [
        texts([[-100, 7]]),
        set_aside(texts([[-100, 4, 5], [-100, -100, 6]]), "one"),
        set_aside(texts([[-100, 8]] * 3), "two"),
    ]
    for number, batch in enumerate(batches):
        batch.task_ids.fill_(number)
    both = concatenate([batches[k] for k in order], pad_token_id=0)

    assert set(both.parts) == {"one", "two"}
    for name, number, targets in (("one", 1, 3), ("two", 2, 3)):
        part = both.parts[name]
        assert set(both.task_ids[part.rows].tolist()) == {number}
        assert len(both.task_ids[part.rows]) == len(batches[number])
        assert part.num_targets == targets
    assert both.task_ids[both.own_rows].tolist() == [0]
    assert both.num_targets == 1
    assert both.rows == 6
    # once more with another: what is a part already stays one
    again = concatenate([texts([[-100, 9]]), both], pad_token_id=0)
    assert [set(again.task_ids[again.parts[name].rows].tolist()) for name in ("one", "two")] == [
        {1},
        {2},
    ]
    assert again.num_targets == 2


def test_part_named_twice_is_a_mistake() -> None:
    aside = set_aside(heads(2), "replay")
    with pytest.raises(AssertionError, match="two parts 'replay' in one batch"):
        concatenate([aside, aside], 0)


def test_rows_without_weights_or_candidates_have_all() -> None:
    weighted = heads(1, weights=torch.tensor([0.5]))
    choosing = heads(2, candidates=torch.tensor([[True, False], [False, True]]))
    both = concatenate([heads(1), weighted, choosing], 0)

    assert both.weights is not None
    assert both.candidates is not None
    assert both.weights.tolist() == [1.0, 0.5, 1.0, 1.0]
    assert both.weights.dtype == torch.float32
    assert both.candidates.tolist() == [[True, True]] * 2 + [[True, False], [False, True]]
    plain = concatenate([heads(1), heads(2)], 0)
    assert (plain.weights, plain.candidates, plain.parts) == (None, None, {})


def fields(batch: Batch) -> Mapping[str, Tensor]:
    assert batch.weights is not None
    assert batch.candidates is not None
    return {
        **batch.inputs,
        "labels": batch.labels,
        "task_ids": batch.task_ids,
        "example_ids": batch.example_ids,
        "weights": batch.weights,
        "candidates": batch.candidates,
    }


def test_everything_moves_and_what_was_counted_stays_counted() -> None:
    given = concatenate(
        [
            texts([[-100, -100, 7]], weights=torch.tensor([0.5])),
            set_aside(texts([[-100, 4, 5]], candidates=torch.ones(1, 2, dtype=torch.bool)), "one"),
        ],
        pad_token_id=0,
    )
    # where tensors have no values nothing could be counted any more
    moved = given.to("meta")

    assert {tensor.device.type for tensor in fields(moved).values()} == {"meta"}
    assert fields(moved).keys() == fields(given).keys()
    assert moved.parts == given.parts == {"one": Part(slice(1, 2), 2, 1)}
    assert (moved.num_targets, moved.target_width, moved.rows) == (1, 2, 2)


def test_targets_that_are_counted_are_those_of_the_task_loss() -> None:
    labels = [[-100, 4, 5, 6], [-100, -100, 7, -100], [-100, 8, 9, -100]]
    parts = {"one": Part(slice(0, 1), 3, 1), "two": Part(slice(2, 3), 2, 1)}
    assert texts(labels).num_targets == 6
    assert texts(labels, parts=parts).num_targets == 1
    assert texts(labels, parts=parts).own_rows.tolist() == [1]  # type: ignore[union-attr]
