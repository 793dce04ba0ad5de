"""`clpeft doctor`: does a strategy do anything? Short runs side by side, or a run that exists."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import typer
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clpeft.composition import settle
from clpeft.config import ConfigError, run_name
from clpeft.doubts import counterparts, doubts, exhibits, same_result
from clpeft.evidence import (
    Amount,
    Exhibit,
    Finding,
    TaskLog,
    Verdict,
    rounded,
    task_logs,
)
from clpeft.launching import check, launch, quiet_libraries
from clpeft.processes import world_size
from clpeft.registry import STRATEGIES
from clpeft.rundir import RunDirectory
from clpeft.strategies.base import Evidence
from clpeft.sweeps import expand
from clpeft.tracking.history import FILE_NAME, read_events

TASKS = 3  # that a short run keeps: the first shows nothing, the third that it goes on
COLUMNS = 4  # tasks that a table has room for
STYLES = {
    Verdict.WORKS: "green",
    Verdict.NOTHING: "bold red",
    Verdict.TOO_STRONG: "yellow",
    Verdict.TOO_WEAK: "yellow",
    Verdict.UNJUDGED: "dim",
}
# what the numbers of a table are, in a line below it
LEGEND = {
    Evidence.PENALTY: "penalty: its median over a task's steps, as a multiple of the mean of the "
    "task's own loss",
    Evidence.TERM: "term: its largest value",
    Evidence.GRADIENT: "gradient: its mean over a task's steps",
    Evidence.MEMORY: "memory: examples read in a task",
    Evidence.MASK: "mask: its value at a task's last step",
}
COMPARISON_LEGEND = (
    "weights: the last ones, ‖θ − θ'‖ / ‖θ'‖; learned: mean score on each task just after it, with "
    "/ without; step: its time as a multiple, after the first task"
)


@dataclass(frozen=True)
class Comparison:
    """A run beside one without some of its strategies."""

    strategy: str  # what the other run has not
    reference: str  # the other run's strategies
    same: bool  # the weights and every score, bit by bit
    distance: float | None  # ‖θ − θ'‖ / ‖θ'‖; None where the parameters are others, or not kept
    learned: tuple[float | None, float | None]  # learning accuracy of this run and of the other
    step_ratio: float | None  # seconds of a step after the first task, this run's by the other's


@dataclass(frozen=True)
class Examination:
    """All that is found of one run."""

    title: str
    strategies: tuple[str, ...]
    exhibits: tuple[Exhibit, ...]
    comparisons: tuple[Comparison, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]  # what could not be looked at

    @property
    def healthy(self) -> bool:
        """Whether nothing says that a strategy does nothing."""
        return all(finding.verdict != Verdict.NOTHING for finding in self.findings)


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
    from clpeft.streams.base import task_names

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
    from clpeft.streams.base import build_stream

    config = settle(given)
    if config.model.path is not None or config.model.architecture is None:
        return
    quiet_libraries()
    typer.echo("clpeft: the base model, which is built once", err=True)
    stream = build_stream(config.stream, data_dir=config.paths.data_dir)
    short.model.path = model_source(config.model, stream, Path(config.paths.cache_dir).expanduser())


def examination(composed: DictConfig, directory: Path) -> Examination:
    """What the files of a run, and of those beside it, show.

    Args:
        composed: The run's config.
        directory: Its directory.
    """
    record = RunDirectory(directory)
    shown = exhibits(composed, directory)
    results = record.completed_results
    logs = task_logs(read_events(directory))
    names = [str(name) for name in composed.strategies]
    notes = [
        f"{name} declares no evidence, so that only weights and results can be compared."
        for name in names
        if not any(exhibit.strategy == name for exhibit in shown)
    ]
    if len(logs) < 2:
        notes.append("Fewer than two tasks were trained, and a strategy shows from the second on.")
    comparisons: list[Comparison] = []
    if results:
        findings = doubts(composed, directory, results)
        for strategy, other in counterparts(composed):
            there = directory.parent / run_name(other)
            if RunDirectory(there).completed_results:
                comparisons.append(compare(strategy, directory, there, logs))
            else:
                notes.append(
                    f"Weights and scores are not compared with those of "
                    f"{'+'.join(other.strategies)}: there is no completed run of the same settings "
                    f"in {there}."
                )
    else:
        findings = [finding for exhibit in shown for finding in exhibit.findings]
        notes.append("The run is not completed, so its weights and scores are not compared.")
    steps = sum(log.steps for log in logs)
    title = f"{'+'.join(names)} on {composed.stream.name}, {composed.model.name}: "
    title += f"{len(logs)} tasks, {steps} steps, seed {composed.seed}"
    return Examination(
        title, tuple(names), tuple(shown), tuple(comparisons), tuple(findings), tuple(notes)
    )


def compare(strategy: str, directory: Path, there: Path, logs: Sequence[TaskLog]) -> Comparison:
    """How far a run is from another, completed one."""
    from clpeft.training.checkpoint import last_parameters

    own, other = RunDirectory(directory).results, RunDirectory(there).results
    seconds = [step_seconds(found) for found in (logs, task_logs(read_events(there)))]
    return Comparison(
        strategy,
        "+".join(other["strategies"]),
        same_result(own, other),
        distance(last_parameters(directory), last_parameters(there)),
        (own["metrics"].get("learning_accuracy"), other["metrics"].get("learning_accuracy")),
        seconds[0] / seconds[1] if seconds[0] and seconds[1] else None,
    )


def distance(parameters: dict[str, Any], others: dict[str, Any]) -> float | None:
    """‖θ − θ'‖ / ‖θ'‖ over named tensors; None where their names or shapes differ."""
    shapes, other_shapes = (
        {name: tensor.shape for name, tensor in tensors.items()} for tensors in (parameters, others)
    )
    if shapes != other_shapes:
        return None
    apart = norm = 0.0
    for name, there in others.items():
        apart += float((parameters[name].double() - there.double()).square().sum())
        norm += float(there.double().square().sum())
    return (apart / norm) ** 0.5 if norm else None


def step_seconds(logs: Sequence[TaskLog]) -> float | None:
    """Seconds of a step after the first task: the median over pairs of logged steps.

    Unlike a mean, it is not moved by a checkpoint or by the pause before a resume.
    """
    found = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for log in logs[1:]
        for before, after in zip(log.logged, log.logged[1:], strict=False)
    ]
    return median(found) if found else None


def show(examined: Examination, console: Console) -> None:
    """Prints an examination: tables, what was found, and what to try."""
    if examined.exhibits:
        console.print(_evidence_table(examined))
        for kind in dict.fromkeys(exhibit.kind for exhibit in examined.exhibits):
            console.print(LEGEND[kind], style="dim", highlight=False)
        console.print()
    if examined.comparisons:
        console.print(_comparison_table(examined.comparisons))
        console.print(COMPARISON_LEGEND, style="dim", highlight=False)
        console.print()
    for finding in examined.findings:
        style = STYLES[finding.verdict]
        console.print(f"[{style}]•[/] {escape(finding.text)}", highlight=False)
        console.print(f"  {escape(finding.advice)}", highlight=False)
    for note in examined.notes:
        console.print(f"[dim]•[/] {escape(note)}", highlight=False)
    if not (examined.findings or examined.notes):
        console.print("Nothing was found against it.", style="green")


def _evidence_table(examined: Examination) -> Table:
    table = _table(examined.title)
    table.add_column("strategy", overflow="fold")
    table.add_column("shown by", overflow="fold")
    table.add_column("kind")
    tasks = list(dict.fromkeys(a.task for e in examined.exhibits for a in e.amounts))
    fitting = len(tasks) <= COLUMNS
    for head in tasks if fitting else [f"{tasks[0]} to {tasks[-1]}"]:
        table.add_column(escape(head), justify="right")
    table.add_column("verdict", no_wrap=True)
    for exhibit in examined.exhibits:
        amounts = {amount.task: amount for amount in exhibit.amounts}
        cells = [_amount(exhibit.kind, amounts[t]) if t in amounts else "·" for t in tasks]
        if not fitting:
            ordered = sorted(exhibit.amounts, key=lambda amount: amount.value or 0.0)
            cells = [" to ".join(_amount(exhibit.kind, a) for a in (ordered[0], ordered[-1]))]
        table.add_row(
            exhibit.strategy, exhibit.key, exhibit.kind, *cells, _verdict(exhibit.verdict)
        )
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    table = _table("beside runs without it")
    table.add_column("strategy", overflow="fold")
    table.add_column("without it", overflow="fold")
    table.add_column("weights", justify="right")
    table.add_column("learned", justify="right")
    table.add_column("step", justify="right")
    table.add_column("verdict", no_wrap=True)
    for one in comparisons:
        apart = "–" if one.distance is None else f"{rounded(100 * one.distance, 2)} % apart"
        learned = ["–" if score is None else f"{score:.2f}" for score in one.learned]
        table.add_row(
            one.strategy,
            one.reference,
            "equal" if one.same else apart,
            " / ".join(learned),
            "–" if one.step_ratio is None else f"{one.step_ratio:.2f} ×",
            _verdict(Verdict.NOTHING) if one.same else "[green]differs[/]",
        )
    return table


def _table(title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", pad_edge=False)
    table.box = box.SIMPLE_HEAD
    table.show_edge = False
    return table


def _amount(kind: Evidence, amount: Amount) -> str:
    if kind == Evidence.MASK:
        return "–" if amount.last is None else f"{amount.last:.3g}"
    if amount.value is None:
        return "–"
    if kind == Evidence.MEMORY:
        return f"{amount.value:g}"
    return rounded(amount.value, 2) + " ×" * (kind == Evidence.PENALTY)


def _verdict(verdict: Verdict) -> str:
    return f"[{STYLES[verdict]}]{verdict}[/]"


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
