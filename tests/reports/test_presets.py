"""Chosen settings written as presets, and the sweeps that they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from clpeft.catalogue import catalogue
from clpeft.config import ConfigError, digest, run_name
from clpeft.registry import STRATEGIES
from clpeft.reports.aggregate import leaderboards
from clpeft.reports.presets import write_presets
from clpeft.reports.report import report_on
from clpeft.reports.runs import collect_runs
from clpeft.reports.selection import Winner, select
from clpeft.sweeps import expand
from tests.running import compose
from tests.settings import in_turns

TUNED = [entry.name for entry in STRATEGIES]
COMMAND = "clpeft -m experiment=[standard_cl_minilm,tune/ewc] model.path=/home/me/minilm seed=0"


@pytest.fixture
def winners(tmp_path: Path, write_run: Callable[..., Path]) -> list[Winner]:
    """Of four settings of ewc, by learning rate and strength; .8 is the best."""
    scores = {("1e-3", "1"): 0.5, ("1e-3", "3"): 0.6, ("2e-3", "1"): 0.7, ("2e-3", "3"): 0.8}
    for (lr, strength), score in scores.items():
        given = ["strategy=ewc", f"optimizer.lr={lr}", f"strategies.ewc.lambda_={strength}"]
        (planned,) = expand(["experiment=tune", *given, "stream.max_train=64"])
        config: Any = OmegaConf.to_container(planned.composed, resolve=True)
        write_run(
            ["ewc"],
            0,
            [[0.25, 0.25], [score, None], [score, score]],
            config=config,
            name=run_name(planned.composed),
            digests={
                "run": run_name(planned.composed),
                "family": digest(planned.composed, ("strategies", "optimizer")),
                "setting": "x",
            },
            split="validation",
        )
    runs = collect_runs([tmp_path]).runs
    for run in runs:
        lr = OmegaConf.load(run.directory / "config.yaml").optimizer.lr  # a sweep for each rate
        state = {"status": "completed", "command": f"{COMMAND} optimizer.lr={lr:g}"}
        (run.directory / "status.json").write_text(json.dumps(state))
    return select(leaderboards(runs))


def test_preset_holds_what_was_swept_and_nothing_else(
    winners: list[Winner], tmp_path: Path
) -> None:
    (path,) = write_presets(winners, "average_accuracy", tmp_path / "chosen")

    assert path.name == "ewc.yaml"
    assert yaml.safe_load(path.read_text()) == {
        "defaults": [{"override /strategy": ["ewc"]}, "_self_"],
        "optimizer": {"lr": 0.002},
        "strategies": {"ewc": {"lambda_": 3.0}},
    }


def test_preset_says_what_found_it_but_not_on_which_machine(
    winners: list[Winner], tmp_path: Path
) -> None:
    (path,) = write_presets(winners, "average_accuracy", tmp_path / "chosen")
    header = path.read_text().splitlines()[:6]

    assert header == [
        "# @package _global_",
        "# The settings of ewc chosen on validation data.",
        "# average_accuracy: 0.800 (n = 1), the best of 4, found by:",
        # both sweeps whose settings were compared, and not the winner's alone
        "#   clpeft -m experiment=[standard_cl_minilm,tune/ewc] model.path=<folder> seed=0 "
        "optimizer.lr=0.001",
        "#   clpeft -m experiment=[standard_cl_minilm,tune/ewc] model.path=<folder> seed=0 "
        "optimizer.lr=0.002",
        "# Use: clpeft experiment=chosen/ewc",
    ]


def test_preset_stands_on_the_experiment_its_folder_is_named_for(
    winners: list[Winner], tmp_path: Path
) -> None:
    folder = tmp_path / "presets" / "experiment" / "standard_cl_minilm"
    write_presets(winners, "average_accuracy", folder)

    _, config = compose(
        [f"hydra.searchpath=[file://{tmp_path / 'presets'}]", "experiment=standard_cl_minilm/ewc"]
    )

    assert config.model.name == "minilm"
    assert config.stream.max_train == 1600  # not the 64 of the runs that were compared
    assert config.optimizer.lr == 0.002
    assert config.strategies["ewc"].lambda_ == 3.0
    assert list(config.strategies) == ["ewc"]


def test_several_leaderboards_are_not_mixed(winners: list[Winner], tmp_path: Path) -> None:
    (one,) = winners
    other = Winner(**{**vars(one), "board": "another"})

    with pytest.raises(ConfigError, match="runs are of several boards"):
        write_presets([one, other], "average_accuracy", tmp_path / "chosen")


def test_presets_need_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_on([tmp_path], presets=tmp_path / "chosen") == 1

    assert "--presets writes what was chosen: add --select validation" in capsys.readouterr().err


def test_every_strategy_has_a_sweep() -> None:
    assert {option.name for option in catalogue()["experiment/tune"]} == set(TUNED)


@pytest.mark.parametrize("name", in_turns(TUNED, 1))
def test_sweep_tries_learning_rates_and_the_strategys_own_settings(name: str) -> None:
    planned = expand([f"experiment=tune/{name}"])
    rates = {run.composed.optimizer.lr for run in planned}
    own = {str(run.composed.strategies[name]) + str(run.composed.training) for run in planned}

    default = expand([f"strategy={name}"])[0].composed.optimizer.lr
    assert sorted(rates) == pytest.approx([default / 2, default, default * 2])
    assert {run.composed.seed for run in planned} == {0, 1}
    assert (len(own) > 1) != STRATEGIES[name].target.is_reference
    assert {run.composed.evaluation.split for run in planned} == {"validation"}
    assert all(next(iter(run.composed.strategies)) == name for run in planned)
