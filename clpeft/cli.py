"""The command line: `clpeft [run]` is a Hydra application, the rest are plain commands."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="clpeft",
    help="Continual learning of language models with parameter-efficient fine-tuning.\n\n"
    "`clpeft KEY=VALUE ...` runs an experiment, `clpeft -m KEY=A,B ...` a sweep; "
    "`clpeft run --help` shows every key, `clpeft list` what can be chosen.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MULTIRUN_FLAGS = {"-m", "--multirun"}  # implied by submit, and easily left in


@app.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    help="Run one experiment, or with -m a sweep; takes Hydra's overrides and flags.",
)
def run(overrides: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Hands the command line to Hydra; a mistake in it ends in one sentence and exit code 1."""
    from clpeft.application import run_application

    sys.exit(run_application(overrides or []))


@app.command()
def resume(directory: Path) -> None:
    """Continue a stopped run from its directory, with the config that it was created with."""
    from clpeft.launching import resume_directory
    from clpeft.stopping import Preempted

    try:
        resume_directory(directory)
    except Preempted as asked:
        sys.exit(asked.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _refuse(error)


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be submitted, and stop.")
    ] = False,
) -> None:
    """Submit a sweep to SLURM as one array job, and return at once.

    Takes the overrides of `clpeft -m`; `hydra.launcher.partition` and its neighbours are what the
    jobs ask of the cluster. Repeated, it submits what is not completed.
    """
    from clpeft.submission import submit as submit_sweep

    given = [override for override in overrides or [] if override not in MULTIRUN_FLAGS]
    try:
        code = submit_sweep(given, dry_run=dry_run)
    except Exception as error:
        _refuse(error)
    sys.exit(code)


@app.command(context_settings={"ignore_unknown_options": True})
def doctor(
    what: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...|RUN_DIR")] = None,
) -> None:
    """Say whether a strategy does anything: short runs of it and of finetune, side by side.

    Takes the overrides of a run, or the directory of one that exists. The exit code is 1 if a
    strategy does nothing.
    """
    from clpeft.doctor.command import doctor as examine
    from clpeft.stopping import Preempted

    try:
        code = examine(what or [])
    except Preempted as asked:
        sys.exit(asked.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _refuse(error)
    sys.exit(code)


@app.command()
def report(
    directories: list[Path],
    out: Annotated[Path | None, typer.Option(help="Where to write it.")] = None,
    select: Annotated[
        str | None,
        typer.Option(help="'validation': also choose each strategy's best setting."),
    ] = None,
    by: Annotated[str, typer.Option(help="The metric to choose by.")] = "average_accuracy",
    presets: Annotated[
        Path | None, typer.Option(help="Folder to write the chosen settings to, as presets.")
    ] = None,
    costs: Annotated[
        bool, typer.Option("--costs", help="Print what each strategy costs, too.")
    ] = False,
) -> None:
    """Leaderboard, curves, heatmaps, HTML, CSV and LaTeX over run and sweep directories."""
    from clpeft.reports import report_on

    sys.exit(report_on(directories, out, split=select, metric=by, presets=presets, costs=costs))


class Dtype(StrEnum):
    """What numbers can be exported as."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="The directory of a run.")],
    task: Annotated[
        str | None,
        typer.Option(help="The model as it was after this task: its number or name; [the last]"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="A whole model rather than an adapter.")
    ] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Cast to this type; [as it is]")] = None,
    to: Annotated[
        Path | None, typer.Option(help="A new or empty folder; [RUN_DIR/exports/<k>_<task>]")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base model's folder, if it has moved.")
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Merge into a quantized base's copy in floating point."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
    ] = False,
) -> None:
    """Write a run's adapter, or its merged model, for PEFT and transformers to load."""
    from clpeft.export import export as write
    from clpeft.launching import quiet_libraries

    try:
        quiet_libraries()
        done = write(
            run_dir,
            task,
            merge=merge,
            dtype=dtype,
            to=to,
            base=base,
            dequantize=dequantize,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        _refuse(error)
    typer.echo(done.told)


@app.command(name="list")
def list_choices(group: Annotated[str | None, typer.Argument()] = None) -> None:
    """Show what can be chosen, each with its description and paper."""
    from clpeft.catalogue import show

    sys.exit(show(group))


def _refuse(error: Exception) -> NoReturn:
    """Ends with one sentence about a mistake; raises again what is none."""
    from clpeft.mistakes import explain

    sentence = explain(error)
    if sentence is None:
        raise error
    typer.echo(f"clpeft: {sentence}", err=True)
    sys.exit(1)


def _unknown(word: str, commands: set[str]) -> int:
    from clpeft.config import nearest

    known = ", ".join(sorted(commands))
    hint = nearest(word, sorted(commands))
    typer.echo(f"clpeft: '{word}' is neither a command ({known}) nor KEY=VALUE.{hint}", err=True)
    return 1


def main() -> None:
    """Routes the command line: whatever does not begin with a command's name is a run."""
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in commands | {"-h", "--help"}:
        if arguments and arguments[0].isalpha():  # neither KEY=VALUE nor a flag
            sys.exit(_unknown(arguments[0], commands))
        arguments = ["run", *arguments]
    app(arguments, prog_name="clpeft")


if __name__ == "__main__":
    main()
