"""A sweep that is submitted to SLURM through submitit, and waited for."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from clpeft import slurm
from clpeft.config import ConfigError, RunError
from clpeft.launching import check, resume_directory
from clpeft.mistakes import explain
from clpeft.rundir import RunDirectory
from clpeft.slurm import SlurmSettings
from clpeft.stopping import Preempted
from clpeft.submission import (
    OWN_LOG,
    check_apart,
    launcher_settings,
    new_folder,
    note_queued,
    prepare,
    release,
    sort_out,
)
from clpeft.sweeps import Planned, plan

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

log = logging.getLogger(__name__)

# how often SLURM is asked: at first often, for short runs, later as seldom as is polite
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
# for which a run's own last words may be later than SLURM's, on a shared file system
LAST_WORDS_SECONDS = 5.0


class ResumeInJob:
    """What a job of submitit does: continues the run of a directory."""

    def __call__(self, directory: str) -> None:
        """Does it, with all that is written from now on in the run's own log."""
        with open(Path(directory) / OWN_LOG, "ab") as own:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(own.fileno(), 1)
            os.dup2(own.fileno(), 2)
        try:
            resume_directory(Path(directory))
        except Preempted as asked:
            sys.exit(asked.exit_code)
        except Exception as error:
            sentence = explain(error)
            if sentence is not None:
                print(f"clpeft: {sentence}", file=sys.stderr)
            raise

    def checkpoint(self, directory: str) -> DelayedSubmission:
        """What submitit starts again if the job's time is over before the run has begun."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, directory)


def run_on_slurm(
    loader: Any, config: DictConfig, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Submits the runs of a sweep that are left to do as one array job, and waits for all.

    Args:
        loader: Hydra's config loader.
        config: What the sweep was started with.
        job_overrides: Of each run.
        first: Number of the first of them.

    Returns:
        One answer per run: its average accuracy, or what it failed of. What became of one that
        was cancelled or killed stands in its directory.

    Raises:
        ConfigError: If SLURM does not take the job.
    """
    settings = launcher_settings(config)
    planned = [plan(loader, config, one, number) for number, one in enumerate(job_overrides, first)]
    check_apart(planned)
    refused: dict[Path, Exception] = {}
    accepted = []
    for run in planned:
        try:
            check(run.composed, run.directory)
            accepted.append(run)
        except ConfigError as error:
            refused[run.directory] = error
    runs = sort_out(accepted)
    if runs.left:
        _submit(runs.left, settings)
    waited_for = [*runs.left, *runs.busy]
    try:
        _wait(waited_for)
    except KeyboardInterrupt:
        jobs = sorted({job.partition("_")[0] for job in _jobs(waited_for)})
        log.warning(
            "No longer waiting; the runs go on in SLURM. The same command waits for them again, "
            "scancel %s ends them.",
            " ".join(jobs),
        )
        raise
    return [_answer(run, refused.get(run.directory)) for run in planned]


def _submit(runs: Sequence[Planned], settings: SlurmSettings) -> None:
    import submitit

    folder = new_folder(settings)
    for run in runs:
        prepare(run)
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    executor.update_parameters(
        timeout_min=settings.timeout_min,
        slurm_array_parallelism=settings.array_parallelism,
        slurm_signal_delay_s=settings.signal_delay_s,
        slurm_setup=settings.setup,
        # held until every directory says queued: see clpeft.submission
        slurm_additional_parameters={**slurm.sbatch_options(settings), "hold": True},
    )
    jobs = executor.map_array(ResumeInJob(), [str(run.directory) for run in runs])
    for run, job in zip(runs, jobs, strict=True):
        note_queued(run, job.job_id)
    array = jobs[0].job_id.partition("_")[0]
    release(array)
    log.info("submitted %d runs as job %s; squeue --jobs=%s follows it", len(runs), array, array)


def _jobs(runs: Sequence[Planned]) -> set[str]:
    """The jobs of some runs, as their directories name them."""
    found = (RunDirectory(run.directory).status.get("job_id") for run in runs)
    return {str(job) for job in found if job}


def _wait(runs: Sequence[Planned]) -> None:
    """Returns when none of the runs is in SLURM's queue or worked on here."""
    pause = FIRST_WAIT
    while runs:
        try:
            queue = slurm.states(_jobs(runs))
        except ConfigError as error:  # a controller that restarts, for one; the jobs go on
            log.warning("%s Trying again in %d seconds.", error, LONGEST_WAIT)
            time.sleep(LONGEST_WAIT)
            continue
        if not queue and not any(RunDirectory(run.directory).is_claimed for run in runs):
            return
        time.sleep(pause)
        pause = min(pause * 1.2, LONGEST_WAIT)


def _answer(run: Planned, refused: Exception | None) -> JobReturn:
    answer = JobReturn(overrides=run.overrides, cfg=run.composed, status=JobStatus.COMPLETED)
    if refused is not None:
        answer.status, answer.return_value = JobStatus.FAILED, refused
        return answer
    record = RunDirectory(run.directory)
    deadline = time.monotonic() + LAST_WORDS_SECONDS
    while record.was_killed and time.monotonic() < deadline:
        time.sleep(0.5)
    if record.status.get("status") == "failed":
        answer.status = JobStatus.FAILED
        answer.return_value = RunError(record.status.get("exception", ""))
        return answer
    answer.return_value = record.results.get("metrics", {}).get("average_accuracy")
    return answer
