"""The reservoir and the memory around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from clpeft.strategies.memory import BUDGETS, SELECTIONS, Memory
from clpeft.strategies.selection import reservoir
from clpeft.training.state import read_state, write_state
from tests.stepping import as_processes

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


# Every selection under both budgets.

KINDS = [(selection, budget) for selection in SELECTIONS for budget in BUDGETS]


@pytest.fixture
def knowing(bigrams: Callable[..., Any]) -> Callable[..., Any]:
    """A run whose model is unsure of some tokens and has features of its own for each."""

    def make(seed: int = 0) -> Any:
        run = bigrams(60)
        generator = torch.Generator().manual_seed(seed)
        run.model.table.data = 3 * torch.randn(60, 60, generator=generator)
        embedding = torch.randn(60, 4, generator=generator)

        def features(model: Any, batch: Any) -> torch.Tensor:
            # of the prompt, which is the first token
            return embedding[batch.inputs["input_ids"][:, 0]]

        run.objective.features = features
        run.embedding = embedding
        return run

    return make


def a_task(examples: Examples, task: int, size: int = 30, classes: int = 3) -> Any:
    """Examples whose tokens tell which they are, unequally many of each class."""
    rows = [[(7 * i + task) % 60, i % 60, (i * i) % 60][: 2 + i % 2] for i in range(size)]
    labels = [min(i % (classes + 2), classes - 1) for i in range(size)]
    return examples(rows, labels=labels, prompt_length=1, task=task)


def fill(memory: Memory, run: Any, examples: Examples, tasks: int = 3) -> list[list[int]]:
    """Shows tasks to a memory and notes each example's name beside it; what was held after each."""
    held = []
    for task in range(tasks):
        before = len(memory)
        rows = memory.add(run, a_task(examples, task))
        names = torch.tensor([1000 * (t + 1) + i for t, i in identities(memory)])
        if "name" not in memory.notes:
            assert before == 0
            memory.notes["name"] = torch.zeros(len(memory), dtype=torch.int64)
        # those that are new, and only those, are to be filled
        empty = (memory.notes["name"] == 0).nonzero().flatten()
        assert sorted(rows.tolist()) == empty.tolist()
        assert set(memory.columns.numbers["task_id"][rows.numpy()].tolist()) <= {task}
        memory.notes["name"][rows] = names[rows]
        assert torch.equal(memory.notes["name"], names)  # the others kept theirs
        assert [int(row) for row in memory.rows_of_task(task)] == sorted(rows.tolist())
        held.append(names.tolist())
    return held


@pytest.mark.parametrize(("selection", "budget"), KINDS)
def test_size_and_notes_of_every_memory(
    knowing: Callable[..., Any], examples: Examples, selection: str, budget: str
) -> None:
    memory = Memory(11, torch.Generator().manual_seed(1), selection=selection, budget=budget)
    held = fill(memory, knowing(), examples)

    assert memory.seen == 90
    assert [len(names) for names in held] == ([11] * 3 if budget == "total" else [11, 22, 33])
    for earlier, later in pairwise(held):
        new = {name for name in later if name // 1000 > max(earlier) // 1000}
        if budget == "total":
            # it gave examples up, and none came back
            assert set(later) - new < set(earlier)
            assert new
        else:
            assert later[: len(earlier)] == earlier
            assert len(new) == 11
    assert len(set(held[-1])) == len(held[-1])
    contents_match(memory, examples)


def test_reservoir_of_each_task_begins_anew(
    bigrams: Callable[..., Any], examples: Examples
) -> None:
    run, kept = bigrams(20), 0
    for seed in range(150):
        memory = Memory(1, torch.Generator().manual_seed(seed), budget="per_task")
        memory.add(run, examples([[i % 20] for i in range(50)]))
        memory.add(run, examples([[1], [2]], task=1))
        kept += identities(memory)[1][1]
    # one of two, whatever was seen of the first task; standard deviation 6
    assert abs(kept - 75) < 3 * 6.2


def contents_match(memory: Memory, examples: Examples) -> None:
    tasks = [a_task(examples, task) for task in range(3)]
    assert memory.examples is not None
    for row in memory.examples:
        assert row == tasks[row["task_id"]][row["example_id"]]


@pytest.mark.parametrize("selection", ["class_balanced", "herding", "uncertainty"])
def test_classes_are_kept_alike(
    knowing: Callable[..., Any], examples: Examples, selection: str
) -> None:
    memory = Memory(11, torch.Generator().manual_seed(1), selection=selection)
    fill(memory, knowing(), examples)  # the same three classes in every task
    counts = np.bincount(memory.columns.numbers["label"])
    assert sorted(counts) == [3, 4, 4]
    memory.add(knowing(), examples([[1, 2]] * 2, labels=[9, 9], prompt_length=1, task=3))
    assert np.bincount(memory.columns.numbers["label"])[[0, 1, 2, 9]].tolist() == [3, 3, 3, 2]


@pytest.mark.parametrize(
    ("selection", "groups"), [("class_balanced", "6 classes"), ("task_balanced", "3 tasks")]
)
def test_places_too_few_for_all_groups_are_told(
    knowing: Callable[..., Any],
    examples: Examples,
    caplog: pytest.LogCaptureFixture,
    selection: str,
    groups: str,
) -> None:
    """The newest have the places: a task is not trained on without an example of its own."""
    memory = Memory(2, torch.Generator().manual_seed(1), selection=selection)
    for task in range(3):
        rows = [[1, 2]] * 8
        labels = [2 * task, 2 * task + 1] * 4
        memory.add(knowing(), examples(rows, labels=labels, prompt_length=1, task=task))
    held = memory.columns.numbers["task_id" if groups == "3 tasks" else "label"]
    assert sorted(held) == ([1, 2] if groups == "3 tasks" else [4, 5])
    assert f"the memory's 2 places are fewer than the {groups} that share them" in caplog.text

    caplog.clear()
    roomy = Memory(6, torch.Generator().manual_seed(1), selection=selection)
    fill(roomy, knowing(), examples)
    assert not caplog.text


def test_tasks_are_kept_alike(knowing: Callable[..., Any], examples: Examples) -> None:
    memory = Memory(11, torch.Generator().manual_seed(1), selection="task_balanced")
    fill(memory, knowing(), examples)
    assert sorted(np.bincount(memory.columns.numbers["task_id"])) == [3, 4, 4]


def test_per_task_balance_is_within_each_task(
    knowing: Callable[..., Any], examples: Examples
) -> None:
    memory = Memory(
        9, torch.Generator().manual_seed(1), selection="class_balanced", budget="per_task"
    )
    fill(memory, knowing(), examples)
    pairs = zip(*(memory.columns.numbers[name] for name in ("task_id", "label")), strict=True)
    tally = Counter(pairs)
    assert set(tally.values()) == {3}
    assert len(tally) == 9


def test_most_uncertain_of_each_class_are_kept(
    knowing: Callable[..., Any], examples: Examples
) -> None:
    run, memory = knowing(), Memory(9, torch.Generator(), selection="uncertainty")
    everything = []
    for task in range(2):
        shown = a_task(examples, task)
        scores = torch.log_softmax(run.model.table.detach().double(), dim=1)
        doubt = -(scores.exp() * scores).sum(dim=1)
        for row in shown:
            # the mean over what foretells the answer: every token but the last
            value = float(doubt[row["input_ids"][:-1]].mean())
            everything.append((row["label"], value, (task, row["example_id"])))
        memory.add(run, shown)
        # what the model thinks of them later plays no part
        run.model.table.data.zero_()
    expected = [
        name
        for label in range(3)
        for _, name in sorted(((-v, n) for k, v, n in everything if k == label))[:3]
    ]
    assert sorted(identities(memory)) == sorted(expected)


def test_herded_examples_of_each_class_are_kept_from_the_first(
    knowing: Callable[..., Any], examples: Examples
) -> None:
    run, memory = knowing(), Memory(12, torch.Generator(), selection="herding")
    order: dict[tuple[int, int], list[int]] = {}
    for task in range(3):
        shown = a_task(examples, task)
        labels = np.array(shown["label"])
        for label in range(3):
            own = np.flatnonzero(labels == label)
            firsts = [row[0] for row in shown.select(own)["input_ids"]]
            order[task, label] = own[greedily(run.embedding[firsts].double(), 12)].tolist()
        memory.add(run, shown)
        assert len(memory) == 12
        # of each task and class the beginning of the order, and no more of one task than of
        # another but for a remainder
        kept: dict[tuple[int, int], list[int]] = {}
        pairs = zip(identities(memory), memory.columns.numbers["label"].tolist(), strict=True)
        for (of, example), label in pairs:
            kept.setdefault((of, label), []).append(example)
        for key, found in kept.items():
            assert sorted(found) == sorted(order[key][: len(found)])
        for label in range(3):
            numbers = [len(kept.get((of, label), [])) for of in range(task + 1)]
            assert sum(numbers) == 4
            assert max(numbers) - min(numbers) <= 1


def greedily(features: torch.Tensor, count: int) -> list[int]:
    """The order in which the mean of the chosen comes nearest to the mean of all."""
    rows = features / features.norm(dim=1, keepdim=True)
    order: list[int] = []
    while len(order) < min(count, len(rows)):
        left = [i for i in range(len(rows)) if i not in order]
        means = torch.stack([rows[[*order, i]].mean(dim=0) for i in left])
        order.append(left[int((means - rows.mean(dim=0)).norm(dim=1).argmin())])
    return order


@pytest.mark.parametrize(("selection", "budget"), KINDS)
def test_all_processes_hold_the_same(
    knowing: Callable[..., Any], examples: Examples, selection: str, budget: str
) -> None:
    def work(run: Any) -> tuple[Memory, list[list[int]]]:
        memory = Memory(11, torch.Generator().manual_seed(1), selection=selection, budget=budget)
        fill(memory, run, examples)
        return memory, [memory.draw(run, 5).example_ids.tolist() for _ in range(3)]

    ((alone, drawn),) = as_processes([knowing()], work)
    pair = as_processes([knowing(), knowing()], work)
    for memory, _ in pair:
        assert identities(memory) == identities(alone)
        assert torch.equal(memory._keys, alone._keys)
    # each has its share of what one process draws
    for whole, first, second in zip(drawn, pair[0][1], pair[1][1], strict=True):
        assert (first, second) == (whole[::2], whole[1::2])


@pytest.mark.parametrize(("selection", "budget"), KINDS)
def test_state_goes_through_the_disk_bit_by_bit(
    knowing: Callable[..., Any], examples: Examples, tmp_path: Path, selection: str, budget: str
) -> None:
    def made(seed: int) -> Memory:
        return Memory(8, torch.Generator().manual_seed(seed), selection=selection, budget=budget)

    run, memory = knowing(), made(3)
    fill(memory, run, examples, tasks=2)
    memory.notes["wide"] = torch.rand(len(memory), 2, 3, dtype=torch.float64)
    memory.draw(run, 3)
    write_state(tmp_path / "state", memory.state_dict())
    other = made(99)
    other.load_state_dict(read_state(tmp_path / "state"))

    assert other.seen == 60
    assert torch.equal(other.generator.get_state(), memory.generator.get_state())
    assert other.examples.to_dict() == memory.examples.to_dict()  # type: ignore[union-attr]
    assert other.examples.features == memory.examples.features  # type: ignore[union-attr]
    assert other.num_bytes == memory.num_bytes
    assert other._bars == memory._bars
    for one, two in ((memory.draw(run, 3), other.draw(run, 3)) for _ in range(3)):
        assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"])
    for each in (memory, other):
        for task in (2, 3):  # twice: what was given up decides too
            each.add(run, a_task(examples, task))
    assert identities(memory) == identities(other)
    assert other.examples.to_dict() == memory.examples.to_dict()  # type: ignore[union-attr]
    assert other.notes.keys() == memory.notes.keys() == {"name", "wide"}
    for name, note in memory.notes.items():
        assert torch.equal(other.notes[name], note)
        assert other.notes[name].dtype == note.dtype


def test_state_is_a_copy(knowing: Callable[..., Any], examples: Examples) -> None:
    """What a memory does after it took back a state leaves the state as it was."""
    run, memory = knowing(), Memory(8, torch.Generator())
    fill(memory, run, examples, tasks=1)
    state = memory.state_dict()
    names = state["notes"]["name"].clone()
    other = Memory(8, torch.Generator())
    other.load_state_dict(state)
    other.notes["name"].zero_()
    assert torch.equal(state["notes"]["name"], names)


def test_bytes_by_hand(bigrams: Callable[..., Any], examples: Examples) -> None:
    run, memory = bigrams(20), Memory(3, torch.Generator(), budget="per_task")
    assert memory.num_bytes == 0
    memory.add(run, examples([[1, 2, 3], [4], [5, 6]], prompt_length=1))
    # six tokens of 4 bytes; per example an offset of 4, three numbers of 8 and one of 4
    assert memory.num_bytes == 6 * 4 + 3 * (4 + 3 * 8 + 4)
    memory.notes["logits"] = torch.zeros(3, 5)
    assert memory.num_bytes == 6 * 4 + 3 * (4 + 3 * 8 + 4) + 3 * 5 * 4
    # the second task's are added to them: of a thousand three are kept, and no more than they take
    memory.add(run, examples([[7, 8]] * 1000, prompt_length=1, task=1))
    assert memory.num_bytes == 12 * 4 + 6 * (4 + 3 * 8 + 4) + 6 * 5 * 4


def test_rows_to_draw_from(knowing: Callable[..., Any], examples: Examples) -> None:
    memory = Memory(8, torch.Generator().manual_seed(0), budget="per_task")
    fill(memory, knowing(), examples)
    rows = memory.rows_of_task(1)
    drawn = [memory.sample(4, rows).tolist() for _ in range(30)]

    assert rows.tolist() == list(range(8, 16))
    assert all(len(set(found)) == 4 for found in drawn)
    assert {row for found in drawn for row in found} == set(rows.tolist())
    assert sorted(memory.sample(99, rows).tolist()) == rows.tolist()


@pytest.mark.parametrize(("selection", "budget"), KINDS)
def test_task_of_which_nothing_is_admitted(
    knowing: Callable[..., Any], examples: Examples, tmp_path: Path, selection: str, budget: str
) -> None:
    run = knowing()
    memory = Memory(8, torch.Generator().manual_seed(0), selection=selection, budget=budget)
    nothing = a_task(examples, 0).select(range(0))
    assert memory.add(run, nothing).tolist() == []
    write_state(tmp_path / "state", memory.state_dict())
    memory = Memory(8, torch.Generator().manual_seed(0), selection=selection, budget=budget)
    memory.load_state_dict(read_state(tmp_path / "state"))
    assert len(memory) == memory.num_bytes == 0
    memory.add(run, a_task(examples, 1))
    held = identities(memory)
    assert memory.add(run, nothing).tolist() == []
    assert identities(memory) == held
    assert len(held) == 8


def test_empty_state_goes_through_the_disk(tmp_path: Path) -> None:
    write_state(tmp_path / "state", Memory(8, torch.Generator().manual_seed(3)).state_dict())
    other = Memory(8, torch.Generator().manual_seed(3))
    other.load_state_dict(read_state(tmp_path / "state"))

    assert len(other) == 0
    assert other.seen == 0
