"""Numbers and sentences as all reports write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clpeft.reports.aggregate import leaderboards
from clpeft.reports.runs import collect_runs
from clpeft.reports.wording import how_to_cite, human_bytes, human_seconds

WriteRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**41, "2048.0 GiB")],
)
def test_human_bytes(value: float, text: str) -> None:
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.25, "1.2 s"), (99.9, "99.9 s"), (270, "4.5 min"), (24120, "6.7 h")]
)
def test_human_seconds(value: float, text: str) -> None:
    assert human_seconds(value) == text


def test_how_to_cite(sweep: Path, tmp_path: Path, write_run: WriteRun) -> None:
    (board,) = leaderboards(collect_runs([sweep]).runs)
    assert how_to_cite(board) == (
        "replay: average accuracy 0.750 ± 0.124 (mean ± half width of the 95 % interval, "
        "Student's t, n = 3 seeds) on toy, domain-incremental, tiny_llama"
    )
    write_run(["ewc"], 0, [[0.2], [0.8]], stream="x", where="x")
    write_run(["joint"], 0, [[0.2], [0.9]], stream="y", where="x")
    one, none = leaderboards(collect_runs([tmp_path / "x"]).runs)
    assert "0.800 (one seed, so nothing is known" in how_to_cite(one)
    assert how_to_cite(none) == ""
