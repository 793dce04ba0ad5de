"""Which examples a memory of limited size holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from clpeft.strategies.selection import best_of_each, entropy, equal_shares, herding

# Shares.


@pytest.mark.parametrize(
    ("sizes", "capacity", "expected"),
    [
        ([5, 5, 5], 9, [3, 3, 3]),
        ([5, 5, 5], 11, [3, 4, 4]),  # what does not divide goes to the last
        ([1, 9, 9], 9, [1, 4, 4]),  # what the first leaves over goes to the others
        ([9, 2, 9, 1], 10, [3, 2, 4, 1]),
        ([2, 3], 9, [2, 3]),  # room for all
        ([4, 4, 4], 2, [0, 1, 1]),  # fewer places than groups: the newest have them
        ([], 5, []),
    ],
)
def test_equal_shares_by_hand(sizes: list[int], capacity: int, expected: list[int]) -> None:
    assert equal_shares(dict(enumerate(sizes)), capacity) == dict(enumerate(expected))


def test_shares_fill_the_memory_and_never_grow_at_anothers_gain() -> None:
    """Of all small cases: what a group has given up it would not have needed later."""
    for capacity, groups in itertools.product(range(1, 8), range(1, 5)):
        for sizes in itertools.product(range(1, 5), repeat=groups):
            shares = equal_shares(dict(enumerate(sizes)), capacity)
            assert sum(shares.values()) == min(capacity, sum(sizes))
            assert all(shares[group] <= size for group, size in enumerate(sizes))
            # as equal as sizes allow: nobody who is cut has less than another, but for a remainder
            cut = [shares[group] for group, size in enumerate(sizes) if shares[group] < size]
            assert not cut or max(shares.values()) <= min(cut) + 1
            for group in range(groups + 1):  # one that is larger by one, or new
                more = dict(enumerate(sizes)) | {group: (*sizes, 0)[group] + 1}
                after = equal_shares(more, capacity)
                assert all(after[g] <= share for g, share in shares.items() if g != group)


# Random samples of each group.


def kept_of_each(
    portions: Sequence[Sequence[int]], capacity: int, trials: int
) -> tuple[np.ndarray, list[int]]:
    """How often each example is held in the end, over many memories; the groups of all examples.

    Args:
        portions: The groups of the examples that arrive together, portion after portion.
        capacity: Of the memory.
        trials: How many memories.
    """
    groups = [group for portion in portions for group in portion]
    counts = np.zeros(len(groups))
    generator = torch.Generator().manual_seed(0)
    for _ in range(trials):
        held: list[int] = []
        keys: dict[int, float] = {}
        bars: dict[int, float] = {}
        shown = 0
        for portion in portions:
            arriving = list(range(shown, shown + len(portion)))
            draws = torch.rand(len(portion), generator=generator, dtype=torch.float64).tolist()
            keys |= dict(zip(arriving, draws, strict=True))
            known = held + arriving
            slots, bars = best_of_each(
                [groups[index] for index in known], [keys[index] for index in known], capacity, bars
            )
            held = [known[slot] for slot in slots]
            shown += len(portion)
        assert len(held) == len(set(held)) == min(capacity, shown)
        counts[held] += 1
    return counts, groups


@pytest.mark.parametrize(
    ("portions", "capacity", "shares"),
    [
        # the first class's share shrinks from all places to half, to a third, to a quarter
        ([[0] * 20, [1] * 20, [2] * 20, [3] * 20], 12, {0: 3, 1: 3, 2: 3, 3: 3}),
        # it comes back in a later task, where the others' number changes too
        ([[0] * 20, [1] * 15, [0, 2] * 8, [0, 1, 2] * 3], 12, {0: 4, 1: 4, 2: 4}),
        # one has fewer examples than its share; what it leaves over does not divide
        ([[0] * 9, [1] * 2, [2] * 9, [0] * 6], 10, {0: 4, 1: 2, 2: 4}),
        # all classes in every task, as in a domain-incremental stream
        ([[0, 1, 2] * 4] * 5, 9, {0: 3, 1: 3, 2: 3}),
    ],
)
def test_every_example_of_a_class_is_kept_with_equal_chance(
    portions: list[list[int]], capacity: int, shares: dict[int, int]
) -> None:
    trials = 2000
    counts, groups = kept_of_each(portions, capacity, trials)
    for group, share in shares.items():
        own = counts[np.array(groups) == group]
        assert own.sum() == trials * share
        if share == len(own):
            continue
        p = share / len(own)
        # as for a reservoir: terms that add up to a constant
        statistic = ((own - trials * p) ** 2).sum() / (trials * p * (1 - p))
        statistic *= (len(own) - 1) / len(own)
        # the seed is fixed; one right memory in a thousand would fail with another
        assert stats.chi2.sf(statistic, len(own) - 1) > 0.001


def test_what_would_not_have_been_kept_earlier_is_not_kept_later() -> None:
    # the class once gave up a key of 0.3: room that comes free later does not change the sample
    held, bars = best_of_each([7, 7, 7], [0.1, 0.5, 0.2], 3, {7: 0.3})
    assert held == [0, 2]
    assert bars == {7: 0.3}


def test_bar_is_the_smallest_key_ever_given_up() -> None:
    held, bars = best_of_each([7, 7, 8, 7], [0.1, 0.5, 0.9, 0.2], 3, {})
    assert held == [0, 2, 3]
    assert bars == {7: 0.5}
    held, bars = best_of_each([7, 8, 7, 8], [0.1, 0.9, 0.2, 0.4], 2, bars)
    assert held == [0, 3]
    assert bars == {7: 0.2, 8: 0.9}


def test_equal_keys_are_not_lost() -> None:
    """Places in two tasks' herded orders are alike; no example is given up for that."""
    held, bars = best_of_each([0] * 5, [0, 1, 2, 5, 5], 3, {})
    assert held == [0, 1, 2]
    # the class comes back: the first of each task, and the second of the one that came first
    held, bars = best_of_each([0] * 8, [0, 1, 2, 0, 1, 2, 5, 5], 3, bars)
    assert held == [0, 1, 3]
    # nothing arrives that it would have to make room for
    held, bars = best_of_each([0, 0, 0], [0, 1, 0], 3, bars)
    assert held == [0, 1, 2]


# Herding.


def greedily(features: Tensor, count: int) -> list[int]:
    """The order of herding from its definition: which next one brings the mean nearest."""
    rows = features / features.norm(dim=1, keepdim=True)
    mean = rows.mean(dim=0)
    order: list[int] = []
    for _ in range(count):
        distances = {
            index: float((mean - rows[[*order, index]].mean(dim=0)).norm())
            for index in range(len(rows))
            if index not in order
        }
        order.append(min(distances, key=lambda index: distances[index]))
    return order


@pytest.mark.parametrize("seed", range(5))
def test_herding_is_the_greedy_choice(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    # of unequal lengths, which must not matter
    features *= torch.rand(12, 1, generator=generator, dtype=torch.float64) * 9 + 0.5
    order = greedily(features, 8)

    places = herding(features, 8)
    assert [places.tolist().index(place) for place in range(8)] == order
    assert sorted(places.tolist()) == [*range(8), *[12] * 4]


def test_shorter_herding_is_the_beginning_of_a_longer_one() -> None:
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    whole = herding(features, 10)
    for count in range(11):
        found = herding(features, count)
        assert torch.equal(found, torch.where(whole < count, whole, 10))
    assert torch.equal(herding(features, 99), whole)


# Entropy.


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), -math.inf, -math.inf]])
    quarters = math.log(4) / 4 + math.log(4 / 3) * 3 / 4
    assert entropy(logits).tolist() == pytest.approx([math.log(4), quarters])
    # a label that does not compete is no source of doubt, nor of a NaN
    assert entropy(torch.tensor([5.0, -math.inf])).item() == 0.0
