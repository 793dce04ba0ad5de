"""Leaderboards: every number against one worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clpeft.reports.aggregate import Estimate, Leaderboard, Row, leaderboards
from clpeft.reports.naming import settings
from clpeft.reports.runs import collect_runs

WriteRun = Callable[..., Path]

# quantiles of Student's t at .975 for one and two degrees of freedom, from a printed table
T_1, T_2 = 12.7062, 4.30265


def one_board(*directories: Path) -> Leaderboard:
    (board,) = leaderboards(collect_runs(directories).runs)
    return board


def rows(board: Leaderboard) -> dict[str, Row]:
    return {row.label: row for row in board.rows}


def test_rows_are_ordered_best_first_and_bounds_stand_apart(sweep: Path) -> None:
    board = one_board(sweep)
    assert [row.label for row in board.contenders] == ["replay", "ewc", "finetune"]
    # .91 over two seeds is (.92 + .9) / 2
    assert [row.label for row in board.bounds] == ["independent", "joint"]
    assert board.title == "toy, domain-incremental, tiny_llama"
    assert board.slug == "toy-domain-incremental-tiny-llama"


def test_mean_and_interval_over_two_and_three_seeds(sweep: Path) -> None:
    found = rows(one_board(sweep))
    # .6 and .5: standard deviation .1/√2, of the mean .05
    finetune = found["finetune"].metrics["average_accuracy"]
    assert finetune.mean == pytest.approx(0.55)
    assert finetune.half_width == pytest.approx(T_1 * 0.05, rel=1e-5)
    # .8, .75, .7: standard deviation .05
    replay = found["replay"].metrics["average_accuracy"]
    assert replay.mean == pytest.approx(0.75)
    assert replay.half_width == pytest.approx(T_2 * 0.05 / 3**0.5, rel=1e-5)
    assert replay.n == 3
    assert found["replay"].seeds == [0, 1, 2]
    # one seed says nothing about its spread
    assert found["ewc"].metrics["average_accuracy"] == Estimate(pytest.approx(0.6), None, 1)
    assert found["finetune"].metrics["forgetting"].mean == pytest.approx(0.475)
    assert found["finetune"].metrics["learning_accuracy"].mean == pytest.approx((0.9 + 2.5 / 3) / 2)
    assert found["replay"].metrics["forgetting"].mean == pytest.approx(0.225)


def test_joint_has_only_its_last_row(sweep: Path) -> None:
    joint = rows(one_board(sweep))["joint"]
    assert joint.metrics["average_accuracy"].mean == pytest.approx(0.9)
    assert set(joint.metrics) == {"average_accuracy", "average_accuracy_micro"}
    assert joint.undefined["learning_accuracy"].startswith("not evaluated: R[1][1], R[2][2]")
    assert joint.mean_matrix()[1] == [None, None, None]


def test_intransigence_comes_from_the_independent_run_of_the_same_seed(sweep: Path) -> None:
    found = rows(one_board(sweep))
    # seed 0: (.06 + .02 − .02) / 3; seed 1: (.1 + .1 + 0) / 3
    finetune = found["finetune"].metrics["intransigence"]
    assert finetune.mean == pytest.approx((0.02 + 0.2 / 3) / 2)
    assert finetune.half_width == pytest.approx(T_1 * (0.2 / 3 - 0.02) / 2, rel=1e-5)
    # replay's seed 2 has no independent run
    assert found["replay"].metrics["intransigence"].n == 2
    assert found["replay"].undefined["intransigence"] == (
        "seed 2: no completed independent run of the same setting and seed"
    )
    assert "themselves the reference" in found["independent"].undefined["intransigence"]


def test_intransigence_needs_the_same_setting(
    sweep: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    matrix = [[0.25] * 3, [0.5, None, None], [0.5, 0.5, None], [0.5, 0.5, 0.5]]
    config = {"peft": {"name": "lora", "r": 64}}
    write_run(["ewc"], 0, matrix, config=config, where="wide")
    found = rows(one_board(sweep, tmp_path / "wide"))
    wide = found["ewc (r=64)"]
    assert "intransigence" not in wide.metrics
    assert "no completed independent run" in wide.undefined["intransigence"]
    assert "intransigence" in found["ewc (r=8)"].metrics


def test_the_independent_run_trained_alike_goes_before_another(
    sweep: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    poor = [[0.25] * 3, [0.4, None, None], [0.4, 0.4, None], [0.4, 0.4, 0.4]]
    slow = {"optimizer": {"name": "adamw", "lr": 1e-9}}
    write_run(["independent"], 0, poor, config=slow, where="slow")
    found = rows(one_board(sweep, tmp_path / "slow"))
    # unchanged: (.96 + .92 + .88 − .7 − .7 − .7) / 3
    assert found["ewc"].metrics["intransigence"].mean == pytest.approx(0.22)
    # trained like neither, a run is told that it cannot be decided
    write_run(["ewc"], 0, poor, config={"optimizer": {"name": "sgd", "lr": 1.0}}, where="sgd")
    found = rows(one_board(sweep, tmp_path / "slow", tmp_path / "sgd"))
    other = next(row for label, row in found.items() if label.startswith("ewc (lr=1.0"))
    assert other.undefined["intransigence"].startswith("several independent runs")


def test_a_stored_reference_serves_where_there_is_no_independent_run(
    tmp_path: Path, write_run: WriteRun
) -> None:
    matrix = [[0.2, 0.2], [0.8, 0.2], [0.6, 0.7]]
    write_run(["ewc"], 0, matrix, references={"independent": [0.9, 0.9]})
    # (.1 + .2) / 2
    found = rows(one_board(tmp_path))["ewc"].metrics["intransigence"]
    assert found.mean == pytest.approx(0.15)


def test_difference_to_finetune_is_paired_by_seed(sweep: Path) -> None:
    found = rows(one_board(sweep))
    # seed 0: .8 − .6, seed 1: .75 − .5; seed 2 has no partner
    difference = found["replay"].differences["average_accuracy"]
    assert difference.mean == pytest.approx(0.225)
    assert difference.half_width == pytest.approx(T_1 * 0.025, rel=1e-5)
    assert difference.n == 2
    assert difference.text(signed=True) == "+0.225 ± 0.318"
    assert found["replay"].baseline == "finetune"
    # −.3 and −.275
    assert found["replay"].differences["forgetting"].mean == pytest.approx(-0.2875)
    assert found["ewc"].differences["average_accuracy"].text(signed=True) == "+0.000"
    assert found["finetune"].differences == {}
    assert found["finetune"].baseline is None


def test_among_several_finetunes_the_one_trained_alike_is_the_baseline(
    sweep: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    best = [[0.25] * 3, [0.9, None, None], [0.9, 0.9, None], [0.9, 0.9, 0.9]]
    tuned = {"optimizer": {"name": "adamw", "lr": 0.01}}
    write_run(["finetune"], 0, best, config=tuned, where="tuned")
    found = rows(one_board(sweep, tmp_path / "tuned"))
    assert {"finetune (lr=0.001)", "finetune (lr=0.01)"} < set(found)
    assert found["replay"].baseline == "finetune (lr=0.001)"
    # one that is trained like neither is held against the best
    other = {"optimizer": {"name": "adamw", "lr": 0.5}}
    write_run(["si"], 0, best, config=other, where="other")
    found = rows(one_board(sweep, tmp_path / "tuned", tmp_path / "other"))
    assert found["si"].baseline == "finetune (lr=0.01)"


def test_costs(sweep: Path) -> None:
    found = rows(one_board(sweep))
    cost = found["replay"].cost
    assert cost["train_seconds"] == pytest.approx(61)  # 60, 61, 62
    assert cost["peak_memory_bytes"] == 3 * 2**20
    assert cost["state_bytes"] == 2048  # after the last task
    assert (cost["trained_bytes"], cost["adapter_bytes"]) == (40_000, 6000)  # 3000, 6000, 9000
    assert cost["step_ratio"] == pytest.approx(2.0)  # 1.5 and 2.5; seed 2 has no partner
    assert cost["seconds_per_step"] == pytest.approx((0.15 + 0.5 + 9) / 3)
    assert "step_ratio" not in found["finetune"].cost


def test_whole_models_have_no_bytes_of_an_adapter(tmp_path: Path, write_run: WriteRun) -> None:
    cost = {"trained_bytes": 40_000, "adapter_bytes": None, "base_bytes": 0}
    write_run(["finetune"], 0, [[0.2], [0.8]], cost=cost)

    found = rows(one_board(tmp_path))["finetune"].cost
    assert found == {"trained_bytes": 40_000, "base_bytes": 0}


def test_best_is_never_a_bound_and_knows_the_direction(sweep: Path) -> None:
    board = one_board(sweep)
    assert board.best("average_accuracy") == {"replay"}
    assert board.best("forgetting") == {"ewc"}  # .15, against .225 and .475
    # intransigence: ewc .22 against finetune .043
    assert board.best("intransigence") == {"replay"}
    assert board.best("no_such_metric") == set()


def test_equal_as_shown_is_equally_good(tmp_path: Path, write_run: WriteRun) -> None:
    for strategy, score in [("a", 0.8), ("b", 0.8002), ("c", 0.79)]:
        write_run([strategy], 0, [[0.2], [score]])
    board = one_board(tmp_path)
    assert [row.label for row in board.contenders] == ["b", "a", "c"]
    assert board.best("average_accuracy") == {"a", "b"}


def test_a_single_contender_is_not_called_best(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(["ewc"], 0, [[0.2], [0.8]])
    write_run(["joint"], 0, [[0.2], [0.7]])
    assert one_board(tmp_path).best("average_accuracy") == set()


def test_families_of_one_strategy_are_told_apart_by_what_differs(
    tmp_path: Path, write_run: WriteRun
) -> None:
    for value in (1, 10):
        config = {"strategies": {"ewc": {"lambda_": value, "gamma": 1.0}}}
        for seed in (0, 1):
            write_run(["ewc"], seed, [[0.2], [0.8]], config=config)
    write_run(["ewc", "replay"], 0, [[0.2], [0.8]])
    board = one_board(tmp_path)
    assert sorted(row.label for row in board.rows) == [
        "ewc (lambda_=1)",
        "ewc (lambda_=10)",
        "ewc+replay",
    ]
    assert {len(row.runs) for row in board.rows} == {1, 2}


def test_keys_that_end_alike_are_written_out(tmp_path: Path, write_run: WriteRun) -> None:
    for lr, seed in [(0.1, 1), (0.2, 2)]:
        config = {"optimizer": {"lr": lr}, "stream": {"seed": seed}, "peft": {"seed": seed}}
        write_run(["ewc"], 0, [[0.2], [0.8]], config=config)
    assert sorted(rows(one_board(tmp_path))) == [
        "ewc (lr=0.1, peft.seed=1, stream.seed=1)",
        "ewc (lr=0.2, peft.seed=2, stream.seed=2)",
    ]


def test_families_that_nothing_tells_apart_carry_their_digest(
    tmp_path: Path, write_run: WriteRun
) -> None:
    for family in ("aaaa0000", "bbbb0000"):
        digests = {"run": family, "family": family, "setting": "s"}
        write_run(["ewc"], 0, [[0.2], [0.8]], where=family, digests=digests)
    assert sorted(rows(one_board(tmp_path))) == ["ewc (aaaa0000)", "ewc (bbbb0000)"]


@pytest.mark.parametrize(
    ("change", "titles"),
    [
        (
            {"stream": "standard_cl", "order": "order1"},
            ["standard_cl order1, domain-incremental, m", "toy, domain-incremental, m"],
        ),
        ({"scenario": "task"}, ["toy, domain-incremental, m", "toy, task-incremental, m"]),
        (
            {"split": "validation"},
            ["toy, domain-incremental, m", "toy, domain-incremental, m, validation split"],
        ),
        (
            {"evaluation": {"mode": "generate", "task_id_given": False}},
            [
                "toy, domain-incremental, m, scored by generate",
                "toy, domain-incremental, m, scored by rank",
            ],
        ),
        (
            {"test_sizes": [7]},
            [
                "toy, domain-incremental, m, test sizes 100",
                "toy, domain-incremental, m, test sizes 7",
            ],
        ),
        # another stream.seed, another max_length: the same names and sizes, other examples
        (
            {"digests": {"run": "r", "family": "f", "setting": "s", "test": "0123456789"}},
            [
                "toy, domain-incremental, m, examples 01234567",
                "toy, domain-incremental, m, examples ?",
            ],
        ),
        (
            {"digests": {"run": "r", "family": "f", "setting": "s", "base": "m-12"}},
            ["toy, domain-incremental, m, base ?", "toy, domain-incremental, m, base m-12"],
        ),
    ],
)
def test_what_cannot_be_compared_is_on_another_leaderboard(
    tmp_path: Path, write_run: WriteRun, change: dict[str, object], titles: list[str]
) -> None:
    write_run(["ewc"], 0, [[0.2], [0.8]], model="m")
    write_run(["ewc"], 1, [[0.2], [0.8]], model="m", **change)
    boards = leaderboards(collect_runs([tmp_path]).runs)
    assert [board.title for board in boards] == titles
    assert len({board.slug for board in boards}) == 2


def test_mean_matrix(sweep: Path) -> None:
    matrix = rows(one_board(sweep))["finetune"].mean_matrix()
    assert matrix[1] == [pytest.approx(0.85), pytest.approx(0.3), None]
    assert matrix[3] == [pytest.approx(0.25), pytest.approx(0.5), pytest.approx(0.9)]


def test_settings_leave_out_what_cannot_change_a_result(sweep: Path) -> None:
    board = one_board(sweep)
    assert settings(rows(board)["ewc"].runs[0]) == {
        "model.name": "tiny_llama",
        "peft.name": "lora",
        "peft.r": "8",
        "strategies.ewc.lambda_": "100.0",
        "stream.kind": "toy",
        "stream.name": "toy",
        "optimizer.name": "adamw",
        "optimizer.lr": "0.001",
        "training.epochs": "2",
    }


def test_without_configs_there_is_still_a_leaderboard(sweep: Path) -> None:
    for path in sweep.rglob("config.yaml"):
        path.unlink()
    assert [row.label for row in one_board(sweep).contenders] == ["replay", "ewc", "finetune"]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.9124, 0.0336, 3), "0.912 ± 0.034"),
        (Estimate(0.9, None, 1), "0.900"),
        (Estimate(-0.00001, 0.1, 2), "0.000 ± 0.100"),
    ],
)
def test_estimate_as_text(estimate: Estimate, text: str) -> None:
    assert estimate.text() == text


def test_a_metric_missing_for_every_seed_gives_each_reason(
    tmp_path: Path, write_run: WriteRun
) -> None:
    write_run(["ewc"], 0, [[0.2, 0.2], [0.8, 0.2], [None, 0.7]])
    write_run(["ewc"], 1, [[0.2, 0.2], [0.8, 0.2], [0.7, None]])
    row = rows(one_board(tmp_path))["ewc"]
    assert row.undefined["average_accuracy"] == (
        "seed 0: not evaluated: R[2][1] (R[t][i]: task i after t trained tasks); "
        "seed 1: not evaluated: R[2][2] (R[t][i]: task i after t trained tasks)"
    )
    assert json.dumps(row.mean_matrix()) == "[[0.2, 0.2], [0.8, 0.2], [null, null]]"


def test_the_config_is_read_as_data(tmp_path: Path, write_run: WriteRun) -> None:
    directory = write_run(["ewc"], 0, [[0.2], [0.8]])
    (directory / "config.yaml").write_text("a: !!python/object/apply:os.system ['exit 3']")
    found = collect_runs([tmp_path])
    assert found.runs[0].config == {}
    (note,) = found.notes
    assert "is not valid YAML" in note.text
