"""The matrix of scores: `matrix[t][i]` is task i after t tasks were trained."""

from __future__ import annotations


def empty_matrix(tasks: int) -> list[list[float | None]]:
    """A matrix of which nothing was evaluated yet.

    Args:
        tasks: T, the number of tasks.

    Returns:
        T + 1 rows, of their own each, of T times None; row 0 is the untrained model's.
    """
    return [[None] * tasks for _ in range(tasks + 1)]
