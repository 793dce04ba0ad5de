"""`clpeft doctor`: does a strategy do anything? Short runs side by side, or a run that exists."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import typer
from omegaconf import DictConfig
from rich.console import Console

from clpeft.composition import settle
from clpeft.config import ConfigError, run_name
from clpeft.doctor.examination import Examination, examination
from clpeft.doctor.printing import show
from clpeft.doubts import counterparts
from clpeft.launching import check, launch, quiet_libraries
from clpeft.processes import world_size
from clpeft.registry import STRATEGIES
from clpeft.rundir import RunDirectory
from clpeft.sweeps import expand
from clpeft.tracking.history import FILE_NAME

TASKS = 3  # that a short run keeps: the first shows nothing, the third that it goes on


def doctor(arguments: Sequence[str]) -> int:
    """Examines what a command line names, and prints what is found.

    Args:
        arguments: Overrides as a run takes them, or one run's directory.

    Returns:
        The exit code: 1 if a strategy does nothing.

    Raises:
        ConfigError: If there is nothing to examine.
    """
    directory = named_directory(arguments)
    if directory is None:
        examined = examine_overrides(arguments)
    else:
        examined = examine_directory(directory)
    show(examined, Console())
    return 0 if examined.healthy else 1


def named_directory(arguments: Sequence[str]) -> Path | None:
    """The run directory that a command line names; None if it is made of overrides.

    Raises:
        ConfigError: If it is neither.
    """
    if not arguments:
        raise ConfigError(
            "clpeft doctor needs to be told what to examine: overrides, as in clpeft doctor "
            "strategy=ewc, or the directory of a run."
        )
    if any(argument in ("-m", "--multirun") for argument in arguments):
        raise ConfigError(
            "clpeft doctor examines one run at a time: leave -m out, and repeat the command for "
            "each strategy."
        )
    folders = [argument for argument in arguments if Path(argument).is_dir()]
    if folders and len(arguments) > 1:
        raise ConfigError(
            f"clpeft doctor takes either overrides or one run's directory, not {folders[0]} with "
            f"{len(arguments) - 1} more."
        )
    if folders:
        return Path(folders[0])
    for argument in arguments:
        if argument.startswith("-") or not ("=" in argument or argument.startswith("~")):
            raise ConfigError(
                f"'{argument}' is neither KEY=VALUE nor the directory of a run, which is all that "
                f"clpeft doctor takes."
            )
    return None


def examine_overrides(overrides: Sequence[str]) -> Examination:
    """Composes a run, trains it cut short beside the runs it has to differ from, and looks at it.

    Args:
        overrides: As `clpeft` takes them. What they say of training and data is kept, but for the
            lengths that conf/debug/doctor.yaml sets and that they do not set themselves.

    Raises:
        ConfigError: If it could not work, or there is nothing to compare.
    """
    if world_size() > 1:
        raise ConfigError("clpeft doctor works in one process; start it without a launcher.")
    given = _only(overrides)
    refuse_references(list(given.strategies))
    presets = [] if any(o.startswith("debug=") for o in overrides) else ["debug=doctor"]
    short = _only([*overrides, *presets])
    cut(short)
    share_base(given, short)
    with tempfile.TemporaryDirectory(prefix="clpeft-doctor-") as folder:
        runs = [*(other for _, other in counterparts(short)), short]
        places = [Path(folder) / run_name(composed) for composed in runs]
        for composed, place in zip(runs, places, strict=True):
            check(composed, place)
        for number, (composed, place) in enumerate(zip(runs, places, strict=True), 1):
            names = "+".join(composed.strategies)
            typer.echo(f"clpeft: {number} of {len(runs)}: a short run of {names}", err=True)
            with redirect_stdout(io.StringIO()):  # what it says of itself is found below
                launch(composed, place)
        return examination(short, places[-1])


def examine_directory(directory: Path) -> Examination:
    """Looks at what a run has left, and at the completed runs beside it; changes nothing.

    Raises:
        ConfigError: If it is not a run's directory, holds no history, or is a reference's.
    """
    composed = RunDirectory(directory).frozen
    if composed is None:
        raise ConfigError(f"{directory} holds no config.yaml, so it is not a run's directory.")
    refuse_references(list(composed.strategies))
    if not (directory / FILE_NAME).is_file():
        raise ConfigError(
            f"{directory} holds no {FILE_NAME}: the run has not begun, so there is nothing to "
            f"examine yet."
        )
    return examination(composed, directory)


def refuse_references(names: Sequence[str]) -> None:
    """Refuses a run that has no method in it.

    Raises:
        ConfigError: If it has none.
    """
    for name in names:
        if name in STRATEGIES and STRATEGIES[name].target.is_reference:
            raise ConfigError(
                f"'{name}' is a reference that other strategies are compared with, so there is "
                f"nothing to examine in it; name a strategy, as in clpeft doctor strategy=ewc."
            )


def cut(short: DictConfig) -> None:
    """Leaves a stream its first tasks, in place.

    Raises:
        ConfigError: If it has one only.
    """
    from clpeft.streams.build import task_names

    config = settle(short)
    names = task_names(config.stream, config.paths.data_dir)
    if len(names) < 2:
        raise ConfigError(
            f"The stream '{config.stream.name}' has one task ({names[0]}), and what a strategy "
            f"does shows from the second on; give it more."
        )
    short.stream.tasks = names[:TASKS]


def share_base(given: DictConfig, short: DictConfig) -> None:
    """Puts a short run on the very base model that the whole one would stand on, in place.

    A generated base depends on the stream's texts; a cut stream would have another one built.
    """
    from clpeft.models.load import model_source
    from clpeft.streams.build import build_stream

    config = settle(given)
    if config.model.path is not None or config.model.architecture is None:
        return
    quiet_libraries()
    typer.echo("clpeft: the base model, which is built once", err=True)
    stream = build_stream(config.stream, data_dir=config.paths.data_dir)
    short.model.path = model_source(config.model, stream, Path(config.paths.cache_dir).expanduser())


def _only(overrides: Sequence[str]) -> DictConfig:
    """The one run that overrides stand for.

    Raises:
        ConfigError: If they stand for several.
    """
    planned = expand(overrides)
    if len(planned) > 1:
        names = " and ".join("+".join(run.composed.strategies) for run in planned[:2])
        raise ConfigError(
            f"These overrides stand for {len(planned)} runs ({names}{', ...' * (len(planned) > 2)})"
            f", and clpeft doctor examines one at a time; strategies that are to act together are "
            f"written strategy=[ewc,replay]."
        )
    return planned[0].composed
