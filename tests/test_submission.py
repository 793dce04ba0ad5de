"""Submitting sweeps: what is submitted, what is left out, and what a job then does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from clpeft import cli
from clpeft.rundir import RunDirectory
from clpeft.slurm import SlurmSettings
from clpeft.submission import batch_script
from tests.test_slurm import SETTINGS

SWEEP = ("strategy=ewc,replay", "seed=0,1")


class Answer:
    """What a command answered."""

    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def clpeft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Runs a command line in this process, in an empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def command(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["clpeft", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Answer(end.value.code or 0, *capsys.readouterr())

    return command


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without SLURM, whatever this one is."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_slurm: None
) -> Callable[[], list[str]]:
    """A SLURM in name: it takes jobs, says what `queue` says, and notes what it was told."""
    told = tmp_path / "told"
    told.touch()
    (tmp_path / "queue").touch()
    scripts = {
        "sbatch": f'echo "sbatch $*" >>{told}; echo 77',
        "scontrol": f'echo "scontrol $*" >>{told}',
        "squeue": f"while read -r line; do echo $line; done <{tmp_path}/queue",
    }
    for name, text in scripts.items():
        script = tmp_path / "bin" / name
        script.write_text(f"#!/bin/bash\n{text}\n")
        script.chmod(0o755)
    return lambda: told.read_text().splitlines()


def runs() -> dict[str, RunDirectory]:
    return {p.name.rpartition("-")[0]: RunDirectory(p) for p in Path("outputs/toy").iterdir()}


def test_submission_freezes_queues_and_releases(
    clpeft: Callable[..., Answer], cluster: Callable[[], list[str]]
) -> None:
    answer = clpeft("submit", *SWEEP, "hydra.launcher.partition=gpu")
    (folder,) = Path("outputs/.slurm").absolute().iterdir()
    found = runs()

    assert (answer.code, answer.err) == (0, "")
    assert "Submitted 4 runs as job 77." in answer.out
    assert "squeue --jobs=77" in answer.out
    # held until every directory says what it waits for
    assert cluster() == [f"sbatch --parsable --hold {folder}/run.sbatch", "scontrol release 77"]
    listed = [Path(line).name for line in (folder / "directories.txt").read_text().splitlines()]
    order = ["ewc-s0", "ewc-s1", "replay-s0", "replay-s1"]
    assert [name.rpartition("-")[0] for name in listed] == order
    for element, name in enumerate(order):
        status = found[name].status
        assert (status["status"], status["job_id"]) == ("queued", f"77_{element}")
        frozen = OmegaConf.load(found[name].path / "config.yaml")
        assert [*frozen.strategies] == [name[:-3]]
        assert frozen.seed == int(name[-1])
    script = (folder / "run.sbatch").read_text()
    assert "#SBATCH --array=0-3%256\n" in script
    assert "#SBATCH --partition=gpu\n" in script
    assert "#SBATCH --signal=B:USR1@120\n" in script


def test_repeated_submission_leaves_out_what_is_done_or_under_way(
    clpeft: Callable[..., Answer], cluster: Callable[[], list[str]], tmp_path: Path
) -> None:
    clpeft("submit", *SWEEP)
    found = runs()
    # completed; failed; waits in the queue; worked on here, by hand
    done = {"status": "completed", "job_id": "77_0", "attempt": 1}
    (found["ewc-s0"].path / "status.json").write_text(json.dumps(done))
    (found["ewc-s0"].path / "results.json").write_text('{"metrics": {}}')
    failed = {"status": "failed", "job_id": "77_1", "attempt": 3}
    (found["ewc-s1"].path / "status.json").write_text(json.dumps(failed))
    (tmp_path / "queue").write_text("77_2 PENDING\n")

    with found["replay-s1"].claimed():
        answer = clpeft("submit", *SWEEP, "tracking.log_every=3")
    assert "1 run completed already." in answer.out
    assert "2 runs in the queue or at work:" in answer.out
    assert f"{found['replay-s0'].path} (job 77_2)" in answer.out
    assert "Submitted 1 run as job 77." in answer.out
    assert found["ewc-s0"].status == done
    status = found["ewc-s1"].status
    # it counts on: the next attempt is the fourth
    assert (status["status"], status["job_id"], status["attempt"]) == ("queued", "77_0", 3)
    # what cannot change a result is taken from the new command
    assert OmegaConf.load(found["ewc-s1"].path / "config.yaml").tracking.log_every == 3

    (tmp_path / "queue").write_text("77_0 RUNNING\n77_2 PENDING\n77_3 PENDING\n")
    before = len(cluster())
    last = clpeft("submit", *SWEEP)
    assert last.code == 0
    assert "Nothing is left to submit." in last.out
    assert len(cluster()) == before


def test_force_submits_what_is_completed(
    clpeft: Callable[..., Answer], cluster: Callable[[], list[str]]
) -> None:
    clpeft("submit", "seed=0")
    (record,) = runs().values()
    (record.path / "status.json").write_text('{"status": "completed"}')
    (record.path / "results.json").write_text('{"metrics": {}}')

    assert "Submitted 1 run" in clpeft("submit", "-m", "seed=0", "force=true").out
    assert record.results == {}


def test_dry_run_needs_no_cluster_and_leaves_nothing(
    clpeft: Callable[..., Answer], no_slurm: None, tmp_path: Path
) -> None:
    answer = clpeft("submit", "--dry-run", *SWEEP)

    assert answer.code == 0
    assert "Would submit 4 runs:\n  outputs/toy/ewc-s0-" in answer.out
    assert "#SBATCH --array=0-3%256" in answer.out
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["submit", "seed=0"], "sbatch is not found"),
        (["-m", "hydra/launcher=slurm", "seed=0"], "sbatch is not found"),
    ],
)
def test_machine_without_slurm_is_told_in_one_sentence(
    clpeft: Callable[..., Answer],
    no_slurm: None,
    tmp_path: Path,
    arguments: list[str],
    told: str,
) -> None:
    answer = clpeft(*arguments)

    assert answer.code == 1
    assert answer.err.startswith(f"clpeft: {told}")
    assert answer.err.count("\n") == 1
    assert list((tmp_path / "here").rglob("status.json")) == []


def test_launcher_without_submitit_says_how_to_install_it(
    clpeft: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == "submitit" else find(name, *more)

    monkeypatch.setattr(util, "find_spec", without)
    answer = clpeft("-m", "hydra/launcher=slurm", "seed=0,1")

    assert answer.code == 1
    assert answer.err == (
        "clpeft: hydra/launcher=slurm needs submitit, which is not installed: "
        "pip install 'clpeft[slurm]'; clpeft submit works without it.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["seed=0,-1"], "seed=-1 is too small; it must be at least 0."),
        (["hydra.launcher.partitoin=gpu"], "Did you mean 'hydra.launcher.partition'"),
        (["hydra.launcher.timeout_min=0"], "hydra.launcher.timeout_min=0 is too small"),
        (["hydra.launcher.timeout_min=long"], "timeout_min=long is of the wrong type"),
        (["hydra/launcher=basic"], "hydra/launcher=basic cannot submit to SLURM; leave it out."),
        (["hydra.sweep.subdir=one", "seed=0,1"], "Two runs of this sweep would lie in "),
    ],
)
def test_mistake_refuses_the_whole_submission(
    clpeft: Callable[..., Answer],
    cluster: Callable[[], list[str]],
    tmp_path: Path,
    arguments: list[str],
    told: str,
) -> None:
    answer = clpeft("submit", *arguments)

    assert answer.code == 1
    assert told in answer.err
    assert answer.err.count("\n") == 1
    assert cluster() == []
    assert list((tmp_path / "here").iterdir()) == []


def test_refusal_by_slurm_is_told_in_its_words(
    clpeft: Callable[..., Answer], cluster: Callable[[], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition specified: none' >&2\nexit 1\n"
    )
    answer = clpeft("submit", "seed=0", "hydra.launcher.partition=none")

    assert answer.code == 1
    assert answer.err.endswith("failed: sbatch: error: invalid partition specified: none.\n")
    (record,) = runs().values()
    assert record.status == {}


def run_script(script: str, element: int, folder: Path) -> None:
    path = folder / "script"
    path.write_text(script)
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(element)}
    subprocess.run([shutil.which("bash") or "", path], env=environment, check=True, cwd=folder)


@pytest.mark.parametrize(
    ("gpus", "started"),
    [
        (0, "-m clpeft resume {directory}"),
        (
            4,
            "-m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 4 "
            "--main_process_port 0 "
            "--module clpeft resume {directory}",
        ),
    ],
)
def test_element_of_the_array_resumes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, started: str
) -> None:
    folder = tmp_path / "batch folder"  # names with spaces are names too
    directories = [tmp_path / f"run {number}" for number in range(3)]
    for directory in (folder, *directories):
        directory.mkdir()
    (folder / "directories.txt").write_text("".join(f"{path}\n" for path in directories))
    python = tmp_path / "a python"
    python.write_text(
        '#!/bin/bash\necho "$SET $@"\necho "signals ${TORCHELASTIC_SIGNALS_TO_HANDLE:-}"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    values = vars(SETTINGS) | {"gpus_per_node": gpus, "setup": ["export SET=up"]}
    script = batch_script(SlurmSettings(**values), folder, runs=3)
    run_script(script, 1, folder)

    lines = (directories[1] / "slurm.log").read_text().splitlines()
    assert lines[0] == f"up {started.format(directory=directories[1])}"
    assert ("SIGUSR1" in lines[1]) == (gpus > 1)
    assert not (directories[0] / "slurm.log").exists()
    assert "#SBATCH --array=0-2%4\n" in script
    assert "#SBATCH --time=90\n" in script
    assert f"#SBATCH --output='{folder}/element-%a.log'\n" in script
