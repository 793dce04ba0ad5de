"""Readings: what the model makes of examples, in one pass without gradients and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clpeft.models.objective import IGNORED
from clpeft.strategies.selection import entropy
from clpeft.streams.batching import Columns, sorted_batches

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.batch import Batch
    from clpeft.training.run import Run


def read(run: Run, dataset: Dataset, reading: Callable[[Batch], Tensor]) -> list[Tensor]:
    """What a reading finds for each example of a data set.

    Several processes share the work, and all of them get everything.

    Args:
        run: Whose model reads.
        dataset: Encoded examples.
        reading: Runs the model on a batch; gives one row per example, [B, ...].

    Returns:
        One tensor per example, whose size may hang on its batch's width: [...] each, on the CPU,
        in the data set's order.
    """
    columns = Columns(dataset)
    batches = sorted_batches(columns.lengths, run.config.training.batch_size)
    found: list[tuple[np.ndarray, Tensor]] = []
    with run.eval_mode(), torch.no_grad():
        for rows in batches[run.rank :: run.world_size]:
            with run.accelerator.autocast():
                values = reading(run.batch(columns, rows))
            # a copy, since a view would take all that it looks at to the other processes
            found.append((rows, values.cpu().clone()))
    everywhere = [pair for part in run.gathered(found) for pair in part]
    by_row = {
        row: value
        for rows, values in everywhere
        for row, value in zip(rows.tolist(), values, strict=True)
    }
    return [by_row[row] for row in range(len(columns))]


def features(run: Run, dataset: Dataset) -> Tensor:
    """Mean hidden states of the last layer over each input: [N, D] in float32."""
    return _stacked(read(run, dataset, lambda batch: run.objective.features(run.model, batch)))


def uncertainty(run: Run, dataset: Dataset) -> Tensor:
    """How unsure the model is of its answers, in nats: [N].

    The entropy over the labels that compete; of a language model over its vocabulary, the mean
    over the answer's tokens.
    """

    def mean_entropy(batch: Batch) -> Tensor:
        outputs = run.objective.forward(run.model, batch)
        logits, labels = run.objective.predicted(outputs, batch)
        counted = (labels != IGNORED).view(len(batch), -1)
        entropies = entropy(logits).view(len(batch), -1).masked_fill(~counted, 0.0)
        return entropies.sum(dim=1) / counted.sum(dim=1)

    return _stacked(read(run, dataset, mean_entropy))


def losses(run: Run, dataset: Dataset) -> Tensor:
    """Negative log-likelihood of each example's answer, summed over its tokens, in nats: [N]."""

    def loss(batch: Batch) -> Tensor:
        return run.per_example_loss(batch, run.objective.forward(run.model, batch))

    return _stacked(read(run, dataset, loss))


def _stacked(rows: list[Tensor]) -> Tensor:
    """Rows as one tensor; of none an empty one, as where no example was admitted."""
    return torch.stack(rows) if rows else torch.zeros(0)


def classes(dataset: Dataset) -> np.ndarray:
    """The class of each example [N]: its global label; generation tasks are a class each."""
    table = dataset.with_format("arrow")[:]
    labels, tasks = (table[name].to_numpy() for name in ("label", "task_id"))
    return np.where(labels >= 0, labels, -1 - tasks)
