"""Sweeps: what they stand for, what is told of them at their end, and what stops them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from clpeft import cli, launching
from clpeft.config import ConfigError
from clpeft.sweeps import expand

# What a sweep stands for.


def started(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Path, dict[str, Any]]]:
    """The run directories and configs with which `clpeft -m` starts runs."""
    seen: list[tuple[Path, Any]] = []

    def launch(composed: DictConfig, directory: Path) -> None:
        seen.append((directory, OmegaConf.to_container(composed, resolve=True)))

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["clpeft", "-m", *overrides])
    with pytest.raises(SystemExit):
        cli.main()
    return seen


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["strategy=finetune,[ewc,replay]", "seed=0,1", "strategies.replay.ratio=0.5"], 0),
        (["strategy=finetune,[ewc,replay]", "seed=0,1"], 4),
        (["strategy=glob(*,exclude=[e*,j*])", "seed=range(3,5)"], 12),
        (["experiment=tune", "strategy=ewc", "strategies.ewc.lambda_=1,3.5,1e2"], 3),
        (["seed=7", "hydra.sweep.dir=here", "hydra.sweep.subdir=run-${hydra:job.num}"], 1),
        (["optimizer.lr=1e-3,2e-3", "hydra.sweep.subdir=${hydra:job.override_dirname}"], 2),
        (["hydra.searchpath=[presets]", "experiment=swept", "optimizer=adamw,sgd"], 4),
        (["seed=1,2,3", "hydra.sweeper.max_batch_size=2", "paths.output_dir=${seed}/of"], 3),
    ],
)
def test_expand_gives_the_runs_of_a_real_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], count: int
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = tmp_path / "presets" / "experiment" / "swept.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("# @package _global_\nhydra: {sweeper: {params: {seed: '4,5'}}}\n")
    if not count:  # finetune has no replay.ratio: refused before anything is started
        with pytest.raises(ConfigError, match=r"strategies.replay.ratio is set although"):
            expand(overrides)
        return

    planned = expand(overrides)
    real = started(overrides, monkeypatch)

    assert len(planned) == len(real) == count
    assert [one.directory for one in planned] == [directory for directory, _ in real]
    composed = [OmegaConf.to_container(one.composed, resolve=True) for one in planned]
    assert composed == [config for _, config in real]


def test_expand_names_the_overrides_of_each_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    planned = expand(["strategy=finetune,[ewc,replay]", "seed=3"])

    assert [one.overrides for one in planned] == [
        ("strategy=finetune", "seed=3"),
        ("strategy=[ewc,replay]", "seed=3"),
    ]
    assert planned[1].directory.parent == tmp_path / "outputs" / "toy"
    assert planned[1].directory.name.startswith("ewc+replay-s3-")
    assert list(tmp_path.iterdir()) == []


def test_expand_counts_a_run_once() -> None:
    assert len(expand(["seed=0,0"])) == 1
    # two runs that are not the same stay two, so that the second is refused
    assert len(expand(["seed=0,1", "hydra.sweep.subdir=same"])) == 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["strategy=ewc,ewcc"], "strategy=ewcc does not exist. Did you mean 'ewc'?"),
        (["optimizer.lrr=1,2"], "The key 'optimizer.lrr' does not exist."),
        (["training.epochs=1,few"], "training.epochs=few is of the wrong type"),
        (["seed=interval(0,1)"], "does not support sweep type"),
        (["hydra.sweep.dir=a,b"], "Sweeping over Hydra's configuration is not supported"),
    ],
)
def test_expand_refuses_in_one_sentence(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        expand(overrides)

    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
