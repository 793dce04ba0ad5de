"""How measured values are printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and in brackets the smallest and the largest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Median, and in brackets an interval that holds the true median with 95 % confidence.

    Its ends are two of the values, the ranks n/2 ± 0.98·√n (Conover, Practical Nonparametric
    Statistics, 1999, section 3.2): nothing is assumed of how the values are distributed.
    """
    ordered = sorted(values)
    half = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - half))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half) - 1)
    middle = statistics.median(ordered)
    return f"{middle:.{digits}f} ({ordered[low]:.{digits}f} to {ordered[high]:.{digits}f})"
