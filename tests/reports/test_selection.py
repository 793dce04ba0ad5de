"""Choosing settings by validation scores."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from clpeft import cli
from clpeft.config import ConfigError, digest, run_name
from clpeft.reports.aggregate import leaderboards
from clpeft.reports.report import report_on
from clpeft.reports.runs import collect_runs
from clpeft.reports.selection import command, overrides, select
from clpeft.sweeps import expand

WriteRun = Callable[..., Path]
UNTRAINED = [0.25, 0.25]


@pytest.fixture
def tuned(tmp_path: Path, write_run: WriteRun) -> Callable[..., Path]:
    """A function that writes a run as `experiment=tune` leaves it, with two scores at its end."""

    def write(score: float, *given: str, first: float | None = None, **changes: Any) -> Path:
        (planned,) = expand(["experiment=tune", *given])
        config: Any = OmegaConf.to_container(planned.composed, resolve=True)
        family = digest(planned.composed, ("strategies", "optimizer", "model", "stream", "peft"))
        matrix = [UNTRAINED, [score if first is None else first, None], [score, score]]
        return write_run(
            list(config["strategies"]),
            config["seed"],
            matrix,
            config=config,
            name=run_name(planned.composed),
            digests={"run": run_name(planned.composed), "family": family, "setting": "x"},
            split=config["evaluation"]["split"],
            **changes,
        )

    return write


def chosen(folder: Path, metric: str = "average_accuracy") -> dict[str, Any]:
    winners = select(leaderboards(collect_runs([folder]).runs), metric)
    return {winner.strategy: winner for winner in winners}


def test_the_best_mean_over_seeds_wins(tuned: Callable[..., Path], tmp_path: Path) -> None:
    for lambda_, scores in ((1, (0.9, 0.5)), (3, (0.8, 0.7)), (10, (0.6, 0.6))):
        for seed, score in enumerate(scores):
            tuned(score, "strategy=ewc", f"strategies.ewc.lambda_={lambda_}", f"seed={seed}")
    tuned(0.4, "strategy=finetune")
    winners = chosen(tmp_path)

    # .7, .75 and .6 on average; the single best run is that of lambda_ = 1
    ewc = winners["ewc"]
    assert ewc.row.runs[0].config["strategies"]["ewc"]["lambda_"] == 3
    assert ewc.score.mean == pytest.approx(0.75)
    assert (ewc.settings, ewc.equal, ewc.left_out) == (3, 0, ())
    # 3 is the default, so that it is not said
    assert command(ewc.row) == "clpeft -m strategy=ewc seed=0,1"
    assert command(winners["finetune"].row) == "clpeft strategy=finetune seed=0"
    assert winners["finetune"].settings == 1


def test_a_metric_of_which_less_is_better(tuned: Callable[..., Path], tmp_path: Path) -> None:
    # both end at .6; the first forgets .9 - .6, the second .7 - .6
    tuned(0.6, "strategy=ewc", "strategies.ewc.lambda_=1", first=0.9)
    tuned(0.6, "strategy=ewc", "strategies.ewc.lambda_=2", first=0.7)

    best = chosen(tmp_path, "forgetting")["ewc"]
    assert best.row.runs[0].config["strategies"]["ewc"]["lambda_"] == 2
    assert best.score.mean == pytest.approx(0.1)
    # by the average they are equal, which is said
    assert chosen(tmp_path)["ewc"].equal == 1


def test_a_setting_that_lacks_a_seed_is_not_compared(
    tuned: Callable[..., Path], tmp_path: Path
) -> None:
    tuned(0.9, "strategy=ewc", "strategies.ewc.lambda_=1", "seed=0")
    tuned(0.6, "strategy=ewc", "strategies.ewc.lambda_=2", "seed=0")
    tuned(0.6, "strategy=ewc", "strategies.ewc.lambda_=2", "seed=1")

    best = chosen(tmp_path)["ewc"]
    assert best.row.runs[0].config["strategies"]["ewc"]["lambda_"] == 2
    assert [label.startswith("ewc (lambda_=1") for label in best.left_out] == [True]

    tuned(0.9, "strategy=ewc", "strategies.ewc.lambda_=1", "seed=4")
    with pytest.raises(ConfigError, match=r"No setting of ewc has .* all of the seeds 0,1,4"):
        chosen(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        ("strategy=[ewc,replay]", "strategies.replay.ratio=0.25", "optimizer.lr=0.005"),
        ("optimizer=sgd", "scheduler=cosine", "optimizer.lr=0.1", "optimizer.momentum=0.8"),
        ("model=tiny_bert", "peft.r=4", "peft.target=[query,value]", "training.epochs=3"),
        ("stream.scenario=class", "stream.num_tasks=2", "model.architecture.hidden_size=32"),
        ("model=gpt2", "model.path=/my models/it's one", "stream=mbpa", "paths.data_dir=/data"),
    ],
)
def test_the_command_gives_the_settings_of_the_run(
    tuned: Callable[..., Path], tmp_path: Path, given: tuple[str, ...]
) -> None:
    quoted = [o.replace("it's", "it\\'s").replace("/my", "'/my") for o in given]
    quoted = [f"{o}'" if "/my" in o else o for o in quoted]
    tuned(0.5, *quoted)
    (winner,) = chosen(tmp_path).values()
    line = shlex.split(command(winner.row))

    assert line[0] == "clpeft"
    (again,) = expand([*line[1:], "evaluation.split=validation", *not_ahead()])
    assert run_name(again.composed) == winner.row.runs[0].name
    (tested,) = expand(line[1:])
    assert tested.composed.evaluation.split == "test"
    assert tested.composed.paths.data_dir == winner.row.runs[0].config["paths"]["data_dir"]
    assert len(overrides(winner.row.runs[0])) <= len(given) + 1


def not_ahead() -> list[str]:
    return ["evaluation.untrained=false", "evaluation.ahead=false"]


def test_runs_that_were_scored_on_test_data_are_refused(
    tuned: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(0.5, "strategy=ewc")
    bad = tuned(0.5, "strategy=finetune", "evaluation.split=test")

    assert report_on([tmp_path], split="validation") == 1
    assert capsys.readouterr() == (
        "",
        f"clpeft: {bad} was scored on test data, by which no setting may be chosen; report on "
        "runs with evaluation.split=validation (experiment=tune) only.\n",
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--select", "test"], "--select test: settings are chosen by validation scores only"),
        (["--select", "validation", "--by", "acuracy"], "--by acuracy is no metric."),
    ],
)
def test_mistakes_are_one_sentence(
    tuned: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    tuned(0.5, "strategy=ewc")
    monkeypatch.setattr(sys, "argv", ["clpeft", "report", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()

    answer = capsys.readouterr()
    assert end.value.code == 1
    assert answer.err.startswith(f"clpeft: {told}")
    assert (answer.err.count("\n"), answer.out) == (1, "")


def test_the_choice_is_printed(
    tuned: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(0.5, "strategy=ewc", "strategies.ewc.lambda_=7")
    tuned(0.4, "strategy=ewc")

    assert report_on([tmp_path], split="validation") == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("Chosen by average accuracy on validation data")
    assert lines[at + 1].startswith("ewc 0.500, n = 1, best of 2; toy, domain-incremental")
    assert "  clpeft strategy=ewc strategies.ewc.lambda_=7.0 seed=0" in lines[at:]
