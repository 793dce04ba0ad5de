"""Cutting encoded examples into batches: in which order, padded how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clpeft.streams.batch import IGNORED, NO_EXAMPLE, Batch

if TYPE_CHECKING:
    import datasets

# Batches per window inside which examples are sorted by length: enough to leave little padding,
# few enough to keep an epoch well mixed.
WINDOW = 50


@dataclass(frozen=True)
class Ragged:
    """Lists of numbers, one after another.

    Args:
        values: [total] all numbers.
        starts: [rows] where each row begins in `values`.
        lengths: [rows] how many of them are its own.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def padded(self, rows: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
        """Some rows as a matrix, filled up on the right to the longest of them.

        Args:
            rows: [B] which ones.
            fill: What stands after a row's end.

        Returns:
            The numbers, [B, width] int64, and which places hold a row's own, [B, width] bool.
        """
        lengths = self.lengths[rows]
        width = int(lengths.max(initial=1))
        places = np.arange(width)
        own = places < lengths[:, None]
        # beyond the last row's end there is nothing to read; what is read there is not kept
        gathered = self.values.take(self.starts[rows, None] + places, mode="clip")
        return np.where(own, gathered, np.int64(fill)), own


class Columns:
    """An encoded data set as numpy arrays, to cut batches from without touching single rows.

    The arrays are views of the Arrow memory; only a data set with chosen rows (`.select`) is
    copied, once, in the order of its rows.

    Args:
        dataset: A data set encoded by `encode_stream`.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        # with_format("arrow") applies a selection of rows; "" would give Python lists
        table = dataset.with_format("arrow")[:]
        self.ragged = {
            name: _ragged(table[name])
            for name in ("input_ids", "token_type_ids", "labels")
            if name in table.column_names
        }
        self.numbers = {
            name: _flat(table[name]).to_numpy()
            for name in ("label", "prompt_length", "task_id", "example_id")
            if name in table.column_names
        }

    def __len__(self) -> int:
        return len(self.numbers["task_id"])

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of each example's input."""
        return self.ragged["input_ids"].lengths

    @property
    def targets(self) -> np.ndarray:
        """[rows] targets of each example: the tokens of its answer, or its one label."""
        if "labels" in self.ragged:
            return self.ragged["labels"].lengths
        if "prompt_length" in self.numbers:
            return self.lengths - self.numbers["prompt_length"]
        return np.ones(len(self), dtype=np.int64)


def _flat(column: Any) -> Any:
    """A column's chunks as one array."""
    import pyarrow

    if column.num_chunks == 1:
        return column.chunk(0)
    if column.num_chunks == 0:
        return pyarrow.array([], column.type)
    return pyarrow.concat_arrays(column.chunks)


def _ragged(column: Any) -> Ragged:
    array = _flat(column)
    offsets = array.offsets.to_numpy()
    return Ragged(array.values.to_numpy(), offsets[:-1].astype(np.int64), np.diff(offsets))


class Collator:
    """Makes a batch of rows: right padding, masks, labels where the model is to answer.

    Args:
        task_type: sequence_classification, causal_lm or seq2seq_lm.
        pad_token_id: What fills `input_ids`.
    """

    def __init__(self, task_type: str, pad_token_id: int) -> None:
        self.task_type = task_type
        self.pad_token_id = pad_token_id

    def __call__(self, columns: Columns, indices: np.ndarray) -> Batch:
        """The batch of some rows.

        Args:
            columns: The data set.
            indices: [B] rows; B may be 0, which gives a batch of no examples.
        """
        input_ids, own = columns.ragged["input_ids"].padded(indices, self.pad_token_id)
        inputs = {"input_ids": input_ids, "attention_mask": own.astype(np.int64)}
        if "token_type_ids" in columns.ragged:
            types = columns.ragged["token_type_ids"]
            inputs["token_type_ids"] = types.padded(indices, 0)[0]
        if self.task_type == "causal_lm":
            prompt = columns.numbers["prompt_length"][indices, None]
            answers = own & (np.arange(own.shape[1]) >= prompt)
            labels = np.where(answers, input_ids, np.int64(IGNORED))
        elif self.task_type == "seq2seq_lm":
            labels = columns.ragged["labels"].padded(indices, IGNORED)[0]
        else:
            labels = columns.numbers["label"][indices]
        return Batch(
            {name: torch.from_numpy(array) for name, array in inputs.items()},
            torch.from_numpy(labels),
            torch.from_numpy(columns.numbers["task_id"][indices]),
            torch.from_numpy(columns.numbers["example_id"][indices]),
        )


def share(
    collator: Collator, columns: Columns, indices: np.ndarray, rank: int, world_size: int
) -> Batch:
    """One process's share of a batch: every `world_size`-th of its rows.

    A process that none is left for gets the first row without its targets and its example id: it
    has to run the model as the others do, and adds nothing to the loss.

    Args:
        collator: Makes a batch of rows.
        columns: The data set.
        indices: [B] rows of the whole batch, at least one.
        rank: Which share, from 0.
        world_size: How many there are.
    """
    batch = collator(columns, own_rows(indices, rank, world_size))
    targets, width = batch.num_targets, batch.target_width
    if len(indices) <= rank:
        targets, width = 0, 0
        batch.labels.fill_(IGNORED)
        batch.example_ids.fill_(NO_EXAMPLE)
    return batch.counted(targets, width, len(indices))


def own_rows(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The rows that make one process's `share` of a batch."""
    return indices[rank::world_size] if rank < len(indices) else indices[:1]


def bucketed_batches(
    lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int
) -> list[np.ndarray]:
    """A shuffled epoch whose batches hold examples of like length.

    Examples are shuffled, sorted by length inside windows of 50 batches, cut into batches, and the
    batches shuffled. One batch is smaller where the numbers do not divide.

    Args:
        lengths: [rows] tokens per example.
        batch_size: Examples per batch.
        seed: Of the order, together with `epoch`.
        epoch: Which pass over the data this is.

    Returns:
        Row numbers, [B] each; every row is in exactly one batch.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    window = np.arange(len(lengths)) // (WINDOW * batch_size)
    order = order[np.lexsort((lengths[order], window))]
    batches = _cut(order, batch_size)
    return [batches[index] for index in generator.permutation(len(batches))]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches for evaluation: by length, the longest first, so that a lack of memory shows at once.

    Args:
        lengths: [rows] tokens per example.
        batch_size: Examples per batch.

    Returns:
        Row numbers, [B] each; every row is in exactly one batch.
    """
    return _cut(np.argsort(-lengths.astype(np.int64), kind="stable"), batch_size)


def _cut(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class BatchLoader:
    """One epoch of batches.

    With several processes each takes its `share` of the same global batches, so that together they
    train on what one process alone would.

    Args:
        dataset: An encoded data set, or its columns where several epochs are to share them.
        collator: Makes a batch of rows.
        batch_size: Examples per global batch.
        seed: Of the order.
        epoch: Which pass over the data this is.
        shuffle: Whether to shuffle and to sort by length inside windows; otherwise rows come in
            their own order.
        rank: This process.
        world_size: How many processes there are.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | Columns,
        collator: Collator,
        *,
        batch_size: int,
        seed: int,
        epoch: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.columns = dataset if isinstance(dataset, Columns) else Columns(dataset)
        self.collator = collator
        if shuffle:
            batches = bucketed_batches(self.columns.lengths, batch_size, seed=seed, epoch=epoch)
        else:
            batches = _cut(np.arange(len(self.columns)), batch_size)
        self.rows = batches
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(index) for index in range(len(self)))

    def batch(self, index: int) -> Batch:
        """The batch with some number in the epoch, made when asked for."""
        return share(self.collator, self.columns, self.rows[index], self.rank, self.world_size)
