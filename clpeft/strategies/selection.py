"""Which examples a memory of limited size holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def reservoir(
    held: int, arriving: int, capacity: int, seen: int, generator: torch.Generator
) -> list[int]:
    """Which examples a reservoir holds after more have arrived; each seen with equal chance.

    Args:
        held: Examples held so far; they have the indices 0 to held - 1.
        arriving: Examples shown now; the k-th has the index held + k.
        capacity: Examples at most.
        seen: How many were shown before these.
        generator: Draws one number per arriving example.

    Returns:
        The indices held afterwards.

    Source: Vitter 1985, Random Sampling with a Reservoir (algorithm R).
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


def equal_shares(sizes: Mapping[int, int], capacity: int) -> dict[int, int]:
    """How many examples each group keeps: all the same number, as far as they have them.

    What a small group leaves over goes to the others; what does not divide, to the groups that
    come last. They are the newest: with fewer places than groups it is the oldest that go.

    Args:
        sizes: Examples per group.
        capacity: Examples at most, over all groups.

    Returns:
        Examples kept per group. With more groups, or larger ones, no other group's number grows.
    """
    shares: dict[int, int] = {}
    left = capacity
    rising = sorted(sizes, key=lambda group: sizes[group])
    for place, group in enumerate(rising):
        waiting = len(rising) - place
        if sizes[group] * waiting > left:
            full = [other for other in sizes if other not in shares]
            for rank, other in enumerate(full):
                shares[other] = left // waiting + (rank >= waiting - left % waiting)
            break
        shares[group] = sizes[group]
        left -= sizes[group]
    return shares


def best_of_each(
    groups: Sequence[int], keys: Sequence[float], capacity: int, bars: Mapping[int, float]
) -> tuple[list[int], dict[int, float]]:
    """Which examples a memory holds that is shared equally by groups.

    Every group keeps those with its smallest keys. With random keys these are a random sample of
    all examples that the group was ever shown, however often its share shrank on the way.

    Args:
        groups: Which group each example belongs to.
        keys: What each example's group prefers; the smaller, the sooner it is kept.
        capacity: Examples at most.
        bars: Per group the smallest key that it ever gave up.

    Returns:
        Indices of those held afterwards, in order, and the new bars.
    """
    bars = dict(bars)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        # what is worse than something given up earlier would not have been kept either; what is as
        # good may be held, where keys are no random numbers but places in an order
        if keys[index] <= bars.get(group, float("inf")):
            members.setdefault(group, []).append(index)
    shares = equal_shares({group: len(rows) for group, rows in members.items()}, capacity)
    held = []
    for group, rows in members.items():
        rows.sort(key=lambda index: keys[index])
        held += rows[: shares[group]]
        if len(rows) > shares[group]:
            bars[group] = keys[rows[shares[group]]]
    return sorted(held), bars


def herding(features: Tensor, count: int) -> Tensor:
    """The order in which examples bring the mean of those chosen nearest to the mean of all.

    Args:
        features: One row per example [N, D]; they are scaled to length 1.
        count: How many are to be put in order, at most.

    Returns:
        The place of each example in the order, from 0; N for those that are left over: [N].

    Source: Welling 2009, Herding Dynamical Weights to Learn; Rebuffi et al. 2017, iCaRL,
        algorithm 4.
    """
    features = torch.nn.functional.normalize(features.double(), dim=1)
    mean = features.mean(dim=0)
    chosen_sum = torch.zeros_like(mean)
    places = torch.full((len(features),), len(features))
    # of ‖μ − (s + f)/k‖² only f's share is compared: all lie on the unit sphere, so that the
    # nearest is the one with the largest f·(kμ − s)
    for place in range(min(count, len(features))):
        gains = features @ ((place + 1) * mean - chosen_sum)
        gains[places < len(features)] = -torch.inf
        best = int(gains.argmax())
        places[best] = place
        chosen_sum += features[best]
    return places


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) over the last dimension, in nats; -inf where none may be."""
    scores = torch.log_softmax(logits, dim=-1)
    return -(scores.exp() * scores.masked_fill(scores == -torch.inf, 0.0)).sum(dim=-1)
