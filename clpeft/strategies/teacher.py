"""What a model said with other weights: computed beside the training, or once in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clpeft.streams.batch import IGNORED
from clpeft.streams.batching import sorted_batches

if TYPE_CHECKING:
    from clpeft.streams.batch import Batch
    from clpeft.streams.batching import Columns
    from clpeft.training.run import Run

# numbers exchanged at a time between processes: 128 MiB in float32
EXCHANGED_NUMBERS = 2**25

# the teacher's logits and the labels of a batch: [B, K] and [B], or [B, L, K] and [B, L]
Teacher = Callable[["Batch"], tuple[Tensor, Tensor]]


def teacher_of(run: Run, weights: Mapping[str, Tensor]) -> Teacher:
    """The run's model with other values of what trains: without dropout and without gradient.

    While it is asked, its modules hold the other tensors in place of their parameters, which are
    not written to: a graph between the student's forward and backward pass stays valid. It is the
    unwrapped model that is asked, so that processes do not take it for a step.

    Args:
        run: Whose model.
        weights: Name to value, for each of `run.trainable`.

    Returns:
        What the model said, with the logits of labels that do not compete too.
    """
    names = {id(parameter): name for name, parameter in run.trainable.items()}
    modules = list(run.model.modules())
    places = [
        # PyTorch chooses a product's kernel by whether its weight trains: as the student's does,
        # so that the same weights say the same bits
        (module._parameters, key, own, weights[names[id(own)]].detach().requires_grad_())
        for module in modules
        for key, own in module._parameters.items()  # a tied parameter is at several
        if id(own) in names
    ]

    @contextmanager
    def teaching() -> Iterator[None]:
        # as train() and eval() do, which take as long as a layer of a small model does
        modes = [vars(module) for module in modules]
        before = [mode["training"] for mode in modes]
        try:
            for mode in modes:
                mode["training"] = False
            for parameters, key, _, other in places:
                parameters[key] = other  # type: ignore[assignment]
            yield
        finally:
            for parameters, key, own, _ in places:
                parameters[key] = own
            for mode, training in zip(modes, before, strict=True):
                mode["training"] = training

    def predicted(batch: Batch) -> tuple[Tensor, Tensor]:
        with teaching(), torch.no_grad(), run.accelerator.autocast():
            outputs = run.objective.forward(run.model, batch)
        return run.objective.unmasked(outputs, batch)

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
        # before an example's first target it is the one of another, or -1, the last
        return self.values[first[:, None] + targets.cumsum(dim=1) - 1]


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
