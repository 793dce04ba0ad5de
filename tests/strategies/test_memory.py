"""The reservoir and the memory around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from clpeft.strategies.memory import Memory
from clpeft.strategies.selection import reservoir
from clpeft.training.state import read_state, write_state

Examples = Callable[..., Any]


def inclusions(portions: list[int], capacity: int, trials: int) -> np.ndarray:
    """How often each example is held in the end, over many reservoirs."""
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros(sum(portions))
    for _ in range(trials):
        kept: list[int] = []
        seen = 0
        for arriving in portions:
            slots = reservoir(len(kept), arriving, capacity, seen, generator)
            # an index names a slot of what was held, or an arriving example
            known = kept + list(range(seen, seen + arriving))
            kept = [known[slot] for slot in slots]
            seen += arriving
        assert len(kept) == len(set(kept)) == min(capacity, seen)
        counts[kept] += 1
    return counts


@pytest.mark.parametrize(
    ("portions", "capacity"), [([50], 10), ([20, 20, 10], 10), ([1] * 12, 5), ([8, 30], 8)]
)
def test_every_example_is_kept_with_probability_capacity_over_seen(
    portions: list[int], capacity: int
) -> None:
    trials, total = 3000, sum(portions)
    counts = inclusions(portions, capacity, trials)
    p = capacity / total

    # Σ (O − E)² / (E (1 − p)), whose terms add up to a constant, is χ² with total − 1 degrees of
    # freedom times total / (total − 1)
    statistic = ((counts - trials * p) ** 2).sum() / (trials * p * (1 - p))
    statistic *= (total - 1) / total
    # the seed is fixed; one right reservoir in a thousand would fail with another
    assert stats.chi2.sf(statistic, total - 1) > 0.001


def test_number_seen_includes_the_arriving_example() -> None:
    # one place, one example seen before: the second takes its place with probability 1/2, not 1
    counts = inclusions([1, 1], capacity=1, trials=2000)

    # binomial: standard deviation √(2000/4) = 22
    assert abs(counts[1] - 1000) < 3 * 22.4


def test_free_places_are_filled_first() -> None:
    generator = torch.Generator().manual_seed(0)

    assert reservoir(0, 3, 5, 0, generator) == [0, 1, 2]
    assert reservoir(3, 2, 5, 3, generator) == [0, 1, 2, 3, 4]


def identities(memory: Memory) -> list[tuple[int, int]]:
    examples = memory.examples
    assert examples is not None
    return list(zip(examples["task_id"], examples["example_id"], strict=True))


def test_each_example_is_kept_once(bigrams: Examples, examples: Examples) -> None:
    run, memory = bigrams(20), Memory(100, torch.Generator().manual_seed(0))
    for task in range(2):
        memory.add(run, examples([[i, task] for i in range(6)], task=task))

    assert memory.seen == 12
    assert sorted(identities(memory)) == [(task, i) for task in range(2) for i in range(6)]


def test_contents_belong_to_their_examples(bigrams: Examples, examples: Examples) -> None:
    run, memory = bigrams(20), Memory(7, torch.Generator().manual_seed(0))
    for task in range(3):
        rows = [[10 * task + i] * (i + 1) for i in range(10)]
        memory.add(run, examples(rows, labels=[i % 4 for i in range(10)], task=task))
    kept = memory.examples

    assert kept is not None
    assert len(kept) == 7
    for row in kept:
        i, task = row["example_id"], row["task_id"]
        assert row["input_ids"] == [10 * task + i] * (i + 1)
        assert row["label"] == i % 4


def test_draw_has_no_example_twice(bigrams: Callable[..., Any], examples: Examples) -> None:
    run, memory = bigrams(20), Memory(10, torch.Generator().manual_seed(0))
    memory.add(run, examples([[i, i] for i in range(10)], prompt_length=1))

    drawn = [memory.draw(run, 4).example_ids.tolist() for _ in range(30)]

    assert all(len(set(ids)) == 4 for ids in drawn)
    assert {i for ids in drawn for i in ids} == set(range(10))
    assert len({tuple(ids) for ids in drawn}) > 20  # drawn anew each time
    assert sorted(memory.draw(run, 100).example_ids.tolist()) == list(range(10))


def test_drawn_batch_is_padded_anew(bigrams: Callable[..., Any], examples: Examples) -> None:
    run, memory = bigrams(20), Memory(10, torch.Generator().manual_seed(0))
    memory.add(run, examples([[5, 6, 7, 8], [5, 9]], prompt_length=1))

    batch = memory.draw(run, 2)
    short = batch.example_ids.tolist().index(1)

    assert batch.inputs["input_ids"][short].tolist() == [5, 9, 0, 0]
    assert batch.inputs["attention_mask"][short].tolist() == [1, 1, 0, 0]
    assert batch.labels[short].tolist() == [-100, 9, -100, -100]


def test_state_goes_through_the_disk_bit_by_bit(
    bigrams: Callable[..., Any], examples: Examples, tmp_path: Path
) -> None:
    run, memory = bigrams(200), Memory(8, torch.Generator().manual_seed(3))
    memory.add(run, examples([[i] * (1 + i % 3) for i in range(30)], prompt_length=1))
    memory.draw(run, 3)
    write_state(tmp_path / "state", memory.state_dict())
    other = Memory(8, torch.Generator().manual_seed(99))
    other.load_state_dict(read_state(tmp_path / "state"))

    assert other.seen == 30
    assert torch.equal(other.generator.get_state(), memory.generator.get_state())
    assert other.examples.to_dict() == memory.examples.to_dict()  # type: ignore[union-attr]
    assert other.examples.features == memory.examples.features  # type: ignore[union-attr]
    for one, two in ((memory.draw(run, 3), other.draw(run, 3)) for _ in range(3)):
        assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"])
    for each in (memory, other):
        each.add(run, examples([[i] for i in range(100, 140)], prompt_length=1, task=1))
    assert identities(memory) == identities(other)
    assert other.examples.to_dict() == memory.examples.to_dict()  # type: ignore[union-attr]


def test_empty_state_goes_through_the_disk(tmp_path: Path) -> None:
    write_state(tmp_path / "state", Memory(8, torch.Generator().manual_seed(3)).state_dict())
    other = Memory(8, torch.Generator().manual_seed(3))
    other.load_state_dict(read_state(tmp_path / "state"))

    assert len(other) == 0
    assert other.seen == 0
