"""Leaderboards on the console, letter by letter."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from clpeft.reports.aggregate import leaderboards
from clpeft.reports.console import print_leaderboards
from clpeft.reports.runs import collect_runs

WriteRun = Callable[..., Path]


def on_console(directory: Path, width: int, *, costs: bool = False) -> str:
    stream = StringIO()
    console = Console(file=stream, width=width, color_system=None)
    collection = collect_runs([directory])
    print_leaderboards(leaderboards(collection.runs), collection, console, costs=costs)
    return stream.getvalue()


def test_console(sweep: Path) -> None:
    (sweep / "aside").mkdir()
    (sweep / "aside" / "results.json").write_text("{")
    text = on_console(sweep, 90)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "toy, domain-incremental, tiny_llama"
    told = [line.split() for line in lines]
    replay = next(words for words in told if words[:1] == ["replay"])
    assert " ".join(replay) == (
        "replay 0.750 ± 0.124 0.900 ± 0.000 0.225 ± 0.186 +0.225 ± 0.318 (n=2) 3"
    )
    names = [
        words[0] for words in told if words and words[0] in "replay ewc finetune joint".split()
    ]
    assert names == ["joint", "replay", "ewc", "finetune"]
    assert any("RuntimeError: singular <matrix>" in line for line in lines)
    assert "aside/results.json is not valid JSON" in " ".join(text.split())


@pytest.mark.parametrize("width", [60, 70, 80, 99, 200])
def test_console_keeps_within_its_width_and_loses_no_number(sweep: Path, width: int) -> None:
    text = on_console(sweep, width)
    assert max(map(len, text.splitlines())) <= min(width, 98)
    replay = next(line for line in text.splitlines() if line.startswith("replay "))
    assert "0.750 ± 0.124" in replay
    assert "0.225 ± 0.186" in replay
    assert replay.rstrip().endswith(" 3")


def test_markup_in_names_is_printed_not_obeyed(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(["a[red]b[/]"], 0, [[0.2], [0.8]], stream="s[bold]", name="n")
    assert "a[red]b[/]" in on_console(tmp_path, 90)
    assert "s[bold]" in on_console(tmp_path, 90)


def test_costs_are_printed_on_request(sweep: Path) -> None:
    told = [" ".join(line.split()) for line in on_console(sweep, 98, costs=True).splitlines()]
    below = told[told.index("toy, domain-incremental, tiny_llama: costs") :]

    assert below[1] == "strategy step training strategy evaluation peak memory kept"
    # seconds of three runs: 60, 61 and 62; twice those of finetune a step; the largest peak; and
    # nobody measured what it does around its tasks
    assert "replay 2.00 × 61.0 s – 5.0 s 3.0 MiB 2.0 KiB" in below
    assert below[below.index("replay 2.00 × 61.0 s – 5.0 s 3.0 MiB 2.0 KiB") - 1].startswith("──")
    assert any(line.startswith("finetune – ") for line in below)
    assert not any(line.endswith(": costs") for line in on_console(sweep, 98).splitlines())
