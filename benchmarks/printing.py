"""How measured values are printed."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from clpeft.rundir import versions


def out(line: str) -> None:
    """Prints a line as it is, however long."""
    Console(highlight=False, soft_wrap=True, markup=False).print(line)


def machine() -> str:
    """What the numbers were measured on, and with."""
    known = versions()
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        many = "s" if threads > 1 else ""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        where = f"{os.cpu_count()} cores, {threads} thread{many}, {memory:.0f} GiB, {_processor()}"
    packages = ", ".join(f"{name} {known[name]}" for name in ("torch", "transformers", "peft"))
    return f"{where}, {packages}"


def _processor() -> str:
    """Its name where the system tells it, and its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join([*names[:1], platform.machine()])


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
