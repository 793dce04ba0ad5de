"""The whole report: the page's contents, its files, and what the command prints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clpeft.config import ConfigError
from clpeft.reports import report_on, write_report
from clpeft.reports.aggregate import leaderboards
from clpeft.reports.html import environment_table, render_html
from clpeft.reports.runs import collect_runs

WriteRun = Callable[..., Path]
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """The cells of every table row, the pictures, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.classes: dict[tuple[str, str], str] = {}  # (first cell, cell) -> class of the cell
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.cell: str | None = None
        self.cell_class = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell, self.cell_class = "", given.get("class") or ""
        if tag == "img":
            self.sources.append(given["src"] or "")
        if tag == "a":
            self.links.append(given["href"] or "")
        if given.get("id"):
            self.ids.append(given["id"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th") and self.cell is not None:
            text = " ".join(self.cell.split())
            self.rows[-1].append(text)
            self.classes[self.rows[-1][0], text] = self.cell_class
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell += data


def render(*directories: Path) -> str:
    """The page without its pictures, which take seconds to draw."""
    collection = collect_runs(directories)
    boards = leaderboards(collection.runs)
    return render_html(collection, boards, {board.slug: [] for board in boards})


def test_the_page(sweep: Path) -> None:
    text = render(sweep)
    page = Page(text)
    assert page.open == []
    assert [
        "replay",
        "0.750 ± 0.124",
        # per seed (.9 + .85 + .8) / 3, (.9 + .8 + .75) / 3, (.9 + .8 + .7) / 3
        "0.822 ± 0.063",
        "0.900 ± 0.000",
        "-0.225 ± 0.186",
        "0.225 ± 0.186",
        "0.000 ± 0.000",
        # seed 0: (.06 + .02 − .02) / 3, seed 1: 0
        "0.010 ± 0.127 (n=2)",
        # per task (R[3][i] − .25) / .65: (.45 + .55) / 1.3, (.35 + .5) / 1.3, (.25 + .45) / 1.3
        "0.654 ± 0.287",
        "3",
    ] in page.rows
    assert page.classes["replay", "0.750 ± 0.124"] == "number best"
    assert page.classes["joint (reference)", "0.900"] == "number"
    order = [row[0] for row in page.rows if row[0] in {"ewc", "finetune", "replay"}]
    assert order[:3] == ["replay", "ewc", "finetune"]
    # differences, ratio, seconds, memory and state
    assert [
        "replay",
        "finetune",
        "+0.225 ± 0.318 (n=2)",
        "+0.033 ± 0.424 (n=2)",
        "-0.287 ± 0.159 (n=2)",
        "2.00 ×",
        "5",
        "61.0 s",
        "5.0 s",
        "3.0 MiB",
        "2.0 MiB",
        "5.9 KiB",
        "2.0 KiB",
        "10,000",
    ] in page.rows
    assert [
        "replay",
        "intransigence",
        "seed 2: no completed independent run of the same setting and seed",
    ] in page.rows
    assert any(row[:2] == ["joint", "learning accuracy"] for row in page.rows)
    assert (
        "replay: average accuracy 0.750 ± 0.124 (mean ± half width of the 95 % interval, "
        "Student&#39;s t, n = 3 seeds) on toy, domain-incremental, tiny_llama, clpeft" in text
    )


def test_the_page_lists_what_has_no_result(sweep: Path) -> None:
    (sweep / "aside").mkdir()
    (sweep / "aside" / "results.json").write_text("{")
    text = render(sweep)
    page = Page(text)
    failed = next(row for row in page.rows if row[0] == "failed")
    assert failed[1:5] == ["olora", "0", "RuntimeError: singular <matrix>", "node7"]
    running = next(row for row in page.rows if row[0] == "running")
    assert running[5] == "2025-01-02 03:04 UTC"
    assert re.search(r"aside/results\.json</code> is not valid JSON", text)
    assert "9 completed runs" in text
    assert "3 without a result" in text


def test_the_page_needs_nothing_beside_it(sweep: Path) -> None:
    path = write_report([sweep])
    assert path == sweep / "report" / "report.html"
    text = path.read_text()
    page = Page(text)
    assert len(page.sources) == 8
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    assert "<script" not in text
    assert "<link" not in text
    assert "url(" not in text
    assert "http" not in text
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_what_was_read_is_escaped(tmp_path: Path, write_run: WriteRun) -> None:
    evil = "<script>alert(1)</script>"
    write_run(["ewc"], 0, [[0.2], [0.8]], tasks=[evil], stream="s", model=evil, name="n")
    text = render(tmp_path)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_settings_that_differ_are_told_as_overrides(sweep: Path) -> None:
    page = Page(render(sweep))
    assert ["ewc", "strategies.ewc.lambda_=100.0"] in page.rows
    assert ["replay", "strategies.replay.memory=20"] in page.rows


def test_environment(sweep: Path) -> None:
    path = next(sweep.glob("toy/ewc-*")) / "results.json"
    results = json.loads(path.read_text())
    results["environment"] = {"torch": "2.13.0", "git_commit": "0ther"}
    path.write_text(json.dumps(results))
    assert environment_table(collect_runs([sweep]).runs) == [
        ("device", "cpu (runs: 8)"),
        ("git_commit", "c0ffee1 (runs: 8), 0ther (runs: 1)"),
        ("host", "node7"),
        ("torch", "2.13.0"),
    ]


def test_every_file_is_written_where_it_is_asked_for(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(["ewc"], 0, [[0.2], [0.8]])
    out = tmp_path / "elsewhere" / "deep"
    assert write_report([tmp_path / "sweep"], out) == out / "report.html"
    assert sorted(path.name for path in out.iterdir()) == [
        "figures",
        "leaderboard.csv",
        "leaderboard.tex",
        "report.html",
        "runs.csv",
    ]
    assert not (tmp_path / "sweep" / "report").exists()


def test_a_second_report_does_not_read_the_first(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(["ewc"], 0, [[0.2], [0.8]])
    text = write_report([tmp_path]).read_text()
    (tmp_path / "report" / "results.json").write_text("{")
    again = write_report([tmp_path]).read_text()
    minute = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC, clpeft")
    assert minute.sub("", again) == minute.sub("", text)


@pytest.mark.parametrize(("others", "marked"), [(False, True), (True, False)])
def test_who_is_told_the_task_is_marked_where_not_all_are(
    tmp_path: Path, write_run: WriteRun, others: bool, marked: bool
) -> None:
    write_run(["a"], 0, [[0.2], [0.8]], evaluation={"mode": "rank", "task_id_given": others})
    write_run(["b"], 0, [[0.2], [0.7]], evaluation={"mode": "rank", "task_id_given": True})
    names = {row[0] for row in Page(render(tmp_path)).rows}
    assert ("b †" in names) is marked
    assert "a †" not in names


def test_equal_test_sets_need_no_micro_average(tmp_path: Path, write_run: WriteRun) -> None:
    matrix = [[0.2, 0.2], [0.8, 0.2], [0.6, 0.9]]
    write_run(["ewc"], 0, matrix, test_sizes=[100, 100])
    write_run(["ewc"], 1, matrix, test_sizes=[300, 100])
    page = Page(render(tmp_path))
    heads = [row for row in page.rows if row[0] == "strategy" and row[-1] == "seeds"]
    assert sorted("average accuracy, micro ↑" in head for head in heads) == [False, True]
    # (.6 · 300 + .9 · 100) / 400
    assert any(row[0] == "ewc" and "0.675" in row for row in page.rows)


def test_only_failures_still_make_a_report(
    tmp_path: Path, write_status: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    write_status("ewc-s0-00000000", status="failed", exception="ValueError: bad")
    assert report_on([tmp_path]) == 0
    assert "ValueError: bad" in capsys.readouterr().out
    assert "ValueError: bad" in (tmp_path / "report" / "report.html").read_text()


def test_the_command_prints_the_leaderboard_and_where_the_page_is(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(["ewc"], 0, [[0.2], [0.8125]])
    assert report_on([tmp_path]) == 0
    text = capsys.readouterr().out
    assert "0.812" in text
    assert text.splitlines()[-1] == f"Report: {tmp_path / 'report' / 'report.html'}"


def test_a_mistake_is_one_sentence_and_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_on([tmp_path / "no"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"clpeft: There is no directory '{tmp_path / 'no'}' to report on.\n"
    with pytest.raises(ConfigError):
        write_report([tmp_path / "no"])


def test_run_directories_are_left_as_they_are(
    tmp_path: Path, sweep: Path, write_status: WriteRun
) -> None:
    queued = write_status("lora-s0-0", status="queued", job_id="81_3")
    killed = write_status("lora-s1-0", status="running", host="node7", process=9)
    (killed / ".lock").touch()

    def state() -> dict[Path, tuple[int, int]]:
        paths = sweep.rglob("*")
        return {p: (p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in paths}

    before = state()
    assert report_on([sweep], tmp_path / "elsewhere") == 0
    assert report_on([queued]) == 0  # of one run: beside it
    report = {p for p in state() if "lora-s0-0-report" in p.parts}
    assert (queued.parent / "lora-s0-0-report" / "report.html") in report
    changed = {p for p in state() if state()[p] != before.get(p)} - report
    assert changed <= {queued.parent}
