"""Finding and loading runs: what counts, what is skipped, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clpeft import slurm
from clpeft.config import ConfigError
from clpeft.reports.runs import collect_runs, last_line

WriteRun = Callable[..., Path]


def notes(*directories: Path, **options: Path) -> dict[str, str]:
    return {
        str(note.path.relative_to(note.path.parents[1])): note.text
        for note in collect_runs(directories, **options).notes
    }


def test_a_sweep_is_loaded_whole(sweep: Path) -> None:
    found = collect_runs([sweep])
    assert sorted((run.strategies[0], run.seed) for run in found.runs) == [
        ("ewc", 0),
        ("finetune", 0),
        ("finetune", 1),
        ("independent", 0),
        ("independent", 1),
        ("joint", 0),
        ("replay", 0),
        ("replay", 1),
        ("replay", 2),
    ]
    assert found.notes == []
    unfinished = {(run.strategies, run.seed): (run.state, run.message) for run in found.unfinished}
    assert unfinished == {
        (("olora",), 0): ("failed", "RuntimeError: singular <matrix>"),
        (("agem",), 0): ("running", ""),
        (("agem",), 1): ("preempted", "SIGTERM at step 40"),
    }


def test_a_run_directory_itself_can_be_given(sweep: Path) -> None:
    directory = next(sweep.glob("toy/ewc-*"))
    assert [run.name for run in collect_runs([directory]).runs] == [directory.name]


def test_the_same_directory_given_twice_is_read_once(sweep: Path) -> None:
    found = collect_runs([sweep, sweep / "toy", sweep / ".." / sweep.name])
    assert len(found.runs) == 9
    assert found.notes == []


def test_bytes_as_earlier_versions_called_them(tmp_path: Path, write_run: WriteRun) -> None:
    """They had what trains under the name of the adapter's, and no other."""
    write_run(["finetune"], 0, [[0.2], [0.8]], name="old", cost={"adapter_bytes": 300})
    both = {"trained_bytes": 300, "adapter_bytes": 700}
    write_run(["finetune"], 1, [[0.2], [0.8]], name="new", cost=both)

    found = {run.seed: run.cost for run in collect_runs([tmp_path]).runs}
    assert found == {0: {"trained_bytes": 300}, 1: both}


def test_a_copied_run_is_counted_once_and_named(sweep: Path, tmp_path: Path) -> None:
    original = next(sweep.glob("toy/ewc-*"))
    copy = tmp_path / "zcopy" / original.name
    shutil.copytree(original, copy)
    found = collect_runs([sweep, tmp_path / "zcopy"])
    assert len(found.runs) == 9
    (note,) = found.notes
    assert note.path == copy / "results.json"
    assert f"is the same run as {original}" in note.text
    assert "counted once" in note.text
    assert "differ" not in note.text


def test_a_repeated_run_with_another_matrix_is_said_to_differ(sweep: Path, tmp_path: Path) -> None:
    original = next(sweep.glob("toy/ewc-*"))
    copy = tmp_path / "zcopy" / original.name
    shutil.copytree(original, copy)
    results = json.loads((copy / "results.json").read_text())
    results["matrix"][3][0] = 0.1
    (copy / "results.json").write_text(json.dumps(results))
    found = collect_runs([sweep, tmp_path / "zcopy"])
    (note,) = found.notes
    assert note.text.endswith("counted once, although the two matrices differ")
    kept = [run for run in found.runs if run.strategies == ("ewc",)]
    assert [run.matrix[3][0] for run in kept] == [0.5]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("[1, 2]", "holds no JSON object"),
        ('{"accuracy": 1}', "is not a clpeft result: it has no 'schema'"),
        ('{"schema": 2}', "has schema 2; this version reads schema 1"),
        ('{"schema": 1, "digests": {}}', "it has no 'tasks'"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_foreign_results_file_is_named_and_skipped(
    sweep: Path, content: str | bytes, said: str
) -> None:
    foreign = sweep / "aside"
    foreign.mkdir()
    data = content if isinstance(content, bytes) else content.encode()
    (foreign / "results.json").write_bytes(data)
    found = collect_runs([sweep])
    assert len(found.runs) == 9
    (note,) = found.notes
    assert note.path == foreign / "results.json"
    assert said in note.text
    assert note.text.endswith("; skipped")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"matrix": [[0.1, 0.2]] * 4}, "has a matrix that cannot be used"),
        ({"matrix": [[1.5] * 3] * 4}, "scores are fractions from 0 to 1"),
        ({"matrix": [[float("nan")] * 3] * 4}, "scores are fractions from 0 to 1"),
        ({"matrix": [["x"] * 3] * 4}, "not a number or None"),
        ({"matrix": [1, 2, 3, 4]}, "has a matrix that cannot be used"),
        ({"matrix": [[0.5] * 2] * 3}, "has a matrix of 3 rows for 3 tasks"),
        ({"test_sizes": [10]}, "does not have one entry of 'test_sizes' for each of 3 tasks"),
        ({"seed": True}, "its 'seed' is True"),
        ({"bound": "no"}, "its 'bound' is 'no'"),
    ],
)
def test_a_spoilt_result_is_named_and_skipped(
    sweep: Path, change: dict[str, object], said: str
) -> None:
    path = next(sweep.glob("toy/ewc-*")) / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    found = collect_runs([sweep])
    assert len(found.runs) == 8
    (note,) = found.notes
    assert note.path == path
    assert said in note.text


def test_a_result_whose_run_did_not_complete_is_not_counted(sweep: Path) -> None:
    directory = next(sweep.glob("toy/ewc-*"))
    (directory / "status.json").write_text('{"status": "failed", "exception": "ValueError: no"}')
    found = collect_runs([sweep])
    assert len(found.runs) == 8
    assert [note.text for note in found.notes] == [
        "belongs to a run that is failed, not completed; not counted"
    ]
    assert ("failed", "ValueError: no") in [(r.state, r.message) for r in found.unfinished]


def test_a_completed_run_without_results_is_listed(sweep: Path) -> None:
    directory = next(sweep.glob("toy/ewc-*"))
    (directory / "results.json").unlink()
    told = {run.directory: run.message for run in collect_runs([sweep]).unfinished}
    assert told[directory] == "completed, but there is no results.json"


def test_a_killed_run_is_told_from_a_running_one(tmp_path: Path, write_status: WriteRun) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    here = socket.gethostname()
    write_status("a-s0-0", status="running", host=here, process=done.pid)
    write_status("b-s0-0", status="running", host=here, process=os.getpid())
    write_status("c-s0-0", status="running", host=f"not-{here}", process=done.pid)
    # nobody holds the lock of d, although its process, on another machine, cannot be asked after
    (write_status("d-s0-0", status="running", host="node7", process=9) / ".lock").touch()
    found = collect_runs([tmp_path]).unfinished
    assert {run.strategies[0]: (run.state, run.message) for run in found} == {
        "a": ("killed", f"its process {done.pid} on {here} is gone; the same command continues it"),
        "b": ("running", ""),
        "c": ("running", ""),
        "d": ("killed", "its process 9 on node7 is gone; the same command continues it"),
    }


def test_a_queued_run_is_listed_with_its_job(
    tmp_path: Path, write_status: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # where there is no SLURM to ask, it is believed
    monkeypatch.setattr(slurm, "is_here", lambda: False)
    write_status("a-s3-0", status="queued", job_id="81_3")
    (run,) = collect_runs([tmp_path]).unfinished
    assert (run.state, run.strategies, run.seed, run.message) == ("queued", ("a",), 3, "job 81_3")


def test_a_foreign_status_is_named(sweep: Path) -> None:
    (sweep / "aside").mkdir()
    (sweep / "aside" / "status.json").write_text('{"status": "teapot"}')
    assert notes(sweep) == {
        "aside/status.json": "is not the status of a clpeft run: its 'status' is 'teapot', not one "
        "of queued, running, completed, failed, preempted; its content is left out"
    }


def test_a_spoilt_config_costs_the_settings_not_the_result(sweep: Path) -> None:
    directory = next(sweep.glob("toy/ewc-*"))
    (directory / "config.yaml").write_text("a: [")
    found = collect_runs([sweep])
    assert len(found.runs) == 9
    (note,) = found.notes
    assert note.path == directory / "config.yaml"
    assert "is not valid YAML" in note.text


def test_metrics_that_contradict_the_matrix_are_noted(sweep: Path) -> None:
    path = next(sweep.glob("toy/ewc-*")) / "results.json"
    results = {
        **json.loads(path.read_text()),
        "metrics": {"average_accuracy": 0.99, "forgetting": 0.15},
    }
    path.write_text(json.dumps(results))
    found = collect_runs([sweep])
    assert [note.text for note in found.notes] == [
        "says average_accuracy = 0.99, but its matrix gives 0.6; the matrix counts"
    ]
    (run,) = [run for run in found.runs if run.strategies == ("ewc",)]
    assert run.metrics["average_accuracy"] == pytest.approx(0.6)


def test_the_reports_own_directory_and_the_inside_of_runs_are_not_read(sweep: Path) -> None:
    directory = next(sweep.glob("toy/ewc-*"))
    for hidden in (sweep / "report", directory / "checkpoints" / "step-7"):
        hidden.mkdir(parents=True)
        (hidden / "results.json").write_text("{")
    found = collect_runs([sweep], exclude=sweep / "report")
    assert len(found.runs) == 9
    assert found.notes == []


def test_a_directory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no directory '.*nowhere'"):
        collect_runs([tmp_path / "nowhere"])


def test_a_directory_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Found no run below '.*': a run's directory holds"):
        collect_runs([tmp_path])


def test_last_line_of_a_traceback() -> None:
    assert last_line("Traceback\n  File x\nKeyError: 'a'\n\n") == "KeyError: 'a'"
    assert last_line(" \n") == ""


def test_what_a_run_leaves_is_read_whole(finished: Callable[..., Any]) -> None:
    """A results.json as training writes it, not as the tests above do."""
    outcome = finished("ewc")
    (run,) = collect_runs([outcome.directory]).runs
    told = outcome.results

    assert not collect_runs([outcome.directory]).notes
    assert (run.strategies, run.seed, run.model) == (("ewc",), 0, "tiny_llama")
    assert run.matrix == told["matrix"]
    assert run.metrics == pytest.approx(told["metrics"], abs=1e-12)
    assert run.undefined == told["undefined"]
    assert run.test == told["digests"]["test"] != told["environment"]["data"]
    assert run.base == told["digests"]["base"]
    assert run.config["strategies"]["ewc"]["lambda_"] == 20
    assert run.status["status"] == "completed"
