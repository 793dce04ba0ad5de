"""Sweeps that SLURM works through: one array job, each element of which is one run."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clpeft import slurm
from clpeft.checks import check_fields
from clpeft.composition import register_schemas
from clpeft.config import ConfigError
from clpeft.launching import check
from clpeft.mistakes import explain
from clpeft.outcomes import shown
from clpeft.rundir import RunDirectory
from clpeft.slurm import SlurmSettings
from clpeft.sweeps import Planned, runs_of

log = logging.getLogger(__name__)

LAUNCHER = "hydra/launcher=slurm"
DIRECTORIES = "directories.txt"  # one line per element of the array
SCRIPT = "run.sbatch"
OWN_LOG = "slurm.log"  # in a run's directory: what its job wrote, attempt after attempt


@dataclass(frozen=True)
class Sorted:
    """The runs of a sweep by what is left to do."""

    left: list[Planned]
    completed: list[Planned]
    busy: list[Planned]  # in SLURM's queue, or being worked on by a process of this machine


def submit(overrides: Sequence[str], *, dry_run: bool = False) -> int:
    """What `clpeft submit` does: submits what is left of a sweep, and returns at once.

    Args:
        overrides: As after `clpeft -m`; `hydra.launcher.*` is what the jobs ask of the cluster.
        dry_run: Whether to tell what would be done, and do nothing.

    Returns:
        The exit code.

    Raises:
        ConfigError: If a run could not work, or SLURM does not take the job; nothing is queued
            then.
    """
    planned, settings = _compose(overrides)
    if not dry_run:
        require_sbatch()
    for run in planned:
        check(run.composed, run.directory)
    check_apart(planned)
    runs = sort_out(planned)
    _tell_rest(runs)
    if not runs.left:
        typer.echo("Nothing is left to submit.")
        return 0
    folder = new_folder(settings)
    script = batch_script(settings, folder, len(runs.left))
    if dry_run:
        typer.echo(f"Would submit {_count(runs.left)}:")
        for run in runs.left:
            typer.echo(f"  {shown(run.directory)}")
        typer.echo(f"with\n{script}", nl=False)
        return 0
    job = _submit(runs.left, folder, script)
    typer.echo(f"Submitted {_count(runs.left)} as job {job}.")
    typer.echo(f"  squeue --jobs={job}    what waits and what runs")
    typer.echo(f"  tail -f {shlex.quote(shown(runs.left[0].directory / OWN_LOG))}")
    typer.echo(f"  clpeft report {shlex.quote(shown(_common(planned)))}")
    typer.echo("The same command submits what is not completed by then.")
    return 0


def _compose(overrides: Sequence[str]) -> tuple[list[Planned], SlurmSettings]:
    """The runs of a sweep, and what their jobs ask for."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    register_schemas()
    given = [LAUNCHER, *overrides, "hydra.mode=MULTIRUN"]
    try:
        with initialize_config_module("clpeft.conf", job_name="clpeft", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            whole = loader.load_configuration("config", given, run_mode=RunMode.MULTIRUN)
            return runs_of(loader, whole), launcher_settings(whole)
    except ConfigError:
        raise
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        raise ConfigError(sentence) from error


def require_sbatch() -> None:
    """Refuses a machine that cannot submit.

    Raises:
        ConfigError: If this is one.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not found, so this machine cannot submit to SLURM; submit from one that "
            "can, or run here with clpeft -m."
        )


def launcher_settings(whole: DictConfig) -> SlurmSettings:
    """What `hydra.launcher` asks of the cluster, checked.

    Args:
        whole: A config with its `hydra` node.

    Raises:
        ConfigError: If another launcher was chosen, or a value is out of range.
    """
    chosen = whole.hydra.runtime.choices["hydra/launcher"]
    if chosen != "slurm":
        raise ConfigError(f"hydra/launcher={chosen} cannot submit to SLURM; leave it out.")
    # resolved where it lies, because it refers to its surroundings
    values = OmegaConf.to_container(whole.hydra.launcher, resolve=True)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(SlurmSettings), values)
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"hydra.launcher.{error.full_key}: {first}.") from error
    settings: SlurmSettings = OmegaConf.to_object(typed)  # type: ignore[assignment]
    check_fields(settings, "hydra.launcher.")
    if settings.signal_delay_s >= 60 * settings.timeout_min:
        raise ConfigError(
            f"hydra.launcher.signal_delay_s={settings.signal_delay_s} is no less than "
            f"hydra.launcher.timeout_min={settings.timeout_min}, so that a run would be told to "
            f"stop as soon as it starts; give it more time."
        )
    return settings


def check_apart(planned: Sequence[Planned]) -> None:
    """Refuses a sweep in which two runs would share a directory.

    Args:
        planned: Its runs.

    Raises:
        ConfigError: If two of them do.
    """
    seen: set[Path] = set()
    for run in planned:
        if run.directory in seen:
            raise ConfigError(
                f"Two runs of this sweep would lie in {run.directory}; leave hydra.sweep.subdir "
                f"to clpeft."
            )
        seen.add(run.directory)


def sort_out(planned: Sequence[Planned]) -> Sorted:
    """Finds what is left to do of a sweep.

    Args:
        planned: Its runs.

    Raises:
        ConfigError: If SLURM does not answer.
    """
    records = [RunDirectory(run.directory) for run in planned]
    stored = [record.status for record in records]
    known = {str(status["job_id"]) for status in stored if status.get("job_id")}
    # where there is no SLURM no job can be in its queue
    queue = slurm.states(known) if shutil.which("squeue") else {}
    sorted_out = Sorted([], [], [])
    for run, record, status in zip(planned, records, stored, strict=True):
        if status.get("job_id") in queue or record.is_claimed:
            sorted_out.busy.append(run)
        elif status.get("status") == "completed" and record.results and not run.composed.force:
            sorted_out.completed.append(run)
        else:
            sorted_out.left.append(run)
    return sorted_out


def prepare(run: Planned) -> None:
    """Freezes a run's config in its directory, as it is now, for a job to find later.

    Args:
        run: The run.

    Raises:
        Busy: If a process works in the directory.
    """
    record = RunDirectory(run.directory)
    with record.claimed():
        # what cannot change a result may have been changed since an earlier attempt
        (record.path / "config.yaml").unlink(missing_ok=True)
        record.freeze(run.composed)


def note_queued(run: Planned, job: str) -> None:
    """Writes down that a job is going to work on a run, in the place of how the last one ended.

    With `force` what the run left goes now, when SLURM has taken the job, and not before.
    """
    record = RunDirectory(run.directory)
    if run.composed.force:
        with record.claimed():
            record.clear()
            record.freeze(run.composed)
    record.queue(job_id=job, attempt=record.status.get("attempt", 0))


def _submit(runs: Sequence[Planned], folder: Path, script: str) -> str:
    """Submits one array job; returns its id."""
    for run in runs:
        prepare(run)
    folder.mkdir(parents=True)
    (folder / DIRECTORIES).write_text("".join(f"{run.directory}\n" for run in runs))
    (folder / SCRIPT).write_text(script)
    # held until every directory says queued: a run that started before that would be overwritten
    job = slurm.call("sbatch", "--parsable", "--hold", str(folder / SCRIPT)).strip().split(";")[0]
    for element, run in enumerate(runs):
        note_queued(run, f"{job}_{element}")
    release(job)
    return job


def release(job: str) -> None:
    """Lets a job start that was submitted held.

    Raises:
        ConfigError: If SLURM does not; what to type is in it, for the job waits.
    """
    try:
        slurm.call("scontrol", "release", job)
    except ConfigError as error:
        raise ConfigError(
            f"{error} Job {job} is submitted and waits; let it start with: scontrol release {job}"
        ) from error


def batch_script(settings: SlurmSettings, folder: Path, runs: int) -> str:
    """The batch script of a submission.

    Args:
        settings: What each of its jobs asks for.
        folder: Where it and the list of directories lie.
        runs: How many elements the array has.
    """
    options = {
        **slurm.sbatch_options(settings),
        "array": f"0-{runs - 1}%{settings.array_parallelism}",
        "chdir": os.getcwd(),
        "output": str(folder / "element-%a.log"),
        # B: to the batch shell, which by then is the run; without it only to what srun started
        "signal": f"B:USR1@{settings.signal_delay_s}",
    }
    directories = shlex.quote(str(folder / DIRECTORIES))
    lines = [
        "#!/bin/bash",
        *(_directive(option, value) for option, value in options.items()),
        "set -e",
        f'directory=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {directories})',
        'echo "$directory"',
        f'exec >>"$directory/{OWN_LOG}" 2>&1',
        *settings.setup,
    ]
    python = shlex.quote(sys.executable)
    if settings.gpus_per_node > 1:
        lines += [
            "# else the launcher dies of the signal that is for the run, or does not wait for it",
            "export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={settings.signal_delay_s}",
            f"exec {python} -m accelerate.commands.launch --multi_gpu --num_machines 1 \\",
            f"    --num_processes {settings.gpus_per_node} --main_process_port 0 \\",
            '    --module clpeft resume "$directory"',
        ]
    else:
        lines.append(f'exec {python} -m clpeft resume "$directory"')
    return "\n".join(lines) + "\n"


def _directive(option: str, value: Any) -> str:
    text = f"#SBATCH --{option}"
    return text if value is True else f"{text}={shlex.quote(str(value))}"


def new_folder(settings: SlurmSettings) -> Path:
    """A folder that no submission has used yet; not made."""
    base = Path(os.path.abspath(settings.folder)) / time.strftime("%Y%m%d-%H%M%S")
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _tell_rest(runs: Sorted) -> None:
    if runs.completed:
        typer.echo(f"{_count(runs.completed)} completed already.")
    if runs.busy:
        typer.echo(f"{_count(runs.busy)} in the queue or at work:")
        for run in runs.busy:
            job = RunDirectory(run.directory).status.get("job_id")
            typer.echo(f"  {shown(run.directory)}{f' (job {job})' if job else ''}")


def _count(runs: Sequence[Planned]) -> str:
    return "1 run" if len(runs) == 1 else f"{len(runs)} runs"


def _common(planned: Sequence[Planned]) -> Path:
    """What all runs lie below."""
    return Path(os.path.commonpath([run.directory.parent for run in planned]))
