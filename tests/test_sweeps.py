"""Sweeps: what they stand for, what is told of them at their end, and what stops them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import pytest
import yaml
from hydra.core.config_store import ConfigStore
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from clpeft import cli, launching, slurm
from clpeft.config import ConfigError
from clpeft.outcomes import outcome_of, summary
from clpeft.rundir import Busy, RunDirectory
from clpeft.stopping import Preempted
from clpeft.sweep_launcher import WatchedLauncher
from clpeft.sweeps import expand
from clpeft.training.checkpoint import Checkpoints

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
        (["strategy=finetune,[ewc,replay]"], 2),
        (["strategy=glob([ew*,f*])", "seed=range(3,5)"], 4),
        (["experiment=tune", "strategy=ewc", "strategies.ewc.lambda_=3.5,1e2"], 2),
        (["seed=7", "hydra.sweep.dir=here", "hydra.sweep.subdir=run-${hydra:job.num}"], 1),
        (["optimizer.lr=1e-3,2e-3", "hydra.sweep.subdir=${hydra:job.override_dirname}"], 2),
        (["hydra.searchpath=[presets]", "experiment=swept"], 2),
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
        (["hydra/sweeper=optuna", "seed=0,1"], "hydra/sweeper=optuna chooses its runs by the"),
        (["seed=interval(0,1)"], "does not support sweep type"),
        (["hydra.sweep.dir=a,b"], "Sweeping over Hydra's configuration is not supported"),
    ],
)
def test_expand_refuses_in_one_sentence(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        expand(overrides)

    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


# What became of each run.


@contextmanager
def worked_on(directory: Path) -> Iterator[None]:
    """A run directory as another process holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_status(directory: Path, **status: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "status.json").write_text(json.dumps(status))
    return directory


def looks(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything below a folder with the times at which it was changed."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in folder.rglob("*")}


def test_summary_tells_every_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "is_here", lambda: True)
    monkeypatch.setattr(slurm, "is_in_queue", lambda job: job in ("81_3", "81_4"))
    here = {"host": socket.gethostname(), "process": os.getpid()}
    done = write_status(tmp_path / "done", status="completed")
    (done / "results.json").write_text('{"matrix": []}')
    write_status(tmp_path / "lost", status="completed")
    error = "ValueError: two\nlines of it\n"
    write_status(tmp_path / "bad", status="failed", exception=error)
    # the process that is named lives, but does not hold the lock: its number was given anew
    killed = write_status(tmp_path / "killed", status="running", **here)
    (killed / ".lock").touch()
    write_status(tmp_path / "at-work", status="running", host="node7", process=12)
    write_status(tmp_path / "waiting", status="queued", job_id="81_3")
    # on another machine, whose lock is not seen from here
    write_status(tmp_path / "far", status="running", host="n8", process=3, job_id="81_4")
    (tmp_path / "far" / ".lock").touch()
    write_status(tmp_path / "cancelled", status="queued", job_id="81_5")
    write_status(tmp_path / "stopped", status="preempted", reason="stopped by SIGUSR1")
    names = ["done", "lost", "bad", "killed", "at-work", "waiting", "far", "cancelled"]
    names += ["stopped", "never"]
    with worked_on(tmp_path / "at-work"):
        before = looks(tmp_path)
        told = summary(outcome_of(tmp_path / name) for name in names)
        assert looks(tmp_path) == before

    assert told.splitlines() == [
        "sweep of 10 runs: 1 completed, 1 failed, 2 killed, 1 incomplete, 1 preempted, 2 running, "
        "1 queued, 1 not started",
        "  failed       bad: lines of it",
        f"  killed       killed: its process {os.getpid()} on {socket.gethostname()} is gone",
        "  killed       cancelled: its SLURM job 81_5 is gone",
        "  incomplete   lost: completed, but there is no results.json",
        "  preempted    stopped: stopped by SIGUSR1",
        "  running      at-work: process 12 on node7",
        "  running      far: process 3 on n8",
        "  queued       waiting: job 81_3",
        "  not started  never",
        "the same command does what is left of it",
    ]


def test_without_a_lock_the_process_tells_whether_a_run_was_killed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    write_status(tmp_path / "a", status="running", host=here, process=gone.pid)
    write_status(tmp_path / "b", status="running", host=here, process=os.getpid())
    write_status(tmp_path / "c", status="running", host=f"not-{here}", process=gone.pid)

    states = [outcome_of(tmp_path / name).state for name in "abc"]
    assert states == ["killed", "running", "running"]


def test_looking_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    record = RunDirectory(tmp_path)
    with record.claimed():
        assert record.is_claimed
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            RunDirectory(tmp_path).is_claimed  # noqa: B018

    watchers = [threading.Thread(target=look) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(20):
            with record.claimed():  # waits a second at most, then raises Busy
                pass
    finally:
        over.set()
        for watcher in watchers:
            watcher.join()
    assert not record.is_claimed


# The end of a sweep.


@pytest.fixture
def sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, list[str]]]:
    """Runs `clpeft -m ...` in this process; its exit code and the lines of its summary."""
    monkeypatch.chdir(tmp_path)

    def command(*overrides: str) -> tuple[Any, list[str]]:
        monkeypatch.setattr(sys, "argv", ["clpeft", "-m", *overrides])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capsys.readouterr().err
        lines = told[told.find("clpeft: ") :].splitlines()
        return end.value.code or 0, lines

    return command


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs that take no time; the directories of those that were started, in order."""
    seen: list[Path] = []

    def launch(composed: DictConfig, directory: Path) -> float:
        record = RunDirectory(directory)
        with record.claimed():
            seen.append(directory)
            record.freeze(composed)
            with record.running():
                if composed.seed == 13:
                    raise RuntimeError("thirteen")
                record.write_results({"matrix": []})
        return float(composed.seed)

    monkeypatch.setattr(launching, "launch", launch)
    return seen


def test_others_go_on_in_later_batches(sweep: Any, instant: list[Path]) -> None:
    code, told = sweep("seed=13,1,2", "hydra.sweeper.max_batch_size=1")

    assert code == 1
    assert len(instant) == 3
    assert told == [
        "clpeft: sweep of 3 runs: 2 completed, 1 failed",
        f"  failed       {instant[0].relative_to(Path.cwd())}: RuntimeError: thirteen",
        "the same command does what is left of it",
    ]


def test_a_run_that_is_worked_on_elsewhere_is_no_failure(sweep: Any, instant: list[Path]) -> None:
    first, second = (one.directory for one in expand(["seed=1,2"]))
    write_status(first, status="running", host="node7", process=12)
    with worked_on(first):
        code, told = sweep("seed=1,2")

    assert code == 0
    assert instant == [second]
    assert told == [
        "clpeft: sweep of 2 runs: 1 completed, 1 running",
        f"  running      {first.relative_to(Path.cwd())}: elsewhere, process 12 on node7",
        "the same command does what is left of it",
    ]


def test_two_runs_of_one_directory_are_told_apart(sweep: Any, tiny: Any, tmp_path: Path) -> None:
    given = [o for o in tiny("finetune", "stream.num_tasks=2") if not o.startswith("strategy=")]
    code, told = sweep("seed=0,1", "hydra.sweep.subdir=same", *given)

    assert code == 1
    assert told[0] == "clpeft: sweep of 2 runs: 1 completed, 1 failed"
    assert "same holds another run (finetune-s0-" in told[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_runs_stops_the_sweep(
    sweep: Any, instant: list[Path], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    work = launching.launch

    def launch(composed: DictConfig, directory: Path) -> float | None:
        score = work(composed, directory)
        os.kill(os.getpid(), number)
        return score

    monkeypatch.setattr(launching, "launch", launch)
    code, told = sweep("seed=1,2,3")

    assert code == 128 + number
    assert len(instant) == 1
    assert told[0] == "clpeft: sweep of 3 runs: 1 completed, 2 not started"


def test_a_signal_in_a_run_stops_the_sweep_after_it_is_saved(
    sweep: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [o for o in tiny("finetune", "stream.num_tasks=2") if not o.startswith("strategy=")]
    save = Checkpoints.save

    def stop(self: Checkpoints, loop: Any) -> None:
        save(self, loop)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        code, told = sweep("seed=0,1", *given)
    assert code == 143  # 128 and the number of SIGTERM
    assert told[0] == "clpeft: sweep of 2 runs: 1 preempted, 1 not started"
    assert "stopped by SIGTERM" in told[1]
    (first,) = (tmp_path / "outputs" / "toy").iterdir()

    # the same command: what stopped goes on from its checkpoint, the other is done
    code, told = sweep("seed=0,1", *given)
    assert (code, told) == (0, ["clpeft: sweep of 2 runs: 2 completed"])
    assert json.loads((first / "status.json").read_text())["attempt"] == 2


def test_a_preemption_can_travel_between_processes() -> None:
    import pickle

    copy = pickle.loads(pickle.dumps(Preempted(signal.SIGUSR1)))
    assert (copy.signal, str(copy)) == (signal.SIGUSR1, str(Preempted(signal.SIGUSR1)))
    assert isinstance(pickle.loads(pickle.dumps(Busy("it is busy"))), Busy)


# Several at once.


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """`clpeft -m` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "clpeft", "-m", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_joblib_gives_the_bits_of_one_after_the_other(
    sweep: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [o for o in tiny("finetune", "stream.num_tasks=2") if not o.startswith("strategy=")]
    given = ["strategy=finetune,ewc,[finetune,replay]", *given]
    at_once = start(tmp_path, *given, "hydra/launcher=joblib", "paths.output_dir=joblib")
    _, err = at_once.communicate(timeout=300)
    code, _ = sweep(*given, "paths.output_dir=basic")

    assert at_once.returncode == code == 1
    told = err[err.index("clpeft: sweep of") :].splitlines()
    assert told[0] == "clpeft: sweep of 3 runs: 2 completed, 1 failed"
    assert "'finetune' is a reference" in told[1]  # raised in a worker, where nothing is left
    runs = sorted(path.name for path in (tmp_path / "basic" / "toy").iterdir())
    assert [name.partition("-")[0] for name in runs] == ["ewc", "finetune"]
    processes = set()
    for name in runs:
        one, other = (tmp_path / place / "toy" / name for place in ("basic", "joblib"))
        matrices = [json.loads((f / "results.json").read_text())["matrix"] for f in (one, other)]
        assert matrices[0] == matrices[1]
        weights = sorted(path.relative_to(one) for path in one.glob("adapters/*/*.safetensors"))
        assert weights
        for path in weights:
            a, b = load_file(one / path), load_file(other / path)
            assert a.keys() == b.keys()
            assert all(a[key].equal(b[key]) for key in a)
        processes.add(json.loads((other / "status.json").read_text())["process"])
    assert len(processes) == 2
    assert at_once.pid not in processes


def test_ctrl_c_lets_runs_in_other_processes_save(tiny: Any, tmp_path: Path) -> None:
    given = tiny("finetune", "training.epochs=100000", "hydra/launcher=joblib", "seed=0,1,2")
    process = start(tmp_path, *given)
    try:
        deadline = time.monotonic() + 200
        histories: list[Path] = []
        while sum('"step"' in path.read_text() for path in histories) < 2:
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.2)
            histories = list(tmp_path.glob("outputs/toy/*/history.jsonl"))
        os.killpg(process.pid, signal.SIGINT)  # to all of them, as a terminal does
        _, told = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    assert process.returncode == 130
    assert "Traceback" not in told
    assert "clpeft: sweep of 3 runs: 2 preempted, 1 not started" in told
    for path in histories:
        status = RunDirectory(path.parent).status
        assert status["status"] == "preempted"
        assert "stopped by SIGTERM" in status["reason"]  # from the sweep, not the terminal's own
        assert not RunDirectory(path.parent).is_claimed


def threads() -> str:
    return os.environ["OMP_NUM_THREADS"]  # by which torch goes in a new process


@pytest.mark.parametrize("wanted", [None, "3"])
def test_processes_share_the_cores_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None
) -> None:
    if wanted is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    # what hydra/launcher=joblib does with n_jobs=2, in processes that are new
    get_reusable_executor().shutdown(wait=True)
    each = joblib.Parallel(n_jobs=2, backend="loky")(joblib.delayed(threads)() for _ in range(2))
    get_reusable_executor().shutdown(wait=True)

    assert each == [wanted or str(max(1, joblib.cpu_count() // 2))] * 2


@pytest.mark.parametrize(("group", "name"), [("launcher", "joblib"), ("sweeper", "optuna")])
def test_without_the_extra_it_is_told_how_to_install_it(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, group: str, name: str
) -> None:
    expand(["seed=0"])  # the plugins are found, and store what they offer
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"][group], f"{name}.yaml")
    code, told = sweep("seed=0,1", f"hydra/{group}={name}")

    assert code == 1
    assert told == [
        f"clpeft: hydra/{group}={name} needs packages that are not installed: "
        f"pip install 'clpeft[sweep]'."
    ]


# Tuning.

OPTUNA = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SQLAlchemy's, about Optuna
def test_optuna_maximises_and_its_command_can_be_repeated(
    sweep: Any, instant: list[Path], tmp_path: Path
) -> None:
    search = [*OPTUNA, "experiment=tune", "seed=range(0,1000)"]
    code, told = sweep(*search)
    first = list(instant)
    tried = [int(path.name.split("-s")[1].split("-")[0]) for path in first]
    found = yaml.safe_load((tmp_path / "outputs" / "tune/optimization_results.yaml").read_text())

    assert code == 0
    assert told[0] == "clpeft: sweep of 4 runs: 4 completed"
    assert len({*tried}) > 1
    # the score of these runs is their seed
    assert found["best_params"] == {"seed": max(tried)}
    assert found["best_value"] == max(tried)

    sweep(*search)
    assert instant[4:] == first


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_optuna_goes_on_past_failures(sweep: Any, instant: list[Path]) -> None:
    code, told = sweep(*OPTUNA, "experiment=tune", "seed=choice(13,14)")

    assert code == 1
    assert len(instant) == 4
    assert "RuntimeError: thirteen" in "\n".join(told)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_optuna_must_not_see_test_scores(sweep: Any, instant: list[Path]) -> None:
    code, told = sweep(*OPTUNA, "seed=range(0,10)")

    assert code == 1
    assert instant == []
    assert "would choose by those of the test data; add experiment=tune" in told[-1]


def test_a_worker_that_was_killed_is_told_in_a_sentence(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: Any, **__: Any) -> None:
        raise TerminatedWorkerError("A worker process managed by the executor was terminated")

    monkeypatch.setattr(WatchedLauncher, "launch", launch)
    code, told = sweep("seed=0,1")

    assert code == 1
    assert told[0] == "clpeft: sweep of 2 runs: 2 not started"
    assert "repeat the command with a smaller hydra.launcher.n_jobs" in told[-1]
