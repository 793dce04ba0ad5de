"""Leaderboards as files: CSV for programs, LaTeX for papers."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clpeft.evaluation.metrics import LOWER_IS_BETTER, METRICS
from clpeft.reports.aggregate import Leaderboard, Row
from clpeft.reports.doubts import doubts_of
from clpeft.reports.naming import differing_keys, settings, strategy_name

COSTS = (
    "train_seconds",
    "strategy_seconds",
    "evaluation_seconds",
    "total_seconds",
    "seconds_per_step",
    "steps_per_second",
    "step_ratio",
    "peak_memory_bytes",
    "state_bytes",
    "trained_bytes",
    "adapter_bytes",
    "base_bytes",
)
# what fits across a page or a console; the CSV and the HTML page have every metric
SHORT = {
    "average_accuracy": "average accuracy",
    "learning_accuracy": "learning accuracy",
    "forgetting": "forgetting",
    "forward_transfer": "forward transfer",
}
LATEX_SPECIALS = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
LATEX_HEAD = r"""% Needs \usepackage{booktabs}. Scores are fractions: mean $\pm$ half width of the
% 95 \% interval over n seeds (Student's t). Bold: the best strategy of each column; references,
% above the line, are never best.
"""


def write_leaderboard_csv(boards: Sequence[Leaderboard], path: Path) -> None:
    """One line per family, numbers in full precision; an empty cell is undefined.

    Args:
        boards: The leaderboards, one below the other.
        path: The file to write.
    """
    columns = ["leaderboard", "stream", "order", "scenario", "model", "split", "rank", "strategy"]
    columns += ["strategies", "peft", "bound", "task_id_given", "family", "n", "seeds", "baseline"]
    for name in METRICS:
        columns += [name, f"{name}_half_width", f"{name}_n"]
        columns += [f"{name}_vs_baseline", f"{name}_vs_baseline_half_width"]
        columns += [f"{name}_vs_baseline_n"]
    lines = [_family_cells(board, row) for board in boards for row in board.rows]
    _write_csv(path, [*columns, *COSTS], lines)


def write_runs_csv(boards: Sequence[Leaderboard], path: Path) -> None:
    """One line per completed run: where it lies, its metrics, its costs and what sets it apart.

    Args:
        boards: The leaderboards that hold the runs.
        path: The file to write.
    """
    runs = [run for board in boards for row in board.rows for run in row.runs]
    keys = differing_keys([settings(run) for run in runs])
    lines = []
    for board in boards:
        doubts = doubts_of(board)
        for row in board.rows:
            for run, scores in zip(row.runs, row.scores, strict=True):
                flat = settings(run)
                lines.append(
                    {
                        "leaderboard": board.title,
                        "strategy": row.label,
                        "strategies": strategy_name(run),
                        "seed": run.seed,
                        "name": run.name,
                        "digest": run.digest,
                        "family": run.family,
                        "directory": run.directory,
                        "doubts": " | ".join(
                            doubt.text
                            for doubt in doubts
                            if doubt.label == row.label and run.seed in doubt.seeds
                        ),
                        **scores,
                        **{f"config.{key}": flat.get(key) for key in keys},
                        **{name: run.cost.get(name) for name in COSTS if name in run.cost},
                        "state_bytes": (run.cost.get("state_bytes") or [None])[-1],
                    }
                )
    columns = ["leaderboard", "strategy", "strategies", "seed", "name", "digest", "family"]
    costs = [name for name in COSTS if name != "step_ratio"]
    configs = [f"config.{key}" for key in keys]
    _write_csv(path, [*columns, "directory", *METRICS, *costs, *configs, "doubts"], lines)


def latex_table(board: Leaderboard) -> str:
    """A leaderboard as a booktabs table.

    Args:
        board: The leaderboard.

    Returns:
        A `table` environment: references, a rule, then the strategies, best first, the best of
        each column in bold.
    """
    metrics = [name for name in SHORT if name in board.metrics]
    arrows = {name: "downarrow" if name in LOWER_IS_BETTER else "uparrow" for name in metrics}
    head = [f"{SHORT[name].capitalize()} $\\{arrows[name]}$" for name in metrics]
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{escape_latex(board.title)}.}}",
        rf"\label{{tab:{board.slug}}}",
        rf"\begin{{tabular}}{{l{'c' * len(metrics)}r}}",
        r"\toprule",
        " & ".join(["Strategy", *head, "$n$"]) + r" \\",
        r"\midrule",
        *(_latex_row(row, metrics, {}) for row in board.bounds),
    ]
    if board.bounds and board.contenders:
        lines.append(r"\midrule")
    best = {name: board.best(name) for name in metrics}
    lines += [_latex_row(row, metrics, best) for row in board.contenders]
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def write_latex(boards: Sequence[Leaderboard], path: Path) -> None:
    """Every leaderboard as a LaTeX table, in one file to include."""
    tables = [latex_table(board) for board in boards]
    path.write_text(LATEX_HEAD + "\n" + "\n".join(tables), encoding="utf-8")


def escape_latex(text: str) -> str:
    """Text with every character that LaTeX would read as a command written out."""
    return "".join(LATEX_SPECIALS.get(character, character) for character in text)


def _latex_row(row: Row, metrics: Iterable[str], best: dict[str, set[str]]) -> str:
    cells = [escape_latex(row.label)]
    for name in metrics:
        estimate = row.metrics.get(name)
        if estimate is None:
            cells.append("--")
            continue
        number = estimate.text().replace("±", r"\pm")
        if row.label in best.get(name, ()):
            number = rf"\mathbf{{{number}}}"
        short = rf" {{\scriptsize ($n={estimate.n}$)}}" if estimate.n != len(row.runs) else ""
        cells.append(f"${number}${short}")
    return " & ".join([*cells, str(len(row.runs))]) + r" \\"


def _family_cells(board: Leaderboard, row: Row) -> dict[str, Any]:
    run = row.runs[0]
    cells: dict[str, Any] = {
        "leaderboard": board.title,
        "stream": run.stream,
        "order": run.order,
        "scenario": run.scenario,
        "model": run.model,
        "split": run.split,
        "rank": None if row.bound else board.contenders.index(row) + 1,
        "strategy": row.label,
        "strategies": strategy_name(run),
        "peft": run.peft,
        "bound": str(row.bound).lower(),
        "task_id_given": str(row.task_id_given).lower(),
        "family": run.family,
        "n": len(row.runs),
        "seeds": " ".join(map(str, row.seeds)),
        "baseline": row.baseline,
        **row.cost,
    }
    for estimates, suffix in ((row.metrics, ""), (row.differences, "_vs_baseline")):
        for name, estimate in estimates.items():
            cells[f"{name}{suffix}"] = estimate.mean
            cells[f"{name}{suffix}_half_width"] = estimate.half_width
            cells[f"{name}{suffix}_n"] = estimate.n
    return cells


def _write_csv(path: Path, columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
