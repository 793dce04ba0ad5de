"""A memory of training examples, filled by reservoir sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.streams.batching import Batch, Columns

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.training.run import Run


class Memory:
    """Encoded examples (token ids, not padded tensors) with a random state of their own.

    Args:
        capacity: Examples at most, over all tasks.
        generator: Decides what is kept and what is drawn; for the memory alone, so that two
            memories side by side do not keep and draw the same examples.
    """

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        self.capacity = capacity
        self.seen = 0
        self.generator = generator
        self._examples: Dataset | None = None
        self._columns: Columns | None = None

    def __len__(self) -> int:
        return 0 if self._examples is None else len(self._examples)

    @property
    def examples(self) -> Dataset | None:
        """What is kept; None while it is empty."""
        return self._examples

    def add(self, examples: Dataset) -> None:
        """Shows the memory examples, each once; every one seen so far is kept with equal chance.

        Args:
            examples: An encoded data set; insert a task's examples once, not once per epoch.

        Source: Vitter 1985, Random Sampling with a Reservoir (algorithm R).
        """
        from datasets import concatenate_datasets

        slots = reservoir(len(self), len(examples), self.capacity, self.seen, self.generator)
        everything = [examples] if self._examples is None else [self._examples, examples]
        self._keep(concatenate_datasets(everything).select(slots))
        self.seen += len(examples)

    def draw(self, run: Run, count: int) -> Batch:
        """A batch of `count` different examples (all there are, if fewer), on the run's device.

        Of several processes, which hold the same memory, each gets its share.
        """
        assert self._columns is not None, "drawn from an empty memory"
        order = torch.randperm(len(self), generator=self.generator)
        return run.shared_batch(self._columns, order[:count].numpy())

    def state_dict(self) -> dict[str, Any]:
        """The examples as an Arrow stream, what was seen, and the random state."""
        return {
            "arrow": None if self._examples is None else _to_arrow(self._examples),
            "seen": self.seen,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.seen = state["seen"]
        self.generator.set_state(state["generator"])
        if state["arrow"] is not None:
            self._keep(_from_arrow(state["arrow"]))

    def _keep(self, examples: Dataset) -> None:
        self._examples = examples.flatten_indices(keep_in_memory=True)
        self._columns = Columns(self._examples)


def reservoir(
    held: int, arriving: int, capacity: int, seen: int, generator: torch.Generator
) -> list[int]:
    """Which examples a reservoir holds after more have arrived.

    Args:
        held: Examples held so far; they have the indices 0 to held - 1.
        arriving: Examples shown now; the k-th has the index held + k.
        capacity: Examples at most.
        seen: How many were shown before these.
        generator: Draws one number per arriving example.

    Returns:
        The indices held afterwards.
    """
    slots = list(range(held))
    draws = torch.rand(arriving, generator=generator, dtype=torch.float64).tolist()
    for k, draw in enumerate(draws):
        if len(slots) < capacity:
            slots.append(held + k)
            continue
        # the number seen includes this one: it stays with probability capacity / (seen + k + 1)
        slot = int(draw * (seen + k + 1))
        if slot < capacity:
            slots[slot] = held + k
    return slots


def _to_arrow(examples: Dataset) -> Tensor:
    import pyarrow as pa

    # without what datasets notes of how the table came about, which says nothing of the examples
    table = examples.data.table.combine_chunks().replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return torch.frombuffer(bytearray(sink.getvalue().to_pybytes()), dtype=torch.uint8)


def _from_arrow(stream: Tensor) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    table = pa.ipc.open_stream(stream.numpy().tobytes()).read_all()
    return Dataset(table)
