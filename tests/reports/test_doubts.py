"""What a report says of results that are doubtful."""

from __future__ import annotations

import csv
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clpeft.reports.aggregate import leaderboards
from clpeft.reports.console import print_leaderboards
from clpeft.reports.doubts import Doubt, doubts_of
from clpeft.reports.html import render_html
from clpeft.reports.runs import collect_runs
from clpeft.reports.tables import write_runs_csv
from clpeft.reports.wording import seeds_text
from tests.reports.conftest import MATRICES

WriteRun = Callable[..., Path]
MATRIX = MATRICES["finetune", 0]
OTHER = MATRICES["finetune", 1]


def digests(weights: str, name: str, seed: int = 0) -> dict[str, str]:
    """Of a run: every strategy a family, and all in one setting."""
    run = f"{name}{seed}"
    return {"run": run, "family": name, "setting": "same", "weights": weights}


def stayed_0(strategy: str, value: float = 0.0) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "verdict": "does nothing",
        "what": f"loss/{strategy}",
        "tasks": ["goods", "weather"],
        "numbers": [value],
        "text": f"{strategy} does nothing <{value}>.",
        "advice": "Raise it.",
    }


def doubts(*directories: Path) -> list[Doubt]:
    (board,) = leaderboards(collect_runs(directories).runs)
    return doubts_of(board)


def test_warnings_are_gathered_over_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        found = [stayed_0("ewc", seed / 10)] if seed != 1 else []
        write_run(["ewc"], seed, MATRIX, warnings=found)
    assert doubts(tmp_path) == [Doubt("ewc", (0, 2), "ewc does nothing <0.0>. Raise it.")]


def test_different_findings_stay_apart(write_run: WriteRun, tmp_path: Path) -> None:
    strong = {**stayed_0("ewc"), "verdict": "too strong"}
    write_run(["ewc", "si"], 0, MATRIX, warnings=[stayed_0("ewc"), strong, stayed_0("si")])
    assert [doubt.label for doubt in doubts(tmp_path)] == ["ewc+si"] * 3


def test_runs_that_equal_finetune_are_found(write_run: WriteRun, tmp_path: Path) -> None:
    # whatever each knew when it ended
    for seed, weights, matrix in ((0, "one", MATRIX), (1, "two", OTHER)):
        for name in ("ewc", "finetune"):
            write_run([name], seed, matrix, digests=digests(weights, name, seed))
    (doubt,) = doubts(tmp_path)
    assert (doubt.label, doubt.seeds) == ("ewc", (0, 1))
    assert doubt.text.startswith("ewc does nothing: the run has the weights and scores of finetune")
    assert "(finetune-s0-" in doubt.text


def test_what_a_run_found_itself_is_not_said_twice(write_run: WriteRun, tmp_path: Path) -> None:
    found = {**stayed_0("ewc"), "what": "weights", "text": "ewc equals finetune."}
    write_run(["ewc"], 0, MATRIX, digests=digests("one", "ewc"), warnings=[found])
    write_run(["finetune"], 0, MATRIX, digests=digests("one", "finetune"))
    assert [doubt.seeds for doubt in doubts(tmp_path)] == [(0,)]


@pytest.mark.parametrize(
    ("weights", "seed", "matrix"),
    [("another", 0, MATRIX), ("one", 1, MATRIX), ("one", 0, OTHER)],
    ids=["weights", "seed", "scores"],
)
def test_runs_that_differ_are_not_doubted(
    write_run: WriteRun, tmp_path: Path, weights: str, seed: int, matrix: Any
) -> None:
    write_run(["ewc"], 0, MATRIX, digests=digests("one", "ewc"))
    write_run(["finetune"], seed, matrix, digests=digests(weights, "finetune", seed))
    assert doubts(tmp_path) == []


def test_part_that_changes_nothing_beside_others(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(["ewc", "replay"], 0, MATRIX, digests=digests("one", "both"))
    write_run(["replay"], 0, MATRIX, digests=digests("one", "replay"))
    write_run(["ewc"], 0, MATRIX, digests=digests("two", "ewc"))
    # of two methods that are equal neither is the other's lack
    write_run(["si"], 0, MATRIX, digests=digests("two", "si"))
    (doubt,) = doubts(tmp_path)
    assert doubt.label == "ewc+replay"
    assert doubt.text.startswith("ewc does nothing: the run has the weights and scores of replay")


def test_one_task_makes_nothing_doubtful(write_run: WriteRun, tmp_path: Path) -> None:
    for name in ("ewc", "finetune"):
        write_run([name], 0, [[0.25], [0.9]], digests=digests("one", name))
    assert doubts(tmp_path) == []


def test_results_of_earlier_versions_are_not_doubted(write_run: WriteRun, tmp_path: Path) -> None:
    # equal scores are no equal weights
    for name in ("ewc", "finetune"):
        write_run([name], 0, MATRIX)
    assert doubts(tmp_path) == []


def test_warnings_that_are_none_are_noted(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, damaged in enumerate(("all well", [{"text": 1}], 7)):
        write_run(["ewc"], seed, MATRIX, warnings=damaged)
    collection = collect_runs([tmp_path])
    assert collection.runs == []
    assert all("has warnings that cannot be read" in note.text for note in collection.notes)
    assert len(collection.notes) == 3


def test_rows_are_marked_wherever_they_stand(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(["ewc"], 0, MATRIX, warnings=[stayed_0("ewc")])
    write_run(["replay"], 0, MATRIX, warnings=[])
    collection = collect_runs([tmp_path])
    boards = leaderboards(collection.runs)
    stream = StringIO()
    print_leaderboards(boards, collection, Console(file=stream, width=98))
    told = stream.getvalue()
    assert "\newc ‡ " in told
    assert "‡ ewc, seed 0: ewc does nothing <0.0>. Raise it." in told
    assert "replay ‡" not in told

    page = render_html(collection, boards, {board.slug: [] for board in boards})
    assert '<span title="see the doubts below">‡</span></th>' in page
    assert page.count("‡") == 2  # one row, and what the mark means
    # what was read is escaped
    assert "<li><b>ewc</b>, seed 0: ewc does nothing &lt;0.0&gt;. Raise it.</li>" in page

    write_runs_csv(boards, tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        cells = {line["strategies"]: line["doubts"] for line in csv.DictReader(file)}
    assert cells == {"ewc": "ewc does nothing <0.0>. Raise it.", "replay": ""}


def test_page_without_doubts_does_not_speak_of_them(sweep: Path) -> None:
    collection = collect_runs([sweep])
    boards = leaderboards(collection.runs)
    page = render_html(collection, boards, {board.slug: [] for board in boards})
    assert "Doubts" not in page
    assert "‡" not in page


def test_seeds_as_words() -> None:
    assert seeds_text((3,)) == "seed 3"
    assert seeds_text((0, 2)) == "seeds 0, 2"
