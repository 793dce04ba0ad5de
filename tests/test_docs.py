"""What the documentation shows works as it is written."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from clpeft import evidence
from clpeft.capabilities import capability_table
from clpeft.catalogue import catalogue
from clpeft.combinations import table as combinations
from clpeft.models.architectures import target_table
from clpeft.models.own import ABILITIES
from clpeft.peft_methods.any import AnySettings
from clpeft.peft_methods.base import PEFT_TASK_TYPES
from clpeft.registry import PEFT_METHODS, STRATEGIES
from clpeft.strategies.base import Evidence
from tests.running import compose
from tests.settings import TINY

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def installed(package: Path, name: str, code: str, points: str) -> dict[str, str]:
    """The environment of processes that a package of one module is installed for."""
    metadata = package / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (package / f"{name}.py").write_text(code)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(points)
    return os.environ | {"PYTHONPATH": str(package)}


def launched(overrides: list[str], package: Path, outputs: Path) -> Path:
    """The run directory of a command given while a package of somebody's is installed."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "clpeft", *overrides),
            f"hydra.searchpath=[file://{package / 'conf'}]",
            f"paths.output_dir={outputs}",
        ],
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (history,) = outputs.rglob("history.jsonl")
    return history.parent


def packaged(package: Path, group: str, name: str, code: str, preset: str) -> None:
    """Lays a module and its preset out as an installed package does, with an entry point."""
    kind = {"strategy": "clpeft.strategies", "peft": "clpeft.peft_methods"}[group]
    installed(package, name, code, f"[{kind}]\n{name} = {name}\n")
    (package / "conf" / group).mkdir(parents=True)
    (package / "conf" / group / f"{name}.yaml").write_text(preset)


def test_added_strategy_runs(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    code = blocks("docs/add_a_strategy.md", "python")
    (preset,) = blocks("docs/add_a_strategy.md", "yaml")
    packaged(tmp_path / "package", "strategy", "leash", code[0], preset)
    overrides = [o for o in tiny("finetune") if not o.startswith("strategy=")]
    run = launched([*overrides, "strategy=leash"], tmp_path / "package", tmp_path / "outputs")

    steps = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["event"] == "step"]
    assert all("train/loss/leash" not in step for step in steps if step["task"] == 0)
    terms = [step["train/loss/leash"] for step in steps if step["task"] == 1]
    # it starts where the last task ended, and is then pulled away and back
    assert terms[0] == 0.0
    assert min(terms[1:]) > 0.0
    assert {path.name for path in (run / "checkpoints").iterdir()}
    assert list(yaml.safe_load((run / "config.yaml").read_text())["strategies"]) == ["leash"]


def test_peft_method_that_peft_has_is_one_yaml(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    preset, _ = blocks("docs/peft_methods.md", "yaml")
    (tmp_path / "conf" / "peft").mkdir(parents=True)
    (tmp_path / "conf" / "peft" / "loha.yaml").write_text(preset)
    chosen = ["peft=loha", "peft.options.r=4", "stream.num_tasks=2"]
    overrides = [o for o in tiny("finetune") if not o.startswith("peft.")]
    run = launched([*overrides, *chosen], tmp_path, tmp_path / "outputs")

    results = json.loads((run / "results.json").read_text())
    # hidden size 32, feed-forward size 64, two layers: two products of rank 4 for four matrices of
    # 32 · 32 and three of 32 · 64
    assert results["peft"] == "loha"
    assert results["parameters"]["trainable"] == 2 * 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    for folder in sorted((run / "adapters").iterdir()):
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert (saved["peft_type"], saved["r"], saved["alpha"]) == ("LOHA", 4, 16)


def test_added_peft_method_runs(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    (code,) = blocks("docs/peft_methods.md", "python")
    _, preset = blocks("docs/peft_methods.md", "yaml")
    packaged(tmp_path / "package", "peft", "lora_fa", code, preset)
    chosen = ["peft=lora_fa", "peft.r=4", "stream.num_tasks=2"]
    overrides = [o for o in tiny("finetune") if not o.startswith("peft.")]
    run = launched([*overrides, *chosen], tmp_path / "package", tmp_path / "outputs")

    results = json.loads((run / "results.json").read_text())
    # B of rank 4: by outputs, five times 32 and twice 64 in each of two layers
    assert results["peft"] == "lora_fa"
    assert results["parameters"]["trainable"] == 2 * 4 * (5 * 32 + 2 * 64)
    first, second = (
        load_file(folder / "adapter_model.safetensors")
        for folder in sorted((run / "adapters").iterdir())
    )
    assert {name for name in first if torch.equal(first[name], second[name])} == {
        name for name in first if "lora_A" in name
    }


def test_a_model_of_one_s_own_runs(cache_dir: Path, tmp_path: Path) -> None:
    (code,) = blocks("docs/your_own_model.md", "python")
    (project,) = blocks("docs/your_own_model.md", "toml")
    # as an installer writes it of the project's file
    (point,) = re.findall(r"^(\w+ = )\"(\w+)\"$", project, re.MULTILINE)
    points = f"[clpeft.models]\n{''.join(point)}\n"
    environment = installed(tmp_path / "package", "small_gpt", code, points)
    command = (sys.executable, "-m", "clpeft")
    tiny = [o for o in TINY if not o.startswith("peft.target=")]
    done = subprocess.run(
        [
            *(*command, *tiny, "model=small_gpt", "peft.target=[w_q,w_v]", "stream.num_tasks=2"),
            *(f"paths.cache_dir={cache_dir}", f"paths.output_dir={tmp_path / 'outputs'}"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (told,) = (tmp_path / "outputs").rglob("2_*/adapter_config.json")
    assert sorted(json.loads(told.read_text())["target_modules"]) == ["w_q", "w_v"]
    shown = subprocess.run(
        [*command, "list", "model"], env=environment, capture_output=True, text=True, check=True
    )
    assert "model=small_gpt\tFrom another package: small_gpt" in shown.stdout


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


def test_every_peft_method_is_described_as_it_declares_itself() -> None:
    rows = table("docs/peft_methods.md", "| `peft=` | what it is |")
    assert rows.keys() == {option.name for option in catalogue()["peft"]}
    for name, (_, _, own, kinds, quantized) in rows.items():
        if name == "any":
            continue
        model = "tiny_bert" if name == "frozen" else "tiny_llama"
        config = compose([f"peft={name}", f"model={model}"])[1].peft
        told = {"all": frozenset(PEFT_TASK_TYPES), "classifiers": {"sequence_classification"}}
        assert config.task_types == told[kinds]
        assert config.supports_quantized == (quantized == "yes")
        known = {field.name for field in dataclasses.fields(config)}
        if PEFT_METHODS[config.method].config is AnySettings:
            known = {f"options.{option}" for option in config.options}
            assert set(re.findall(r"`(.+?)`", own)) <= known
        else:
            assert set(re.findall(r"`(.+?)`", own)) == known - {"method", "target"}


def test_every_declared_conflict_is_in_the_docs() -> None:
    told = (ROOT / "docs/strategies.md").read_text().split("## What cannot be combined")[1]
    told = told.split("\n## ")[0]
    for entry in STRATEGIES:
        for other in entry.target.conflicts:
            assert f"`{entry.name}` with `{other}`" in told
        if entry.target.peft_types is not None:
            known = " or ".join(f"`{kind}`" for kind in sorted(entry.target.peft_types))
            assert f"`{entry.name}` with `peft=` other than {known}" in told
    for method in PEFT_METHODS:
        for strategy, reason in method.config.conflicts.items():
            assert f"| `{strategy}` with `peft={method.name}` | {reason} |" in told


def test_table_of_combinations_is_what_compositions_say() -> None:
    page = (ROOT / "docs/combinations.md").read_text()

    assert "\n".join(combinations()) in page


def test_table_of_capabilities_is_the_strategies_own() -> None:
    page = (ROOT / "docs/processes.md").read_text()
    told = page.split("<!-- capabilities -->\n")[1].split("<!-- end of capabilities -->")[0]
    assert told.strip() == capability_table()


def test_table_of_target_modules_is_the_models_own() -> None:
    page = (ROOT / "docs/target_modules.md").read_text()
    told = page.split("<!-- target modules -->\n")[1].split("<!-- end of target modules -->")[0]
    assert told.strip() == target_table()


def test_what_a_model_of_one_s_own_may_be_able_to_do() -> None:
    rows = table("docs/your_own_model.md", "| ability | what it is | what asks for it |")
    assert list(rows) == list(ABILITIES)


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
