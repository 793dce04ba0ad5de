"""Draws of rows, with every label in proportion."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def sample_rows(labels: np.ndarray | None, size: int, rows: int, seed: Iterable[int]) -> np.ndarray:
    """A seeded choice of rows, as balanced over labels as the rows allow.

    Rows are shuffled within their label and dealt out one label after another, so that a smaller
    sample is the beginning of a larger one.

    Args:
        labels: [rows] label of each row, or None where there are none.
        size: How many rows to choose, at most `rows`.
        rows: How many there are.
        seed: What the choice depends on.

    Returns:
        [size] row numbers.
    """
    draw = np.random.default_rng(list(seed)).random(rows)
    if labels is None:
        return np.argsort(draw, kind="stable")[:size]
    return np.lexsort((draw, rank_within(labels, draw)))[:size]


def rank_within(labels: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """The rank of each row's draw among the rows of its label: [rows], from 0."""
    by_label = np.lexsort((draw, labels))
    counts = np.unique(labels, return_counts=True)[1]
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_label] = np.concatenate([np.arange(count) for count in counts])
    return ranks
