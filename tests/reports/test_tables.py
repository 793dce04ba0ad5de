"""CSV cells and LaTeX text, letter by letter."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from clpeft.reports.aggregate import leaderboards
from clpeft.reports.runs import collect_runs
from clpeft.reports.tables import (
    escape_latex,
    latex_table,
    write_latex,
    write_leaderboard_csv,
    write_runs_csv,
)

WriteRun = Callable[..., Path]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_leaderboard_csv(sweep: Path, tmp_path: Path) -> None:
    boards = leaderboards(collect_runs([sweep]).runs)
    write_leaderboard_csv(boards, tmp_path / "l.csv")
    lines = {line["strategy"]: line for line in read(tmp_path / "l.csv")}
    assert list(lines) == ["independent", "joint", "replay", "ewc", "finetune"]
    replay = lines["replay"]
    assert (replay["rank"], replay["n"], replay["seeds"]) == ("1", "3", "0 1 2")
    assert (replay["bound"], lines["joint"]["bound"]) == ("false", "true")
    assert lines["joint"]["rank"] == ""
    assert float(replay["average_accuracy"]) == pytest.approx(0.75)
    assert float(replay["average_accuracy_half_width"]) == pytest.approx(0.124207, rel=1e-5)
    assert float(replay["average_accuracy_vs_baseline"]) == pytest.approx(0.225)
    assert float(replay["average_accuracy_vs_baseline_half_width"]) == pytest.approx(
        0.317655, rel=1e-5
    )
    assert replay["average_accuracy_vs_baseline_n"] == "2"
    assert replay["intransigence_n"] == "2"
    assert float(replay["step_ratio"]) == pytest.approx(2.0)
    assert float(replay["state_bytes"]) == 2048
    assert float(replay["trained_bytes"]) == 40_000
    assert float(replay["adapter_bytes"]) == 6000
    assert replay["baseline"] == "finetune"
    # undefined is empty, and one seed has no interval
    assert lines["joint"]["forgetting"] == ""
    assert float(lines["ewc"]["average_accuracy"]) == pytest.approx(0.6)
    assert lines["ewc"]["average_accuracy_half_width"] == ""
    assert lines["finetune"]["average_accuracy_vs_baseline"] == ""
    assert lines["finetune"]["order"] == ""


def test_runs_csv(sweep: Path, tmp_path: Path, write_run: WriteRun) -> None:
    config = {"optimizer": {"name": "adamw", "lr": 0.5}}
    write_run(["ewc"], 4, [[0.25] * 3, *[[0.5] * 3] * 3], config=config, where="other")
    boards = leaderboards(collect_runs([sweep, tmp_path / "other"]).runs)
    write_runs_csv(boards, tmp_path / "r.csv")
    lines = {(line["strategies"], line["seed"]): line for line in read(tmp_path / "r.csv")}
    assert len(lines) == 10
    finetune = lines["finetune", "1"]
    assert float(finetune["average_accuracy"]) == pytest.approx(0.5)
    assert float(finetune["forgetting"]) == pytest.approx(0.5)
    assert float(finetune["intransigence"]) == pytest.approx(0.2 / 3)
    assert finetune["seconds_per_step"] == "0.2"
    assert finetune["config.optimizer.lr"] == "0.001"
    assert lines["ewc", "4"]["config.optimizer.lr"] == "0.5"
    assert lines["ewc", "4"]["strategy"] == "ewc (lr=0.5)"
    assert lines["replay", "2"]["intransigence"] == ""
    assert Path(finetune["directory"]).name == finetune["name"]
    # what all share is left out
    assert "config.peft.r" not in finetune


def test_latex(sweep: Path) -> None:
    (board,) = leaderboards(collect_runs([sweep]).runs)
    assert latex_table(board) == (
        r"""\begin{table}[t]
\centering
\caption{toy, domain-incremental, tiny\_llama.}
\label{tab:toy-domain-incremental-tiny-llama}
\begin{tabular}{lccccr}
\toprule
Strategy & Average accuracy $\uparrow$ & Learning accuracy $\uparrow$ & Forgetting $\downarrow$"""
        r""" & Forward transfer $\uparrow$ & $n$ \\
\midrule
independent & $0.910 \pm 0.127$ & $0.910 \pm 0.127$ & $0.000 \pm 0.000$ & -- & 2 \\
joint & $0.900$ & -- & -- & -- & 1 \\
\midrule
replay & $\mathbf{0.750 \pm 0.124}$ & $\mathbf{0.900 \pm 0.000}$ & $0.225 \pm 0.186$"""
        r""" & $0.000 \pm 0.000$ & 3 \\
ewc & $0.600$ & $0.700$ & $\mathbf{0.150}$ & $0.000$ & 1 \\
finetune & $0.550 \pm 0.635$ & $0.867 \pm 0.424$ & $0.475 \pm 0.318$"""
        r""" & $\mathbf{0.075 \pm 0.000}$ & 2 \\
\bottomrule
\end{tabular}
\end{table}
"""
    )


def test_latex_marks_a_mean_over_fewer_seeds(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(["ewc"], 0, [[0.2, 0.2], [0.8, 0.2], [0.7, 0.7]])
    write_run(["ewc"], 1, [[0.2, 0.2], [0.8, 0.2], [None, 0.7]])
    (board,) = leaderboards(collect_runs([tmp_path]).runs)
    assert r"ewc & $0.700$ {\scriptsize ($n=1$)} & $0.750 \pm 0.000$ &" in latex_table(board)


def test_latex_file_holds_every_leaderboard(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(["ewc"], 0, [[0.2], [0.8]])
    write_run(["ewc"], 1, [[0.2], [0.8]], stream="other")
    write_latex(leaderboards(collect_runs([tmp_path]).runs), tmp_path / "t.tex")
    text = (tmp_path / "t.tex").read_text()
    assert text.startswith("% Needs \\usepackage{booktabs}.")
    assert text.count(r"\begin{table}") == text.count(r"\bottomrule") == 2


def test_escape_latex() -> None:
    assert escape_latex(r"a_b {50%} \x ~^ #&$ <") == (
        r"a\_b \{50\%\} \textbackslash{}x \textasciitilde{}\textasciicircum{} \#\&\$ \textless{}"
    )
