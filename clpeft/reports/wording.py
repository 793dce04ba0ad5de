"""Numbers and seeds as all reports write them."""

from __future__ import annotations

from collections.abc import Sequence

from clpeft.reports.aggregate import Estimate, Leaderboard


def seeds_text(seeds: Sequence[int]) -> str:
    """`seed 0`, or `seeds 0, 1, 2`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def cell_text(estimate: Estimate | None, seeds: int, *, signed: bool = False) -> str:
    """An estimate in a table; says so where it is over fewer seeds than its row."""
    if estimate is None:
        return "–"
    short = f" (n={estimate.n})" if estimate.n != seeds else ""
    return estimate.text(signed=signed) + short


def how_to_cite(board: Leaderboard) -> str:
    """The best strategy's average accuracy as a sentence that can stand in a paper."""
    row = next((row for row in board.contenders if "average_accuracy" in row.metrics), None)
    if row is None:
        return ""
    score = row.metrics["average_accuracy"]
    if score.half_width is None:
        spread = "(one seed, so nothing is known about its spread)"
    else:
        spread = f"(mean ± half width of the 95 % interval, Student's t, n = {score.n} seeds)"
    return f"{row.label}: average accuracy {score.text()} {spread} on {board.title}"


def human_bytes(value: float) -> str:
    """`1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes everything")


def human_seconds(value: float) -> str:
    """`12.3 s`, `4.5 min`, `6.7 h`."""
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"
