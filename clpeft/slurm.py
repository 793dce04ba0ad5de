"""SLURM, as a run inside a job and a submission outside of it need it: asked, and told."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from omegaconf import MISSING

from clpeft.config import ConfigError, at_least
from clpeft.stopping import REQUEUED_AFTER, Preempted

log = logging.getLogger(__name__)

ANSWER_SECONDS = 60  # for which a command of SLURM may take


@dataclass
class SlurmSettings:
    """What a run's job asks of the cluster: `hydra.launcher.*` where hydra/launcher=slurm."""

    _target_: str = MISSING
    folder: str = MISSING  # where batch scripts, lists of runs and the jobs' own output go
    name: str = MISSING  # of the job, as squeue shows it
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: int = at_least(1)  # minutes until SLURM ends a job
    gpus_per_node: int = at_least(0)
    cpus_per_task: int | None = at_least(1, default=None)
    mem_gb: float | None = at_least(0, default=None)
    array_parallelism: int = at_least(1)  # how many runs work at once
    signal_delay_s: int = at_least(1)  # seconds before the end at which a run saves and requeues
    requeue: bool = True  # whether SLURM may start a job again after that
    setup: list[str] = field(default_factory=list)  # lines of bash before the run
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # other options of sbatch


def sbatch_options(settings: SlurmSettings) -> dict[str, Any]:
    """The options of sbatch that some settings stand for.

    Args:
        settings: What a job asks for.

    Returns:
        Option to value, `True` for an option without one.
    """
    options: dict[str, Any] = {
        "job-name": settings.name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": settings.timeout_min,
        "gpus-per-node": settings.gpus_per_node or None,
        "cpus-per-task": settings.cpus_per_task,
        "mem": None if settings.mem_gb is None else f"{round(settings.mem_gb * 1024)}M",
        "requeue" if settings.requeue else "no-requeue": True,
        # a job that is requeued goes on writing where it was
        "open-mode": "append",
        **settings.additional_parameters,
    }
    return {option: value for option, value in options.items() if value is not None}


def call(*command: str) -> str:
    """What a command of SLURM answers.

    Args:
        command: The command and its arguments.

    Raises:
        ConfigError: If it is not there or fails, in its own words.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]} is not found, so this machine is not part of a SLURM cluster; submit "
            f"from one that is, or run here with clpeft -m."
        )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]} gave no answer in {ANSWER_SECONDS} seconds.") from error
    if done.returncode != 0:
        told = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"{' '.join(command)} failed: {'; '.join(told) or done.returncode}.")
    return done.stdout


def states(jobs: Iterable[str]) -> dict[str, str]:
    """The states of those jobs that are in the queue: waiting, running, or about to end.

    Args:
        jobs: Job ids, those of array elements as `<array job>_<element>`.

    Returns:
        Job id to state, such as PENDING; ended and unknown jobs are left out.

    Raises:
        ConfigError: If SLURM does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    found = _squeue(",".join(sorted({job.partition("_")[0] for job in wanted})))
    return {job: state for job, state in found.items() if job in wanted}


def _squeue(arrays: str) -> dict[str, str]:
    try:
        told = call("squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={arrays}")
    except ConfigError as error:
        if "Invalid job id" in str(error):  # SLURM has forgotten the only one that was asked for
            return {}
        raise
    return dict(line.split(maxsplit=1) for line in told.splitlines() if line.strip())


def is_here() -> bool:
    """Whether there is a SLURM to ask."""
    return shutil.which("squeue") is not None


def is_in_queue(job: str) -> bool:
    """Whether a job waits, runs or is about to end.

    Args:
        job: Its id.

    Returns:
        False where there is no SLURM to ask; True if it does not answer, because then the job has
        to be taken for alive.
    """
    try:
        return is_here() and job in _array(job.partition("_")[0], round(time.monotonic()))
    except ConfigError as error:
        log.warning("%s", error)
        return True


@lru_cache(maxsize=256)
def _array(job: str, now: int) -> frozenset[str]:
    """The elements of an array that are in the queue; asked once a second for all of them."""
    return frozenset(_squeue(job))


def why_ended(job: str, restarts: int) -> str | None:
    """Why SLURM is ending a job that goes on at the moment.

    Args:
        job: Its id.
        restarts: How often it had been restarted when it began, as the job itself knows.

    Returns:
        In a few words; None if SLURM is not ending it, or does not say.
    """
    try:
        told = call("scontrol", "show", "job", "--oneliner", job)
    except ConfigError as error:
        log.warning("%s", error)
        return None
    facts = dict(re.findall(r"(\w+)=(\S+)", told))
    state = facts.get("JobState", "")
    # what has been requeued counts one restart more, and is in no other way unlike a cancelled one:
    # both are COMPLETING until their processes are gone
    if int(facts.get("Restarts", 0)) > restarts:
        return "requeued"
    if state == "TIMEOUT" or (state == "COMPLETING" and _out_of_time(facts)):
        return "out of time"
    if state in ("CANCELLED", "COMPLETING"):
        return "cancelled"
    return "preempted" if state == "PREEMPTED" else None


def _out_of_time(facts: dict[str, str]) -> bool:
    """Whether a job lasted for its whole time limit."""
    try:
        began, ended = (datetime.fromisoformat(facts[key]) for key in ("StartTime", "EndTime"))
        days, _, clock = facts["TimeLimit"].rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
    except (KeyError, ValueError):  # UNLIMITED, Unknown
        return False
    limit = timedelta(days=int(days or 0), hours=hours, minutes=minutes, seconds=seconds)
    return ended - began >= limit


def reason(asked: KeyboardInterrupt, job: str | None) -> str | None:
    """Why a run inside a job was stopped, in SLURM's terms.

    Args:
        asked: What stopped it.
        job: The id of its job; None outside of one.

    Returns:
        One sentence; None if SLURM had no part in it.
    """
    if job is None or not isinstance(asked, Preempted):
        return None
    if asked.signal in REQUEUED_AFTER:
        return f"stopped by {asked.signal.name}, which SLURM sends before a job's time is over"
    if asked.signal != signal.SIGTERM:
        return None
    why = why_ended(job, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    if why == "requeued":
        return f"SLURM requeued job {job}, which continues the run"
    if why is None:
        return None
    return f"{why}: SLURM ended job {job}; clpeft submit, or clpeft resume, continues the run"


def requeue_if_asked(asked: Preempted, job: str | None) -> None:
    """Has SLURM start this job again, if the run was stopped by a signal that asks for that.

    SIGTERM does not: a job that was cancelled stays so, and one that SLURM itself takes away for a
    while is requeued by SLURM.

    Args:
        asked: What stopped the run, whose status says so by now.
        job: The id of its job; None outside of one.
    """
    if job is None or asked.signal not in REQUEUED_AFTER:
        return
    # SLURM ends what is left of a job that it requeues, and nothing is left that could be saved
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        call("scontrol", "requeue", job)
    except ConfigError as error:
        log.warning("%s The same command, or clpeft resume, continues the run.", error)
        return
    log.info("SLURM starts job %s again", job)
