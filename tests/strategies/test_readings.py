"""One pass over a data set: each example's reading, in the data set's order, in all processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from clpeft.strategies import readings
from tests.stepping import as_processes

Runs = Callable[..., Any]
Examples = Callable[..., Any]

# of unequal lengths, so that they are read in another order than they stand in
LENGTHS = [2, 7, 3, 3, 9, 2, 4, 8, 5, 6, 2, 3, 7, 4, 9, 2, 5, 5, 6, 3, 8]


def some(examples: Examples) -> Any:
    rows = [[1 + (i * j) % 9 for j in range(1, 1 + n)] for i, n in enumerate(LENGTHS, 1)]
    return examples(rows, prompt_length=1)


def talking(bigrams: Runs) -> Any:
    run = bigrams(10)
    generator = torch.Generator().manual_seed(0)
    run.model.table.data = torch.randn(10, 10, generator=generator)
    return run


def test_losses_one_by_one(bigrams: Runs, examples: Examples) -> None:
    run, dataset = talking(bigrams), some(examples)
    scores = torch.log_softmax(run.model.table.detach(), dim=1)
    expected = [
        -sum(float(scores[one, other]) for one, other in pairwise(row))
        for row in dataset["input_ids"]
    ]
    # float32 sums of up to eight tokens
    assert readings.losses(run, dataset).tolist() == pytest.approx(expected, rel=1e-5)


def test_uncertainty_is_the_mean_over_the_answers_tokens(bigrams: Runs, examples: Examples) -> None:
    run = bigrams(3)
    run.model.table.data = torch.tensor(
        [[0.0, 0.0, 0.0], [0.0, math.log(3), -1e30], [0.0, 50.0, 0.0]]
    )
    # the prompt's token foretells the first of the answer's; the last foretells nothing
    found = readings.uncertainty(run, examples([[1, 2, 0], [0, 1], [2, 2, 0, 2]], prompt_length=1))

    quarters = math.log(4) / 4 + math.log(4 / 3) * 3 / 4
    expected = [(quarters + 0) / 2, math.log(3), (0 + 0 + math.log(3)) / 3]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_uncertainty_of_a_head(regression: Runs, examples: Examples) -> None:
    # logits (0, ln 3 · x): x = 0 is a coin, x = 1 is 1/4 to 3/4
    run = regression((0.0, 1.0), (0.0, math.log(3)))
    quarters = math.log(4) / 4 + math.log(4 / 3) * 3 / 4
    found = readings.uncertainty(run, examples([[0], [1]], labels=[1, 1]))
    assert found.tolist() == pytest.approx([math.log(2), quarters])


def test_readings_are_without_dropout_and_gradients(regression: Runs, examples: Examples) -> None:
    run = regression((0.0, 1.0), (0.0, 2.0), dropout=0.5)
    run.model.train()
    found = readings.losses(run, examples([[1]] * 30, labels=[0] * 30))

    assert found.tolist() == pytest.approx([math.log(1 + math.exp(2))] * 30)
    assert not found.requires_grad
    assert run.model.training  # as it was


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("reading", ["losses", "uncertainty"])
def test_several_processes_get_everything_in_order(
    bigrams: Runs, examples: Examples, processes: int, reading: str
) -> None:
    dataset = some(examples)  # three batches
    read = getattr(readings, reading)
    alone = read(talking(bigrams), dataset)
    together = as_processes(
        [talking(bigrams) for _ in range(processes)], lambda run: read(run, dataset)
    )
    for found in together:  # the same batches, whoever reads them: the same bits
        assert torch.equal(found, alone)


def test_processes_share_the_work(bigrams: Runs, examples: Examples) -> None:
    dataset = some(examples)

    def work(run: Any) -> list[int]:
        seen: list[int] = []

        def note(batch: Any) -> torch.Tensor:
            seen.extend(batch.example_ids.tolist())
            return batch.example_ids

        found = readings.read(run, dataset, note)
        assert [int(i) for i in found] == list(range(len(LENGTHS)))
        return seen

    seen = as_processes([bigrams(10) for _ in range(2)], work)
    assert sorted(seen[0] + seen[1]) == list(range(len(LENGTHS)))
    assert min(len(part) for part in seen) >= 5


def test_rows_may_be_as_wide_as_their_batch(bigrams: Runs, examples: Examples) -> None:
    dataset = some(examples)
    found = readings.read(bigrams(10), dataset, lambda batch: batch.inputs["input_ids"])

    widths = {len(row) for row in found}
    assert len(widths) > 1
    for row, ids in zip(found, dataset["input_ids"], strict=True):
        assert row[: len(ids)].tolist() == ids
        assert row.untyped_storage().nbytes() <= 8 * 8 * 9  # no more than its batch is kept alive


def test_view_of_something_large_is_not_kept(bigrams: Runs, examples: Examples) -> None:
    def first_of_many(batch: Any) -> torch.Tensor:
        return torch.zeros(len(batch), 10_000)[:, :1]

    found = readings.read(bigrams(10), some(examples), first_of_many)
    assert found[0].untyped_storage().nbytes() <= 8 * 4


def test_nothing_to_be_read(bigrams: Runs, examples: Examples) -> None:
    nothing = some(examples).select(range(0))
    assert len(readings.losses(bigrams(10), nothing)) == 0
    assert len(readings.uncertainty(bigrams(10), nothing)) == 0
    assert len(readings.features(bigrams(10), nothing)) == 0


def test_features_are_the_objectives(
    bigrams: Runs, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dataset = bigrams(10), some(examples)

    def told(model: Any, batch: Any) -> torch.Tensor:
        return torch.stack([batch.example_ids, batch.inputs["attention_mask"].sum(dim=1)], dim=1)

    monkeypatch.setattr(run.objective, "features", told)
    found = readings.features(run, dataset)
    assert found.tolist() == [[i, length] for i, length in enumerate(LENGTHS)]


def test_classes_are_labels_and_else_tasks(examples: Examples) -> None:
    labelled = examples([[1]] * 3, labels=[4, 0, 4], task=2)
    generating = examples([[1]] * 2, labels=[-1, -1], task=2)
    assert readings.classes(labelled).tolist() == [4, 0, 4]
    assert readings.classes(generating).tolist() == [-3, -3]
    assert readings.classes(examples([[1]], labels=[-1], task=0)).tolist() == [-1]
