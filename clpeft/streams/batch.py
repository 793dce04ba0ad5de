"""A batch of encoded examples, and how two become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# What a loss leaves out; every Hugging Face model knows this number.
IGNORED = -100

# The example id of a row without targets, there only for its process to keep pace with others.
NO_EXAMPLE = -(2**63)


@dataclass(frozen=True)
class Part:
    """Rows of a batch that its task loss leaves out: a strategy's, which gives a term for them.

    Args:
        rows: Which ones.
        num_targets: What a mean over their targets is taken over: examples, or tokens that are to
            be predicted.
        num_examples: How many of them have targets: all, unless they stand in for a share that has
            none.
        notes: What the term is computed from beside the model's outputs, by name; one row [...] for
            each of theirs.
    """

    rows: slice
    num_targets: int
    num_examples: int
    notes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Batch:
    """Examples of one step, padded to the longest of them.

    Args:
        inputs: What the model's forward takes, without labels: `input_ids`, `attention_mask` and,
            for some tokenizers, `token_type_ids`; each [B, L].
        labels: Classification: [B] global labels. Causal language models: [B, L], aligned with
            `input_ids`, -100 at prompt and padding. Sequence to sequence: [B, La], -100 at
            padding.
        task_ids: [B] int64, the task each example comes from.
        example_ids: [B] int64, the example's row in its task's full split; less than 0 for those
            that a model wrote.
        weights: [B] float32, what each example's loss counts in the task loss, or in the term of
            the part that it is in; None: 1 each. A mean is taken over all targets alike.
        candidates: [B, labels] bool, which of the labels that the scenario lets compete do so for
            an example of a classification head; None: all of them.
        parts: Rows that the task loss leaves out, by the name of their term.

    Attributes:
        rows: Examples of the whole batch, of which several processes have a share each; B where
            there is one process.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    task_ids: Tensor
    example_ids: Tensor
    weights: Tensor | None = None
    candidates: Tensor | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.task_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device; counts its targets before, so that nobody waits for a GPU."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        identities = self.identities
        batch = Batch(
            {name: moved(x) for name, x in self.inputs.items()},
            moved(self.labels),
            moved(self.task_ids),
            moved(self.example_ids),
            None if self.weights is None else moved(self.weights),
            None if self.candidates is None else moved(self.candidates),
            {
                name: replace(part, notes={key: moved(note) for key, note in part.notes.items()})
                for name, part in self.parts.items()
            },
        )
        vars(batch).update(identities=identities, loaded=self.loaded)
        return batch.counted(self.num_targets, self.target_width, self.rows)

    def altered(self, **changes: Any) -> Batch:
        """The batch with other weights or candidates, say; what was counted stays counted."""
        changed = replace(self, **changes)
        vars(changed).update(identities=self.identities, loaded=self.loaded)
        return changed.counted(self.num_targets, self.target_width, self.rows)

    def counted(self, num_targets: int, target_width: int, rows: int) -> Batch:
        """Sets what is known of the batch and need not be counted again; returns it."""
        vars(self).update(num_targets=num_targets, target_width=target_width, rows=rows)
        return self

    @cached_property
    def rows(self) -> int:
        """See the class."""
        return len(self)

    @cached_property
    def loaded(self) -> int:
        """Of `rows`, those that the task's loader gave; the others strategies have added."""
        return self.rows

    @cached_property
    def identities(self) -> list[tuple[int, int]]:
        """The task and the example id of each row, known without asking the device."""
        return list(zip(self.task_ids.tolist(), self.example_ids.tolist(), strict=True))

    @cached_property
    def num_targets(self) -> int:
        """What the task loss is averaged over: examples, or tokens that are to be predicted.

        A causal model predicts nothing at position 0, and no answer begins there, so that the
        shift of the labels leaves the number as it is.
        """
        return int((self.labels[self.own_rows] != IGNORED).sum())

    @cached_property
    def target_width(self) -> int:
        """Columns of the labels from the first that holds a target in any row to the last one."""
        if self.labels.dim() == 1:
            return 0
        used = (self.labels != IGNORED).any(dim=0)
        return used.shape[0] - int(used.int().argmax()) if used.any() else 0

    @cached_property
    def own_rows(self) -> Tensor | slice:
        """The rows of the task loss, those that are in no part."""
        if not self.parts:
            return slice(None)
        own = torch.ones(len(self), dtype=torch.bool)
        for part in self.parts.values():
            own[part.rows] = False
        return own.nonzero().flatten().to(self.labels.device)


def concatenate(batches: Sequence[Batch], pad_token_id: int) -> Batch:
    """One batch of the examples of several, padded to the longest of all.

    Args:
        batches: Batches of one kind of model, on one device; none has a part that another has.
        pad_token_id: What fills `input_ids`; masks and token types are filled with 0, labels with
            -100.

    Returns:
        The examples in the order given; the first batch is the one that others are added to.
    """
    width = max(batch.labels.shape[-1] for batch in batches)
    target_width = max(
        batch.target_width + width - batch.labels.shape[-1] if batch.target_width else 0
        for batch in batches
    )
    together = Batch(
        {
            name: _stack(
                [batch.inputs[name] for batch in batches],
                pad_token_id if name == "input_ids" else 0,
            )
            for name in batches[0].inputs
        },
        _stack([batch.labels for batch in batches], IGNORED),
        torch.cat([batch.task_ids for batch in batches]),
        torch.cat([batch.example_ids for batch in batches]),
        _filled([batch.weights for batch in batches], batches),
        _filled([batch.candidates for batch in batches], batches),
        _parts(batches),
    )
    vars(together).update(
        identities=[pair for batch in batches for pair in batch.identities],
        loaded=batches[0].loaded,
    )
    return together.counted(
        sum(batch.num_targets for batch in batches),
        target_width,
        sum(batch.rows for batch in batches),
    )


def set_aside(batch: Batch, name: str, notes: Mapping[str, Tensor] | None = None) -> Batch:
    """A batch whose rows are all one part: a term of this name takes the place of their loss.

    Args:
        batch: As it was cut; one process's share of the term's examples.
        name: The part's and the term's.
        notes: What the term needs to know of each row.
    """
    examples = len(batch) if batch.num_targets else 0
    part = Part(slice(0, len(batch)), batch.num_targets, examples, notes or {})
    aside = batch.altered(parts={name: part})
    return aside.counted(0, batch.target_width, batch.rows)


def _stack(tensors: Sequence[Tensor], fill: int) -> Tensor:
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    width = max(x.shape[1] for x in tensors)
    padded = [torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill) for x in tensors]
    return torch.cat(padded)


def _filled(given: Sequence[Tensor | None], batches: Sequence[Batch]) -> Tensor | None:
    """Tensors of some batches as one of all; where a batch has none, ones (or True)."""
    known = next((tensor for tensor in given if tensor is not None), None)
    if known is None:
        return None
    return torch.cat(
        [
            known.new_ones(len(batch), *known.shape[1:]) if tensor is None else tensor
            for tensor, batch in zip(given, batches, strict=True)
        ]
    )


def _parts(batches: Sequence[Batch]) -> dict[str, Part]:
    found: dict[str, Part] = {}
    start = 0
    for batch in batches:
        for name, part in batch.parts.items():
            assert name not in found, f"two parts '{name}' in one batch"
            rows = slice(part.rows.start + start, part.rows.stop + start)
            found[name] = replace(part, rows=rows)
        start += len(batch)
    return found
