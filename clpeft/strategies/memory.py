"""A memory of training examples: limited in size, chosen by rule, read by lot."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clpeft.strategies import readings
from clpeft.strategies.arrow import from_bytes, to_bytes
from clpeft.strategies.selection import best_of_each, herding, reservoir
from clpeft.streams.batch import Batch
from clpeft.streams.batching import Columns

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.training.run import Run

log = logging.getLogger(__name__)

SELECTIONS = ("reservoir", "class_balanced", "task_balanced", "herding", "uncertainty")
BUDGETS = ("total", "per_task")


class Memory:
    """Encoded examples (token ids, not padded tensors) with a random state of their own.

    What it holds, by `selection`:

    - `reservoir`: every example seen with equal chance (Vitter 1985).
    - `class_balanced`, `task_balanced`: as many of each class or task, each class's a random
      sample of all of it that was seen (the balance after Chrysakis & Moens 2020).
    - `herding`: as many of each class, those whose features' mean is nearest to the class's
      (Rebuffi et al. 2017, iCaRL).
    - `uncertainty`: as many of each class, those with the highest predictive entropy (Chaudhry et
      al. 2018, Riemannian Walk, section 4.2).

    Args:
        capacity: Examples at most, over all tasks or of each, as `budget` says.
        generator: Decides what is kept and what is drawn; for the memory alone, so that two
            memories side by side do not keep and draw the same examples.
        selection: One of `SELECTIONS`.
        budget: `total`: `capacity` is shared by all tasks; `per_task`: each task brings as much.

    Attributes:
        seen: Examples that were shown to it so far.
        notes: Values kept beside the examples, by name: [N, ...] each, in their order, on the CPU.
    """

    def __init__(
        self,
        capacity: int,
        generator: torch.Generator,
        *,
        selection: str = "reservoir",
        budget: str = "total",
    ) -> None:
        self.capacity = capacity
        self.selection = selection
        self.budget = budget
        self.seen = 0
        self.generator = generator
        self.notes: dict[str, Tensor] = {}
        self._examples: Dataset | None = None
        self._columns: Columns | None = None
        self._keys = torch.zeros(0, dtype=torch.float64)  # see best_of_each
        self._bars: dict[int, float] = {}

    def __len__(self) -> int:
        return 0 if self._examples is None else len(self._examples)

    @property
    def examples(self) -> Dataset | None:
        """What is kept; None while it is empty."""
        return self._examples

    @property
    def columns(self) -> Columns:
        """What is kept, to cut batches from."""
        assert self._columns is not None, "read from an empty memory"
        return self._columns

    @property
    def num_bytes(self) -> int:
        """What its examples and notes take, in bytes."""
        if self._examples is None:
            return 0
        return self._examples.data.nbytes + sum(note.nbytes for note in self.notes.values())

    def add(self, run: Run, examples: Dataset) -> Tensor:
        """Shows the memory examples, each once.

        Args:
            run: Whose model the choice may ask.
            examples: An encoded data set; insert a task's examples once, not once per epoch.

        Returns:
            Which of the memory's rows [n] hold examples of these; their notes are 0 and the
            caller's to fill.
        """
        from datasets import concatenate_datasets

        if not len(examples):
            return torch.zeros(0, dtype=torch.int64)
        held = len(self)
        keys = torch.cat([self._keys, self._keys_of(run, examples)])
        everything = examples
        if self._examples is not None:
            everything = concatenate_datasets([self._examples, examples])
        slots = torch.tensor(self._chosen(everything, held, keys), dtype=torch.int64)
        self._keys = keys[slots]
        for name, note in self.notes.items():
            new = note.new_zeros(len(examples), *note.shape[1:])
            self.notes[name] = torch.cat([note, new])[slots]
        self._keep(everything.select(slots.tolist()))
        self.seen += len(examples)
        return (slots >= held).nonzero().flatten()

    def sample(
        self, count: int, rows: Tensor | None = None, chances: Tensor | None = None
    ) -> Tensor:
        """Different rows, drawn by lot, alike in all processes.

        Args:
            count: How many; all there are, if fewer.
            rows: Which ones to draw from; None: all.
            chances: How likely each row of the memory is to be drawn first, [N] above 0 in
                proportion; each further one likewise among those that are left. None: all alike.
        """
        if chances is not None:
            assert rows is None, "chances are given for the whole memory"
            count = min(count, len(self))
            return torch.multinomial(chances, count, generator=self.generator)
        among = len(self) if rows is None else len(rows)
        drawn = torch.randperm(among, generator=self.generator)[:count]
        return drawn if rows is None else rows[drawn]

    def draw(self, run: Run, count: int) -> Batch:
        """A batch of `count` different examples (all there are, if fewer), on the run's device.

        Of several processes, which hold the same memory, each gets its share.
        """
        return run.shared_batch(self.columns, self.sample(count).numpy())

    def rows_of_task(self, task: int) -> Tensor:
        """The rows that hold examples of a task."""
        return torch.from_numpy(np.flatnonzero(self.columns.numbers["task_id"] == task))

    def state_dict(self) -> dict[str, Any]:
        """The examples as an Arrow stream, their notes, what was seen, and the random state."""
        return {
            "arrow": None if self._examples is None else to_bytes(self._examples.data.table),
            "seen": self.seen,
            "generator": self.generator.get_state(),
            "notes": dict(self.notes),
            "keys": self._keys,
            "bars": {str(group): bar for group, bar in self._bars.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        from datasets import Dataset

        self.seen = state["seen"]
        self.generator.set_state(state["generator"])
        self.notes = {name: note.clone() for name, note in state["notes"].items()}
        self._keys = state["keys"]
        self._bars = {int(group): bar for group, bar in state["bars"].items()}
        if state["arrow"] is not None:
            self._keep(Dataset(from_bytes(state["arrow"])))

    def _chosen(self, everything: Dataset, held: int, keys: Tensor) -> list[int]:
        """Which rows stay, of those held and those that arrive after them."""
        arriving = len(everything) - held
        kept = held if self.budget == "per_task" else 0  # these rows are not at stake
        if self.selection == "reservoir":
            seen = self.seen if self.budget == "total" else 0
            slots = reservoir(held - kept, arriving, self.capacity, seen, self.generator)
        else:
            groups = self._groups(everything)[kept:].tolist()
            bars = self._bars if self.budget == "total" else {}
            slots, self._bars = best_of_each(groups, keys[kept:].tolist(), self.capacity, bars)
            if self.capacity < (sharing := len({*groups, *self._bars})):
                log.warning(
                    "the memory's %d places are fewer than the %d %s that share them, so that it "
                    "holds no example of some; make it larger, or choose selection=reservoir",
                    *(self.capacity, sharing, "tasks" if "task" in self.selection else "classes"),
                )
        return list(range(kept)) + [kept + slot for slot in slots]

    def _groups(self, examples: Dataset) -> np.ndarray:
        """Which group each example belongs to [N]."""
        if self.selection == "task_balanced":
            return examples.with_format("arrow")[:]["task_id"].to_numpy()
        return readings.classes(examples)

    def _keys_of(self, run: Run, examples: Dataset) -> Tensor:
        """What `best_of_each` orders arriving examples by: [n] float64, smaller is better."""
        if self.selection in ("class_balanced", "task_balanced"):
            return torch.rand(len(examples), generator=self.generator, dtype=torch.float64)
        if self.selection == "uncertainty":
            return -readings.uncertainty(run, examples).double()
        keys = torch.zeros(len(examples), dtype=torch.float64)
        if self.selection == "herding":
            features = readings.features(run, examples)
            groups = torch.from_numpy(self._groups(examples))
            for group in groups.unique():
                rows = (groups == group).nonzero().flatten()
                keys[rows] = herding(features[rows], self.capacity).double()
        return keys

    def _keep(self, examples: Dataset) -> None:
        self._examples = examples.flatten_indices(keep_in_memory=True)
        self._columns = Columns(self._examples)
