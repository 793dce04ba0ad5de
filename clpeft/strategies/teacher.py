"""What a model said with other weights: computed beside the training, or once in advance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from clpeft.streams.batching import IGNORED, sorted_batches

if TYPE_CHECKING:
    from clpeft.models.objective import Objective
    from clpeft.streams.batching import Batch, Columns
    from clpeft.training.run import Run

# numbers exchanged at a time between processes: 128 MiB in float32
EXCHANGED_NUMBERS = 2**25

# the teacher's logits and the labels of a batch: [B, K] and [B], or [B, L, K] and [B, L]
Teacher = Callable[["Batch"], tuple[Tensor, Tensor]]


def teacher_of(run: Run, weights: Mapping[str, Tensor], objective: Objective) -> Teacher:
    """The run's model with other values of some parameters: without dropout and without gradient.

    The model's own values are never written to, so that a graph that was made with them, between
    the student's forward and backward pass, stays valid. It is the unwrapped model that is called:
    the exchange between processes takes no note of it.

    Args:
        run: Whose model.
        weights: Name to value, as in `run.trainable`.
        objective: Gives the logits and labels of a batch.
    """

    def model(**inputs: Any) -> Any:
        return functional_call(run.model, dict(weights), kwargs=inputs)

    def predicted(batch: Batch) -> tuple[Tensor, Tensor]:
        with run.eval_mode(), torch.no_grad(), run.accelerator.autocast():
            outputs = objective.forward(model, batch)
        return objective.predicted(outputs, batch)

    return predicted


@dataclass(frozen=True)
class CachedOutputs:
    """A teacher's logits at all targets of some examples of one task.

    Attributes:
        values: [targets, K] in float32, the targets of an example one after another.
        starts: [largest example id + 1] where an example's targets begin; one that has none here
            begins beyond the end, so that asking for it is an error rather than another's logits.
    """

    values: Tensor
    starts: Tensor

    def at(self, example_ids: Tensor, targets: Tensor) -> Tensor:
        """The logits at a batch's targets, in one gather and without waiting for the device.

        Args:
            example_ids: [B].
            targets: [B, L] bool, all targets of an example or none of them; an example without any
                need not be known here.

        Returns:
            [B, L, K]; without meaning, but finite, where there is no target.
        """
        known = targets.any(dim=1)
        first = self.starts[example_ids.where(known, 0)]
        places = first[:, None] + targets.cumsum(dim=1) - 1
        return self.values[places.where(targets, 0)]


def cached_outputs(
    run: Run, teacher: Teacher, columns: Columns, rows: np.ndarray, width: int
) -> CachedOutputs:
    """Asks a teacher about examples once; several processes share the work.

    The batches depend on the examples and `training.batch_size` alone, so that a process that
    asks the same teacher again, on resume, is told the same bits.

    Args:
        run: Whose processes and device.
        teacher: Gives logits and labels of a batch.
        columns: Encoded examples.
        rows: Which of them, at least one; of one task.
        width: K, how many logits there are to a target.
    """
    size = run.config.training.batch_size
    batches = [rows[places] for places in sorted_batches(columns.lengths[rows], size)]
    order = np.concatenate(batches)
    ids = columns.numbers["example_id"][order]
    ends = columns.targets[order].cumsum()
    total = int(ends[-1])
    starts = np.full(int(ids.max()) + 1, total)
    starts[ids] = ends - columns.targets[order]
    values = torch.zeros(total, width, device=run.device)
    bounds = [0, *ends[np.cumsum([len(batch) for batch in batches]) - 1].tolist()]
    for number in range(run.rank, len(batches), run.world_size):
        logits, labels = teacher(run.batch(columns, batches[number]))
        values[bounds[number] : bounds[number + 1]] = logits[labels != IGNORED]
    for part in values.split(max(1, EXCHANGED_NUMBERS // width)):
        part.copy_(run.sum_gradients([part])[0])  # what another process has not asked is 0 there
    return CachedOutputs(values, torch.from_numpy(starts).to(run.device))
