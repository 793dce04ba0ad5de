"""The whole report: reads runs, writes page, pictures and tables, prints the leaderboards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from clpeft.config import ConfigError
from clpeft.reports.aggregate import RANKED_BY, Leaderboard, leaderboards
from clpeft.reports.console import print_leaderboards
from clpeft.reports.html import render_html
from clpeft.reports.presets import write_presets
from clpeft.reports.runs import RESULTS, STATUS, Collection, collect_runs
from clpeft.reports.selection import SPLIT, print_winners, select
from clpeft.reports.tables import write_latex, write_leaderboard_csv, write_runs_csv

PAGE = "report.html"
DIRECTORY = "report"  # below the first directory reported on, unless another is given


def report_on(
    directories: Sequence[Path],
    out: Path | None = None,
    *,
    split: str | None = None,
    metric: str = RANKED_BY,
    presets: Path | None = None,
    costs: bool = False,
) -> int:
    """`clpeft report`: prints the leaderboards and writes the report.

    Args:
        directories: Run or sweep directories, or any above them.
        out: Where to write it; `<first directory>/report` by default, or beside it where that is a
            run's own directory.
        split: `validation` to choose each strategy's best setting; None for no choice.
        metric: By which it is chosen.
        presets: Where to write the chosen settings as presets; None for nowhere.
        costs: Whether what the strategies cost is printed too; it is in the page in any case.

    Returns:
        The exit code: 1 after a mistake in what was asked for, told in one sentence.
    """
    try:
        if split not in (None, SPLIT):
            raise ConfigError(
                f"--select {split}: settings are chosen by validation scores only, with "
                f"--select {SPLIT}."
            )
        if presets is not None and split is None:
            raise ConfigError(f"--presets writes what was chosen: add --select {SPLIT}.")
        collection = collect_runs(directories, exclude=_place(directories, out))
        boards = leaderboards(collection.runs)
        winners = [] if split is None else select(boards, metric)
        written = [] if presets is None else write_presets(winners, metric, presets)
    except ConfigError as error:
        Console(stderr=True).print(f"clpeft: {error}", markup=False, soft_wrap=True)
        return 1
    console = Console()
    print_leaderboards(boards, collection, console, costs=costs)
    if winners:
        print_winners(winners, metric, console)
    for path in written:
        console.print(f"Preset: {path}", markup=False, highlight=False, soft_wrap=True)
    page = _write(collection, boards, _place(directories, out))
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0


def write_report(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report on some runs: one HTML page, its figures, two CSV files, a LaTeX file.

    Args:
        directories: Run or sweep directories, or any above them.
        out: Where to write it; see `report_on`. Never read as runs.

    Returns:
        The HTML page.

    Raises:
        ConfigError: If a directory does not exist or holds no run.
    """
    place = _place(directories, out)
    collection = collect_runs(directories, exclude=place)
    return _write(collection, leaderboards(collection.runs), place)


def _place(directories: Sequence[Path], out: Path | None) -> Path:
    if out is not None:
        return Path(out)
    first = Path(directories[0])
    if any((first / name).exists() for name in (RESULTS, STATUS)):  # a run's own: left as it is
        return first.resolve().with_name(f"{first.resolve().name}-{DIRECTORY}")
    return first / DIRECTORY


def _write(collection: Collection, boards: Sequence[Leaderboard], out: Path) -> Path:
    # drawing needs matplotlib, which the leaderboards on the console should not wait for
    from clpeft.reports.figures import save_figures, strategy_styles

    out.mkdir(parents=True, exist_ok=True)
    styles = strategy_styles(boards)
    figures = {board.slug: save_figures(board, styles, out / "figures") for board in boards}
    write_leaderboard_csv(boards, out / "leaderboard.csv")
    write_runs_csv(boards, out / "runs.csv")
    write_latex(boards, out / "leaderboard.tex")
    page = out / PAGE
    page.write_text(render_html(collection, boards, figures), encoding="utf-8")
    return page
