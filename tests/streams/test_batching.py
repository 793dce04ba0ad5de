"""Batches: padding, labels, order, shares of processes."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import numpy as np
import pyarrow
import pytest
import torch

from clpeft.streams.batch import NO_EXAMPLE, Batch, concatenate, set_aside
from clpeft.streams.batching import (
    WINDOW,
    BatchLoader,
    Collator,
    Columns,
    bucketed_batches,
    share,
    sorted_batches,
)

ROWS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]


@pytest.fixture
def encoded() -> Callable[..., datasets.Dataset]:
    """The four rows above as a data set of one of the model types."""

    def make(task_type: str, rows: list[list[int]] = ROWS) -> datasets.Dataset:
        lists = pyarrow.list_(pyarrow.int32())
        columns = {
            "input_ids": pyarrow.array(rows, lists),
            "label": pyarrow.array([3, 0, 1, 2][: len(rows)], pyarrow.int64()),
            "task_id": pyarrow.array([1] * len(rows), pyarrow.int64()),
            "example_id": pyarrow.array([40, 41, 42, 43][: len(rows)], pyarrow.int64()),
        }
        if task_type == "causal_lm":
            columns["prompt_length"] = pyarrow.array([2, 1, 1, 1], pyarrow.int32())
        if task_type == "seq2seq_lm":
            columns["labels"] = pyarrow.array([[20], [21, 22], [23], [24, 25, 26]], lists)
        return datasets.Dataset(pyarrow.table(columns))

    return make


def test_classification_batch(encoded: Callable[..., datasets.Dataset]) -> None:
    columns = Columns(encoded("sequence_classification"))
    batch = Collator("sequence_classification", pad_token_id=99)(columns, np.array([2, 0]))
    assert batch.inputs["input_ids"].tolist() == [[9, 10, 11, 12], [5, 6, 7, 99]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.labels.tolist() == [1, 3]
    assert batch.task_ids.tolist() == [1, 1]
    assert batch.example_ids.tolist() == [42, 40]
    assert (len(batch), batch.num_targets) == (2, 2)
    tensors = [*batch.inputs.values(), batch.labels, batch.task_ids, batch.example_ids]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_causal_batch_answers_only(encoded: Callable[..., datasets.Dataset]) -> None:
    columns = Columns(encoded("causal_lm"))
    batch = Collator("causal_lm", pad_token_id=7)(columns, np.array([0, 3, 2]))
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 7], [13, 14, 7, 7], [9, 10, 11, 12]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    # the 7 that is an answer is learned, the 7s that fill up are not
    assert batch.labels.tolist() == [
        [-100, -100, 7, -100],
        [-100, 14, -100, -100],
        [-100, 10, 11, 12],
    ]
    assert batch.num_targets == 5
    assert int((batch.labels[:, 1:] != -100).sum()) == 5  # after the shift


@pytest.mark.parametrize(
    ("task_type", "expected"),
    [
        ("sequence_classification", [1, 1, 1, 1]),
        ("causal_lm", [1, 0, 3, 1]),
        ("seq2seq_lm", [1, 2, 1, 3]),
    ],
)
def test_targets_of_each_example(
    encoded: Callable[..., datasets.Dataset], task_type: str, expected: list[int]
) -> None:
    columns = Columns(encoded(task_type))
    assert columns.targets.tolist() == expected
    # what a batch counts
    for row in range(4):
        assert Collator(task_type, 0)(columns, np.array([row])).num_targets == expected[row]


def test_sequence_to_sequence_batch(encoded: Callable[..., datasets.Dataset]) -> None:
    columns = Columns(encoded("seq2seq_lm"))
    batch = Collator("seq2seq_lm", pad_token_id=0)(columns, np.array([1, 3]))
    assert batch.inputs["input_ids"].tolist() == [[8, 0], [13, 14]]
    assert batch.labels.tolist() == [[21, 22, -100], [24, 25, 26]]
    assert batch.num_targets == 5


def test_token_types_are_padded_with_zero() -> None:
    lists = pyarrow.list_(pyarrow.int32())
    table = {
        "input_ids": pyarrow.array([[1, 2, 3], [4]], lists),
        "token_type_ids": pyarrow.array([[0, 1, 1], [1]], lists),
        "label": pyarrow.array([0, 1]),
        "task_id": pyarrow.array([0, 0]),
        "example_id": pyarrow.array([0, 1]),
    }
    columns = Columns(datasets.Dataset(pyarrow.table(table)))
    batch = Collator("sequence_classification", pad_token_id=9)(columns, np.array([0, 1]))
    assert list(batch.inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_batch_of_no_examples(encoded: Callable[..., datasets.Dataset]) -> None:
    columns = Columns(encoded("causal_lm"))
    batch = Collator("causal_lm", 0)(columns, np.array([], dtype=np.int64))
    assert (len(batch), batch.num_targets) == (0, 0)
    assert batch.inputs["input_ids"].shape == (0, 1)


def test_columns_are_views_and_follow_a_selection(
    encoded: Callable[..., datasets.Dataset],
) -> None:
    dataset = encoded("causal_lm")
    columns = Columns(dataset)
    arrow = dataset.data.column("input_ids").chunk(0).values.to_numpy()
    assert np.shares_memory(columns.ragged["input_ids"].values, arrow)
    assert columns.lengths.tolist() == [3, 1, 4, 2]
    chosen = Columns(dataset.select([3, 0]))
    assert chosen.lengths.tolist() == [2, 3]
    batch = Collator("causal_lm", 0)(chosen, np.array([0, 1]))
    assert batch.inputs["input_ids"].tolist() == [[13, 14, 0], [5, 6, 7]]
    assert batch.example_ids.tolist() == [43, 40]
    neighbours = Columns(dataset.select(range(1, 3)))  # stays a slice of the same memory
    batch = Collator("causal_lm", 0)(neighbours, np.array([1, 0]))
    assert batch.inputs["input_ids"].tolist() == [[9, 10, 11, 12], [8, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 10, 11, 12], [-100, -100, -100, -100]]


def test_columns_of_several_chunks(encoded: Callable[..., datasets.Dataset]) -> None:
    one = encoded("causal_lm")
    both = datasets.concatenate_datasets([one.select([1]), one, one.select([3, 0])])
    columns = Columns(both)
    assert columns.lengths.tolist() == [1, 3, 1, 4, 2, 2, 3]
    batch = Collator("causal_lm", 0)(columns, np.array([6, 5, 0]))
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [13, 14, 0], [8, 0, 0]]


def test_batches_join_at_the_longest() -> None:
    short = Batch(
        {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])},
        torch.tensor([[-100, 2]]),
        torch.tensor([0]),
        torch.tensor([5]),
    )
    long = Batch(
        {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.tensor([[1, 1, 1]])},
        torch.tensor([[-100, 4, 5]]),
        torch.tensor([1]),
        torch.tensor([6]),
    )
    both = concatenate([short, long], pad_token_id=99)
    assert both.inputs["input_ids"].tolist() == [[1, 2, 99], [3, 4, 5]]
    assert both.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert both.labels.tolist() == [[-100, 2, -100], [-100, 4, 5]]
    assert (both.task_ids.tolist(), both.example_ids.tolist()) == ([0, 1], [5, 6])
    assert both.num_targets == short.num_targets + long.num_targets == 3


def test_joining_classification_batches_keeps_labels_flat(
    encoded: Callable[..., datasets.Dataset],
) -> None:
    columns = Columns(encoded("sequence_classification"))
    collator = Collator("sequence_classification", 0)
    both = concatenate([collator(columns, np.array([1])), collator(columns, np.array([0, 3]))], 0)
    assert both.labels.tolist() == [0, 3, 2]
    assert both.inputs["input_ids"].tolist() == [[8, 0, 0], [5, 6, 7], [13, 14, 0]]


def test_rows_set_aside_are_counted_apart() -> None:
    def cut(labels: list[list[int]]) -> Batch:
        ids = torch.arange(len(labels))
        inputs = {"input_ids": torch.ones(len(labels), len(labels[0]), dtype=torch.int64)}
        return Batch(inputs, torch.tensor(labels), torch.zeros_like(ids), ids)

    own, first = cut([[-100, 5]]), cut([[-100, 6, 7], [-100, 8, -100]])
    empty = cut([[-100, -100]]).counted(0, 0, 1)  # stands in for a share that has no row
    notes = {"known": torch.tensor([3.0, 4.0])}
    both = concatenate(
        [own, set_aside(first, "one", notes), set_aside(empty, "other"), cut([[-100, 9]])], 0
    )

    one, other = both.parts["one"], both.parts["other"]
    assert (one.rows, one.num_targets, one.num_examples) == (slice(1, 3), 3, 2)
    assert (other.rows, other.num_targets, other.num_examples) == (slice(3, 4), 0, 0)
    assert one.notes["known"].tolist() == [3.0, 4.0]
    assert both.own_rows.tolist() == [0, 4]  # type: ignore[union-attr]
    assert both.num_targets == 2
    # also where it is counted from the labels
    again = Batch(both.inputs, both.labels, both.task_ids, both.example_ids, parts=both.parts)
    assert again.num_targets == 2
    assert both.to("meta").parts["one"].notes["known"].device.type == "meta"


# Order.


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (16, 16), (17, 16), (1000, 7), (3210, 16)])
def test_an_epoch_has_every_example_once(rows: int, size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, rows)
    batches = bucketed_batches(lengths, size, seed=3, epoch=2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert len(batches) == -(-rows // size)
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)


def test_order_is_of_seed_and_epoch_alone() -> None:
    lengths = np.arange(100) % 9

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(bucketed_batches(lengths, 8, seed=seed, epoch=epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 1) != order(1, 0)


def test_batches_hold_like_lengths_in_no_particular_order() -> None:
    # two windows' worth: inside a window, sorted, a batch of 10 out of 500 spans few lengths
    lengths = np.arange(2 * WINDOW * 10) // 2
    batches = bucketed_batches(lengths, 10, seed=0, epoch=0)
    spans = [int(np.ptp(lengths[rows])) for rows in batches]
    # shuffled without sorting a batch would span about 400 of the 500 lengths
    assert np.mean(spans) < 20
    means = [lengths[rows].mean() for rows in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_equal_lengths_are_shuffled_throughout() -> None:
    batches = bucketed_batches(np.full(4000, 5), 16, seed=0, epoch=0)
    first = np.concatenate(batches[:25])
    assert first.min() < 400  # rows of the whole set come early
    assert first.max() > 3600
    assert (np.diff(first) < 0).mean() > 0.4


def test_evaluation_goes_from_long_to_short() -> None:
    batches = sorted_batches(np.array([3, 9, 3, 7, 1]), 2)
    assert [rows.tolist() for rows in batches] == [[1, 3], [0, 2], [4]]


# The loader.


def test_loader_in_the_rows_own_order(encoded: Callable[..., datasets.Dataset]) -> None:
    loader = BatchLoader(
        encoded("causal_lm"), Collator("causal_lm", 0), batch_size=3, seed=0, shuffle=False
    )
    assert [batch.example_ids.tolist() for batch in loader] == [[40, 41, 42], [43]]
    assert len(loader) == 2
    assert loader.batch(1).example_ids.tolist() == [43]


@pytest.mark.parametrize("task_type", ["causal_lm", "seq2seq_lm", "sequence_classification"])
def test_joined_batches_know_their_targets(
    encoded: Callable[..., datasets.Dataset], task_type: str
) -> None:
    columns, collator = Columns(encoded(task_type)), Collator(task_type, 0)
    for first, second in (([1], [0, 3]), ([3], [0]), ([2], [1, 3])):
        both = concatenate([collator(columns, np.array(rows)) for rows in (first, second)], 0)
        # counted anew from the labels
        fresh = Batch(both.inputs, both.labels, both.task_ids, both.example_ids)
        assert (both.num_targets, both.target_width) == (fresh.num_targets, fresh.target_width)


def test_loader_shares_columns_between_epochs(encoded: Callable[..., datasets.Dataset]) -> None:
    columns = Columns(encoded("causal_lm"))
    collator = Collator("causal_lm", 0)
    orders = set()
    for epoch in range(8):
        loader = BatchLoader(columns, collator, batch_size=1, seed=0, epoch=epoch)
        assert loader.columns is columns
        orders.add(tuple(int(batch.example_ids) for batch in loader))
    assert len(orders) > 1
    assert {tuple(sorted(order)) for order in orders} == {(40, 41, 42, 43)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_see_what_one_sees(world_size: int) -> None:
    rows = [[number % 50 + 2] * (number % 7 + 1) for number in range(100)]
    table = {
        "input_ids": pyarrow.array(rows, pyarrow.list_(pyarrow.int32())),
        "label": pyarrow.array(range(100)),
        "task_id": pyarrow.array([0] * 100),
        "example_id": pyarrow.array(range(100)),
    }
    columns = Columns(datasets.Dataset(pyarrow.table(table)))
    collator = Collator("sequence_classification", 0)
    alone = BatchLoader(columns, collator, batch_size=8, seed=1, epoch=4)
    loaders = [
        BatchLoader(
            columns, collator, batch_size=8, seed=1, epoch=4, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert {len(loader) for loader in loaders} == {len(alone)} == {13}
    for index in range(len(alone)):
        whole = alone.batch(index).example_ids.tolist()
        for rank, loader in enumerate(loaders):
            assert loader.batch(index).example_ids.tolist() == whole[rank::world_size]


def test_identities_are_known_without_asking_the_device(
    encoded: Callable[..., datasets.Dataset],
) -> None:
    columns, collator = Columns(encoded("causal_lm")), Collator("causal_lm", 0)
    # nothing can be read from the meta device
    one, other = (collator(columns, np.array(rows)).to("meta") for rows in ([2], [0, 3]))
    aside = set_aside(other, "other")

    assert one.identities == [(1, 42)]
    assert concatenate([one, aside], 0).identities == [(1, 42), (1, 40), (1, 43)]
    assert concatenate([one, aside], 0).to("meta").identities == [(1, 42), (1, 40), (1, 43)]


def test_row_that_only_keeps_pace_is_no_example(encoded: Callable[..., datasets.Dataset]) -> None:
    columns, collator = Columns(encoded("causal_lm")), Collator("causal_lm", 0)
    first, second = (
        share(collator, columns, np.array([2]), rank=rank, world_size=2) for rank in range(2)
    )

    assert first.identities == [(1, 42)]
    assert second.identities == [(1, NO_EXAMPLE)]
    assert (second.num_targets, second.target_width) == (0, 0)
    assert concatenate([second, first], 0).identities == [(1, NO_EXAMPLE), (1, 42)]


def test_batch_moves_as_a_whole() -> None:
    batch = Batch(
        {"input_ids": torch.tensor([[1]]), "attention_mask": torch.tensor([[1]])},
        torch.tensor([0]),
        torch.tensor([0]),
        torch.tensor([0]),
    ).to("meta")
    assert {x.device.type for x in (*batch.inputs.values(), batch.labels)} == {"meta"}
    assert {batch.task_ids.device.type, batch.example_ids.device.type} == {"meta"}
