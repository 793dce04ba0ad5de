"""Which examples are too much like others: by their words, and by what a model makes of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# odd, with its bits well mixed: 2⁶⁴ divided by the golden ratio (Knuth 1973, volume 3, 6.4)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_ROUNDING = 1e-9  # of a product of a threshold and a count


def ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """The different n-grams of a text, as sorted hashes [m] uint64; a shorter text is one gram.

    Two different n-grams share a hash of 64 bits with a chance of about 5 in 10²⁰.

    Args:
        tokens: Token ids [L].
        n: Tokens per gram.
    """
    size = min(n, len(tokens))
    if not size:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), size)
    keys = np.full(len(windows), size, dtype=np.uint64)
    for column in windows.T:
        keys = (keys ^ (column + np.uint64(1))) * _MULTIPLIER
        keys ^= keys >> np.uint64(29)
    return np.unique(keys)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted sets; 0 where both are empty."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - shared
    return shared / union if union else 0.0


def near_duplicates(
    sets: Sequence[np.ndarray], threshold: float, beside: Sequence[np.ndarray] = ()
) -> list[int]:
    """Which sets have a Jaccard similarity of `threshold` or more to one that stays before them.

    Exact, without comparing all pairs: two sets that are so alike share one of their few rarest
    elements, so that only sets found by those are compared. The cost is linear in the number of
    elements as long as rare elements are rare; at worst, where all sets hold the same, quadratic in
    the number of sets that stay.

    Args:
        sets: Sorted, each element once.
        threshold: More than 0, to 1.
        beside: Sets that stay in any case and come before all others.

    Returns:
        The places of those that do not stay, ascending.

    Source: Bayardo et al. 2007, Scaling Up All Pairs Similarity Search; the prefixes after
        Chaudhuri et al. 2006, A Primitive Operator for Similarity Joins in Data Cleaning.
    """
    everything = [*beside, *sets]
    if not everything:
        return []
    elements, counts = np.unique(np.concatenate(everything), return_counts=True)
    rarity = np.argsort(np.argsort(counts, kind="stable"), kind="stable")
    stays: dict[int, list[int]] = defaultdict(list)  # by an element of its prefix
    dropped = []
    for place, own in enumerate(everything):
        ranks = np.sort(rarity[np.searchsorted(elements, own)])
        prefix = ranks[: len(own) - math.ceil(threshold * len(own) - _ROUNDING) + 1].tolist()
        near = {other for rank in prefix for other in stays.get(rank, ())}
        if place >= len(beside) and any(
            jaccard(own, everything[other]) >= threshold - _ROUNDING for other in near
        ):
            dropped.append(place - len(beside))
            continue
        for rank in prefix:
            stays[rank].append(place)
    return dropped


def too_close(features: Tensor, distance: float, beside: Tensor | None = None) -> list[int]:
    """Which examples are nearer than a cosine distance to one that stays before them.

    Every example is compared with all that stay: N² products of D numbers at worst.

    Args:
        features: One row per example [N, D].
        distance: 1 − cosine, from 0 to 2.
        beside: Features of examples that stay in any case and come before [M, D].

    Returns:
        The places of those that do not stay, ascending.
    """
    given = features if beside is None else torch.cat([beside, features])
    unit = torch.nn.functional.normalize(given.double(), dim=1)
    first = len(given) - len(features)
    stays = torch.zeros(len(given), dtype=torch.bool)
    stays[:first] = True
    dropped = []
    for place in range(first, len(given)):
        nearest = (unit[:place][stays[:place]] @ unit[place]).max() if stays.any() else -math.inf
        if 1 - nearest < distance:
            dropped.append(place - first)
        else:
            stays[place] = True
    return dropped
