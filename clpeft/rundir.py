"""The run directory: its frozen config, its status and its results."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from clpeft import slurm
from clpeft.config import ConfigError, differences, result_settings, run_name

log = logging.getLogger(__name__)

RESULTS_SCHEMA = 1  # of results.json; raised when a reader of old files would be misled
# what a run writes, Hydra's own files among them
LEFT_BY_A_RUN = (
    *("config.yaml", "status.json", "results.json", "serving.json", "history.jsonl"),
    *("run.log", "slurm.log"),
    *("checkpoints", "adapters", "generated", "wandb", "tensorboard", ".hydra", "tokenizer"),
)
LOCK = ".lock"
KILLED = "killed"  # what becomes of a run without a word in its status.json
# how long a claim is waited for: no longer than somebody takes who only looks whether it is held
LOCK_SECONDS = 1.0
# what reading something else in place of a run's config.yaml raises
NOT_A_CONFIG = (
    *(OSError, ValueError, KeyError, AttributeError, AssertionError),
    *(OmegaConfBaseException, YAMLError),
)
PACKAGES = ("clpeft", "torch", "transformers", "peft", "accelerate", "datasets", "hydra-core")


class Busy(ConfigError):
    """Another process works in the run directory."""


class RunDirectory:
    """One run's directory, from its creation to its results.

    Args:
        path: Where it lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def status(self) -> dict[str, Any]:
        """What status.json says; empty if the run was never started."""
        return _read(self.path / "status.json")

    @property
    def results(self) -> dict[str, Any]:
        """What results.json says; empty if the run is not completed."""
        return _read(self.path / "results.json")

    @property
    def completed_results(self) -> dict[str, Any]:
        """The results of a run that is completed; else empty."""
        return self.results if self.status.get("status") == "completed" else {}

    @property
    def serving(self) -> dict[str, Any]:
        """What serving.json says; empty if the run has not begun to train."""
        return _read(self.path / "serving.json")

    @property
    def frozen(self) -> DictConfig | None:
        """The config that it was created with; None if it was not created yet.

        Raises:
            ConfigError: If config.yaml is not the config of a run.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            return None
        try:
            loaded = OmegaConf.load(path)
            assert isinstance(loaded, DictConfig)
            run_name(loaded)
        except NOT_A_CONFIG as error:
            raise ConfigError(f"{path} is not the config of a run ({error}).") from error
        return loaded

    def check_is_for(self, composed: DictConfig) -> None:
        """Refuses a directory that holds another run, whose result or state would be taken over.

        Raises:
            ConfigError: If it does.
        """
        frozen = self.frozen
        if frozen is None:
            return
        name, wanted = run_name(frozen), run_name(composed)
        if name != wanted:
            told = differences(result_settings(frozen), result_settings(composed))
            raise ConfigError(
                f"{self.path} holds another run ({name}, not {wanted}: {told}); give this one a "
                f"directory of its own, or leave hydra.run.dir and hydra.sweep.subdir to clpeft."
            )

    def clear(self) -> None:
        """Removes what an earlier run left, and nothing else, so that the next starts afresh."""
        for name in LEFT_BY_A_RUN:
            item = self.path / name
            if item.is_dir():
                shutil.rmtree(item)
            else:
                item.unlink(missing_ok=True)

    def discard_if_empty(self) -> None:
        """Removes the directory that Hydra made for a run that was refused, and those around it.

        A run lies in `<output_dir>/<stream>/`; both go too if nothing else is in them.
        """
        here = Path.cwd().resolve()
        for folder in (self.path, *self.path.parents[:2]):
            inside = here.is_relative_to(folder.resolve())
            if inside or not folder.is_dir() or any(folder.iterdir()):
                return
            folder.rmdir()

    def freeze(self, composed: DictConfig) -> None:
        """Writes config.yaml, resolved, when the run is created."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.yaml").exists():
            _write(self.path / "config.yaml", OmegaConf.to_yaml(composed, resolve=True))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps every other process out of the directory while this one works in it.

        The lock is the operating system's: it goes with the process, however that ends.

        Raises:
            Busy: If another process works in it.
            ConfigError: If it cannot be written.
        """
        lock = FileLock(self.path / LOCK, timeout=LOCK_SECONDS)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            status = self.status
            where = f"process {status.get('process', '?')} on {status.get('host', '?')}"
            raise Busy(
                f"{self.path} is being worked on by {where}; wait for it to end, or stop it."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"The run directory {self.path} cannot be written or locked ({error.strerror}); "
                f"make it writable, or set paths.output_dir to a folder on a file system that "
                f"has locks."
            ) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def is_claimed(self) -> bool:
        """Whether a process works in the directory right now; looking changes nothing in it."""
        try:
            looking = os.open(self.path / LOCK, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:  # not ours to read; then it is not ours to doubt either
            return self.status.get("status") == "running"
        try:
            # a shared lock, given back at once: whoever claims the directory waits longer than that
            fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return self.status.get("status") == "running"
        finally:
            os.close(looking)
        return False

    @property
    def was_killed(self) -> bool:
        """Whether the run calls itself running, or queued, although nothing works on it any more.

        So after SIGKILL, and after the cancellation of a job that had not begun.
        """
        if self.status.get("status") not in ("running", "queued") or self.is_claimed:
            return False
        status = self.status  # again: it may have ended in between, and then says how
        job = status.get("job_id")
        if job and slurm.is_in_queue(job):  # on a machine whose locks are not seen here
            return False
        if status.get("status") == "queued":
            return bool(job) and slurm.is_here()
        if status.get("status") != "running":
            return False
        # a directory from before there were locks
        return (self.path / LOCK).exists() or _process_is_gone(status)

    @property
    def worker(self) -> str:
        """Who works on the run, or did, or is to: a process, or a job of SLURM."""
        status = self.status
        if status.get("status") == "queued":
            return f"SLURM job {status.get('job_id', '?')}"
        return f"process {status.get('process', '?')} on {status.get('host', '?')}"

    def queue(self, **facts: Any) -> None:
        """Notes that a batch system is to run this.

        Args:
            facts: What else is to stand in status.json, such as the job's id.
        """
        self._tell({"status": "queued", "queued": time.time(), **facts})

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keeps status.json true while the run goes on inside, however it ends.

        Raises:
            Whatever was raised inside, after it was written down.
        """
        status = {
            "status": "running",
            "host": socket.gethostname(),
            "process": os.getpid(),
            "command": shlex.join(["clpeft", *sys.argv[1:]]),
            "job_id": job_id(),
            "attempt": self.status.get("attempt", 0) + 1,  # how often it was started or continued
            "git_commit": git_commit(),
            "versions": versions(),
            "started": time.time(),
        }
        self._tell(status)
        try:
            yield
        except KeyboardInterrupt as asked:  # Preempted among them
            reason = str(asked) or "interrupted (Ctrl-C); the same command continues it"
            told = {"status": "preempted", "reason": reason, "ended": time.time()}
            self._tell_if_possible(status | told)
            # SLURM may be slow to answer, and there may be no time to wait for it
            if (why := slurm.reason(asked, job_id())) is not None:
                reason = why
                self._tell_if_possible(status | told | {"reason": reason})
            log.warning("%s: %s", self.path, reason)
            raise
        except BaseException as error:
            told = {
                "status": "failed",
                "exception": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
                "ended": time.time(),
            }
            self._tell_if_possible(status | told)
            log.error("%s failed: %s", self.path, told["exception"])
            raise
        self._tell(status | {"status": "completed", "ended": time.time()})

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes results.json whole or not at all."""
        _write(self.path / "results.json", json.dumps(results, indent=1) + "\n")

    def write_serving(self, facts: dict[str, Any]) -> None:
        """Writes serving.json whole or not at all."""
        _write(self.path / "serving.json", json.dumps(facts, indent=1) + "\n")

    def _tell_if_possible(self, status: dict[str, Any]) -> None:
        """Says how a run ended; a full disk must not hide why it did."""
        try:
            self._tell(status)
        except OSError as error:
            log.error("%s could not be written (%s)", self.path / "status.json", error)

    def _tell(self, status: dict[str, Any]) -> None:
        _write(self.path / "status.json", json.dumps(status, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def job_id() -> str | None:
    """The SLURM job that this process belongs to, `<array job>_<element>` in an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def git_commit() -> str | None:
    """The commit of clpeft's own source; None where it was installed from a wheel."""
    source = Path(__file__).resolve().parent
    # a wheel may lie inside a repository that is not ours
    if _git(source, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(source, "describe", "--always", "--dirty", "--abbrev=40")


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _process_is_gone(status: dict[str, Any]) -> bool:
    """Whether the process of a run has ended; False where that cannot be known."""
    process = status.get("process")
    if not isinstance(process, int) or status.get("host") != socket.gethostname():
        return False
    try:
        os.kill(process, 0)  # signal 0 asks whether it is there and does nothing to it
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError:
        log.warning("%s is not readable JSON and is taken as missing", path)
        return {}


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also if the power fails."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
