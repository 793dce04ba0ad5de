"""What the documentation shows works as it is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from clpeft import evidence
from clpeft.capabilities import capability_table
from clpeft.registry import PEFT_METHODS, STRATEGIES
from clpeft.strategies.base import Evidence

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_added_strategy_runs(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    code = blocks("docs/add_a_strategy.md", "python")
    (preset,) = blocks("docs/add_a_strategy.md", "yaml")
    package = tmp_path / "package"
    metadata = package / "leash-1.0.dist-info"
    metadata.mkdir(parents=True)
    (package / "leash.py").write_text(code[0])
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: leash\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[clpeft.strategies]\nl2 = leash\n")
    (package / "conf" / "strategy").mkdir(parents=True)
    (package / "conf" / "strategy" / "leash.yaml").write_text(preset)
    overrides = [o for o in tiny("finetune") if not o.startswith("strategy=")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "clpeft", *overrides, "strategy=leash"),
            f"hydra.searchpath=[file://{package / 'conf'}]",
            f"paths.output_dir={tmp_path / 'outputs'}",
        ],
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (history,) = (tmp_path / "outputs").rglob("history.jsonl")
    steps = [json.loads(line) for line in history.read_text().splitlines()]
    steps = [step for step in steps if step["event"] == "step"]
    assert all("train/loss/leash" not in step for step in steps if step["task"] == 0)
    terms = [step["train/loss/leash"] for step in steps if step["task"] == 1]
    # it starts where the last task ended, and is then pulled away and back
    assert terms[0] == 0.0
    assert min(terms[1:]) > 0.0
    assert {path.name for path in (history.parent / "checkpoints").iterdir()}
    assert list(yaml.safe_load((history.parent / "config.yaml").read_text())["strategies"]) == [
        "leash"
    ]


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table that begins with a heading, by their first cell."""
    text = (ROOT / page).read_text().split(heading)[1].split("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines()[2:]]
    return {cells[0].strip().strip("`"): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_every_strategy_is_described_as_it_declares_itself() -> None:
    rows = table("docs/strategies.md", "| name | what it does |")
    needs = {entry.name: entry.target.needs_task_id_at_eval for entry in STRATEGIES}

    assert rows.keys() == needs.keys()
    assert {name: cells[-1].strip("*") == "yes" for name, cells in rows.items()} == needs
    references = {entry.name for entry in STRATEGIES if entry.target.is_bound}
    assert {name for name, cells in rows.items() if cells[0].startswith("reference")} == references


def test_every_declared_conflict_is_in_the_docs() -> None:
    told = (ROOT / "docs/strategies.md").read_text().split("## What cannot be combined")[1]
    told = told.split("\n## ")[0]
    for entry in STRATEGIES:
        for other in entry.target.conflicts:
            assert f"`{entry.name}` with `{other}`" in told
        if entry.target.peft_types is not None:
            (row,) = [line for line in told.splitlines() if f"`{entry.name}` with `peft=" in line]
            refused = {kind.name for kind in PEFT_METHODS} - entry.target.peft_types
            assert all(f"peft={name}" in row for name in refused)


def test_table_of_capabilities_is_the_strategies_own() -> None:
    page = (ROOT / "docs/processes.md").read_text()
    told = page.split("<!-- capabilities -->\n")[1].split("<!-- end of capabilities -->")[0]
    assert told.strip() == capability_table()


def test_thresholds_and_kinds_are_those_that_are_judged_by() -> None:
    page = (ROOT / "docs/doctor.md").read_text()
    rows = table("docs/doctor.md", "| kind | judged, task by task |")
    kinds = table("docs/add_a_strategy.md", "| kind | a value that |")

    assert [name.partition("`")[0] for name in rows] == [str(kind) for kind in Evidence]
    assert list(kinds) == [f"Evidence.{kind.name}" for kind in Evidence]
    told = " ".join(rows["penalty"])
    assert f"is above {evidence.TOO_STRONG:g}." in told
    assert f"is below {evidence.TOO_WEAK:.0e},".replace("e-0", "e-") in told
    assert f"no fewer than {evidence.STEPS_FOR_MEDIAN} logged" in page
    assert f'"changed no gradient" by no fewer than {evidence.STEPS_FOR_GRADIENTS} in all' in page
    preset = yaml.safe_load((ROOT / "conf/debug/doctor.yaml").read_text())
    steps, stream = preset["training"]["max_steps"], preset["stream"]
    folded = " ".join(page.split())
    assert f"{steps} steps a task, {stream['max_train']} examples to train and" in folded
    assert f"and {stream['max_test']} to test on, every step logged." in folded
