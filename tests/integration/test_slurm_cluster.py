"""Sweeps on a real SLURM: launch/slurm/one_node_cluster.sh start, then these."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.running import Outcome

LAUNCH = Path(__file__).parents[2] / "launch"
# A run here takes a few seconds; how long SLURM takes is its own affair.
PATIENCE = 120.0
# for runs that are to be caught in the middle: some ten seconds of training
LONG = ("training.epochs=30", "stream.num_tasks=2", "training.checkpoint.keep=2")


def _missing() -> str | None:
    if shutil.which("sbatch") is None:
        return "there is no sbatch; launch/slurm/one_node_cluster.sh start installs and starts one"
    if subprocess.run(["sinfo"], capture_output=True, check=False).returncode != 0:
        return "no slurmctld answers; launch/slurm/one_node_cluster.sh start starts one"
    return None


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(_missing() is not None, reason=str(_missing())),
]


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def facts(job: str) -> dict[str, str]:
    """What SLURM knows of a job."""
    return dict(re.findall(r"(\w+)=(\S+)", slurm("scontrol", "show", "job", "--oneliner", job)))


def in_queue() -> str:
    return slurm("squeue", "--noheader", "--array", "--format=%i")


@pytest.fixture
def clpeft(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs a command line in a shell session of its own, which is gone afterwards."""

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "clpeft", *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * PATIENCE,
            start_new_session=True,
        )

    yield command
    # what a test that failed left in the queue
    for path in tmp_path.rglob("status.json"):
        subprocess.run(["scancel", "--quiet", read(path)["job_id"]], check=False)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def status(folder: Path) -> dict[str, Any]:
    return read(folder / "status.json")


def only(top: Path, pattern: str) -> Path:
    (found,) = (top / "outputs" / "toy").glob(pattern)
    return found


def wait_for(what: Callable[[], Any], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        told = (folder / "slurm.log").read_text() if (folder / "slurm.log").exists() else ""
        assert time.monotonic() < deadline, (status(folder), told, slurm("squeue", "--array"))
        time.sleep(0.2)


def wait_for_state(folder: Path, *states: str) -> None:
    wait_for(lambda: status(folder)["status"] in states, folder)


def wait_for_the_middle(folder: Path) -> None:
    """Until the second task trains: one checkpoint is there, and not all is done."""
    wait_for(lambda: '"event": "step", ' in _of_task_2(folder), folder)


def _of_task_2(folder: Path) -> str:
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return "\n".join(line for line in lines if '"task": 1' in line)


def same(folder: Path, undisturbed: Outcome) -> bool:
    """Whether a run ended with the results and, bit by bit, the adapters of another."""
    one, other = (
        {path.name: (path / "adapter_model.safetensors").read_bytes() for path in tasks}
        for tasks in (
            sorted((folder / "adapters").iterdir()),
            sorted((undisturbed.directory / "adapters").iterdir()),
        )
    )
    assert len(one) == len(other) > 0
    return one == other and read(folder / "results.json")["matrix"] == undisturbed.results["matrix"]


def without_strategy(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if not override.startswith("strategy=")]


def test_sweep_through_the_launcher(
    clpeft: Callable[..., subprocess.CompletedProcess[str]],
    tiny: Callable[..., list[str]],
    finished: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    sweep = ["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=5"]
    overrides = [*sweep, "strategy=finetune,replay", *without_strategy(tiny("finetune"))]
    done = clpeft(*overrides)
    finetune, replay = only(tmp_path, "finetune-s0-*"), only(tmp_path, "replay-s0-*")
    jobs = [status(folder)["job_id"].split("_") for folder in (finetune, replay)]

    assert done.returncode == 0, done.stderr
    assert "sweep of 2 runs: 2 completed" in done.stderr
    assert jobs[0][0] == jobs[1][0]  # one array
    assert [element for _, element in jobs] == ["0", "1"]
    assert facts("_".join(jobs[0]))["TimeLimit"] == "00:05:00"
    # a job computes what a run in this process does
    assert same(finetune, finished("finetune"))

    before = status(finetune), status(replay), sorted((tmp_path / "outputs" / ".slurm").iterdir())
    again = clpeft(*overrides)
    assert again.returncode == 0
    # no run and no job more
    after = status(finetune), status(replay), sorted((tmp_path / "outputs" / ".slurm").iterdir())
    assert after == before


def test_run_that_fails_is_seen_everywhere(
    clpeft: Callable[..., subprocess.CompletedProcess[str]],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    # known only once the model is there, hence in the job
    targets = "peft.target=[q_prj],[q_proj]"
    shared = [o for o in tiny("finetune") if not o.startswith("peft.target=")]
    done = clpeft("-m", "hydra/launcher=slurm", targets, *shared)
    folders = {status(path.parent)["status"]: path.parent for path in tmp_path.rglob("status.json")}
    failed = folders["failed"]
    told = "peft.target names 'q_prj'"

    assert folders.keys() == {"failed", "completed"}  # the other went on
    assert done.returncode == 1
    summary = done.stderr[done.stderr.index("clpeft: sweep of 2 runs: 1 completed, 1 failed") :]
    assert told in summary
    assert told in status(failed)["exception"]
    assert "Traceback" in status(failed)["traceback"]
    assert told in (failed / "run.log").read_text()
    assert told in (failed / "slurm.log").read_text()
    assert facts(status(failed)["job_id"])["JobState"] == "FAILED"
    assert facts(status(failed)["job_id"])["ExitCode"] == "1:0"
    assert facts(status(folders["completed"])["job_id"])["ExitCode"] == "0:0"


def test_submitted_sweep_needs_no_shell(
    clpeft: Callable[..., subprocess.CompletedProcess[str]],
    tiny: Callable[..., list[str]],
    finished: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    shared = [o for o in tiny("finetune") if not o.startswith("peft.target=")]
    overrides = ["hydra.launcher.timeout_min=5", "peft.target=auto,[q_prj]", *shared]
    tried = clpeft("submit", "--dry-run", *overrides)
    assert tried.returncode == 0
    assert list(tmp_path.iterdir()) == []

    done = clpeft("submit", *overrides)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "outputs" / "toy").iterdir())
    # the session that submitted is over, and nothing is completed yet
    assert {status(folder)["status"] for folder in folders} <= {"queued", "running"}
    job = re.search(r"Submitted 2 runs as job (\d+)\.", done.stdout)
    assert job is not None
    assert f"squeue --jobs={job[1]}" in done.stdout
    assert {status(folder)["job_id"] for folder in folders} == {f"{job[1]}_0", f"{job[1]}_1"}
    at_work = clpeft("submit", *overrides)
    assert "2 runs in the queue or at work:" in at_work.stdout
    assert "Nothing is left to submit." in at_work.stdout

    for folder in folders:
        wait_for_state(folder, "completed", "failed")
    by_state = {status(folder)["status"]: folder for folder in folders}
    good, bad = by_state["completed"], by_state["failed"]
    assert same(good, finished("finetune"))
    assert "peft.target names 'q_prj'" in (bad / "slurm.log").read_text()
    element = status(bad)["job_id"]
    wait_for(lambda: element not in in_queue(), bad)
    assert (facts(element)["JobState"], facts(element)["ExitCode"]) == ("FAILED", "1:0")

    # the same command submits what is not completed
    again = clpeft("submit", *overrides)
    assert "1 run completed already." in again.stdout
    assert "Submitted 1 run as job " in again.stdout
    wait_for(lambda: status(bad).get("attempt") == 2, bad)
    wait_for_state(bad, "failed")
    assert status(good)["attempt"] == 1


@pytest.mark.parametrize("how", ["scontrol requeue", "USR1"])
def test_requeued_run_ends_with_the_same_bits(
    clpeft: Callable[..., subprocess.CompletedProcess[str]],
    tiny: Callable[..., list[str]],
    finished: Callable[..., Outcome],
    tmp_path: Path,
    how: str,
) -> None:
    done = clpeft("submit", *tiny("ewc", *LONG))
    assert done.returncode == 0, done.stderr
    folder = only(tmp_path, "ewc-s0-*")
    job = status(folder)["job_id"]
    wait_for_the_middle(folder)
    if how == "USR1":  # what SLURM sends before a job's time is over
        slurm("scancel", "--batch", "--signal=USR1", job)
    else:
        slurm("scontrol", "requeue", job)
    wait_for_state(folder, "preempted")
    reason = status(folder)["reason"]
    wait_for_state(folder, "completed", "failed")

    assert ("USR1" if how == "USR1" else f"SLURM requeued job {job}") in reason
    assert status(folder)["status"] == "completed"
    assert status(folder)["attempt"] == 2
    assert status(folder)["job_id"] == job
    assert facts(job)["Restarts"] == "1"
    assert same(folder, finished("ewc", *LONG))
    # it went on where it was, rather than from the start
    starts = [
        line for line in (folder / "history.jsonl").read_text().splitlines() if "task_start" in line
    ]
    assert [json.loads(line)["task"] for line in starts] == [0, 1]


def test_cancelled_run_is_seen_as_such(
    clpeft: Callable[..., subprocess.CompletedProcess[str]],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    overrides = tiny("finetune", *LONG)
    assert clpeft("submit", *overrides).returncode == 0
    folder = only(tmp_path, "finetune-s0-*")
    job = status(folder)["job_id"]
    wait_for_the_middle(folder)
    slurm("scancel", job)
    wait_for_state(folder, "preempted")
    wait_for(lambda: job not in in_queue(), folder)

    assert facts(job)["JobState"] == "CANCELLED"
    assert facts(job)["ExitCode"] == "143:0"  # 128 + SIGTERM
    assert facts(job)["Restarts"] == "0"  # a cancelled job stays so
    assert status(folder)["reason"].startswith(f"cancelled: SLURM ended job {job};")
    told = clpeft("report", "outputs").stdout
    assert re.search(r"preempted\s+outputs/toy/finetune-s0-\w+\s+cancelled: SLURM ended job", told)

    again = clpeft("submit", *overrides)
    assert "Submitted 1 run as job " in again.stdout
    wait_for_state(folder, "completed", "failed")
    assert (status(folder)["status"], status(folder)["attempt"]) == ("completed", 2)


def test_run_that_was_cancelled_before_it_began(
    clpeft: Callable[..., subprocess.CompletedProcess[str]],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    later = "+hydra.launcher.additional_parameters.begin=now+1hour"
    assert clpeft("submit", later, *tiny("finetune")).returncode == 0
    folder = only(tmp_path, "finetune-s0-*")
    job = status(folder)["job_id"]

    assert re.search(r"queued\s+outputs/toy/finetune-s0-\w+", clpeft("report", "outputs").stdout)
    slurm("scancel", job)
    told = clpeft("report", "outputs").stdout
    assert re.search(rf"killed\s+outputs/toy/finetune-s0-\w+\s+its SLURM job {job} is gone", told)


@pytest.mark.parametrize("name", ["one_gpu", "one_node", "several_nodes"])
def test_slurm_takes_the_batch_files(name: str) -> None:
    # they ask for GPUs, which this cluster has in name; it has no second node
    nodes = ["--nodes=1"] if name == "several_nodes" else []
    file = str(LAUNCH / "slurm" / f"{name}.sbatch")
    tried = subprocess.run(
        ["sbatch", "--test-only", *nodes, file], capture_output=True, text=True, check=False
    )

    assert re.search(r"Job \d+ to start at", tried.stderr), tried.stderr


@pytest.mark.parametrize("name", ["one_gpu", "several_nodes"])
def test_batch_file_saves_requeues_and_continues(
    clpeft: Callable[..., subprocess.CompletedProcess[str]],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    name: str,
) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CONFIG": str(LAUNCH / "accelerate" / "ddp.yaml"),
        "PROCESSES_PER_NODE": "2",
    }
    few = ["--nodes=1", "--cpus-per-task=1", "--gpus-per-node=0", "--parsable"]
    job = subprocess.run(
        ["sbatch", *few, LAUNCH / "slurm" / f"{name}.sbatch", *tiny("finetune", *LONG)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    written = tmp_path / f"slurm-{job}.log"
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("outputs/toy/*/status.json")):
        assert time.monotonic() < deadline, written.read_text() if written.exists() else ""
        time.sleep(0.2)
    folder = only(tmp_path, "finetune-s0-*")
    wait_for_the_middle(folder)
    # as `#SBATCH --signal` has it sent: to the batch script, or to what srun started
    batch = [] if name == "several_nodes" else ["--batch"]
    slurm("scancel", *batch, "--signal=USR1", job)
    wait_for_state(folder, "preempted")
    assert "stopped by SIGUSR1" in status(folder)["reason"]
    wait_for_state(folder, "completed", "failed")

    assert (status(folder)["status"], status(folder)["attempt"]) == ("completed", 2)
    assert status(folder)["job_id"] == job
    assert facts(job)["Restarts"] == "1"
    assert "continuing from " in written.read_text()
