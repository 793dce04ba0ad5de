"""Runs as they lie on the disk: found below directories, checked, and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clpeft.config import ConfigError
from clpeft.evaluation.metrics import compute_metrics
from clpeft.outcomes import INCOMPLETE, last_line
from clpeft.rundir import KILLED, RESULTS_SCHEMA, RunDirectory

RESULTS, STATUS, CONFIG = "results.json", "status.json", "config.yaml"
STATES = ("queued", "running", "completed", "failed", "preempted")
# what a run keeps below its directory, none of which is another run
INNER_DIRECTORIES = {
    *("adapters", "checkpoints", "exports", "figures"),
    *("wandb", "tensorboard", ".hydra"),
}
# a stored metric may differ from the recomputed one by rounding, not by more
METRIC_TOLERANCE = 1e-6

Matrix = list[list[float | None]]


@dataclass(frozen=True)
class Note:
    """Something a reader of the report should know about one file or directory."""

    path: Path
    text: str


@dataclass(frozen=True)
class Warned:
    """Something that a run found of itself at its end."""

    strategy: str
    verdict: str
    what: str
    text: str  # what was found, and what to try


@dataclass(frozen=True)
class Run:
    """One completed run, as its results.json and config.yaml tell it."""

    directory: Path
    name: str
    stream: str
    order: str | None
    scenario: str
    model: str
    task_type: str
    peft: str
    strategies: tuple[str, ...]
    bound: bool  # a reference such as cumulative, never a contender
    seed: int
    digest: str
    family: str  # digest of all but the seed
    setting: str  # digest of model, PEFT, quantization, stream and evaluation
    test: str  # digest of the examples, prompts and labels that were scored
    base: str  # which weights the adapters stand on
    weights: str | None  # digest of what was trained; None in results of earlier versions
    tasks: tuple[str, ...]
    scorers: tuple[str, ...]  # per task: accuracy, exact_match, rougeL
    split: str
    mode: str  # evaluation.mode
    task_id_given: bool
    matrix: Matrix
    chance: list[float | None] | None
    test_sizes: list[int] | None
    references: dict[str, list[float | None]]
    metrics: dict[str, float]  # recomputed from the matrix
    undefined: dict[str, str]
    cost: dict[str, Any]
    parameters: dict[str, Any]
    environment: dict[str, Any]
    warnings: tuple[Warned, ...]
    config: dict[str, Any]
    status: dict[str, Any]


@dataclass(frozen=True)
class UnfinishedRun:
    """A run directory without a result: failed, killed, preempted, running or queued."""

    directory: Path
    state: str
    strategies: tuple[str, ...]
    seed: int | None
    message: str  # the exception's last line, or the reason it stopped
    host: str
    started: float | None  # seconds since 1970
    ended: float | None


@dataclass
class Collection:
    """Everything found below some directories."""

    directories: list[Path]
    runs: list[Run] = field(default_factory=list)
    unfinished: list[UnfinishedRun] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


class UnreadableError(ValueError):
    """A file that is not what its name says."""


def collect_runs(directories: Sequence[Path], *, exclude: Path | None = None) -> Collection:
    """Finds and loads every run below some directories.

    Files that cannot be read are noted and skipped; a result that lies in two places is counted
    once.

    Args:
        directories: Run or sweep directories, or any directories above them.
        exclude: A directory that is not looked into: the report's own.

    Returns:
        The runs, in the order of their paths.

    Raises:
        ConfigError: If a directory does not exist, or holds no run at all.
    """
    collection = Collection([Path(directory) for directory in directories])
    for directory in collection.directories:
        if not directory.is_dir():
            raise ConfigError(f"There is no directory '{directory}' to report on.")
    for directory in run_directories(collection.directories, exclude):
        _load_directory(directory, collection)
    _count_once(collection)
    if not (collection.runs or collection.unfinished or collection.notes):
        names = ", ".join(f"'{directory}'" for directory in collection.directories)
        raise ConfigError(
            f"Found no run below {names}: a run's directory holds a {RESULTS} or a {STATUS}."
        )
    return collection


def run_directories(directories: Sequence[Path], exclude: Path | None = None) -> Iterator[Path]:
    """The directories that hold a results.json or a status.json, each once, in order of path."""
    found: set[Path] = set()
    excluded = None if exclude is None else exclude.resolve()
    for top in directories:
        for folder, subfolders, files in os.walk(top):
            here = Path(folder).resolve()
            if here == excluded:
                subfolders.clear()
                continue
            if RESULTS in files or STATUS in files:
                found.add(here)
                subfolders[:] = [name for name in subfolders if name not in INNER_DIRECTORIES]
    yield from sorted(found)


def _load_directory(directory: Path, collection: Collection) -> None:
    notes = collection.notes
    config = _optional(directory / CONFIG, _read_yaml, notes)
    status = _optional(directory / STATUS, _read_status, notes)
    state = status.get("status", "completed")
    has_results = (directory / RESULTS).exists()
    if state == "completed" and has_results:
        try:
            content = _read_json(directory / RESULTS)
            run = _parse_run(directory, content, config, status)
        except UnreadableError as error:
            notes.append(Note(directory / RESULTS, f"{error}; skipped"))
            return
        collection.runs.append(run)
        notes.extend(_disagreements(run, content.get("metrics")))
        return
    if not status and not has_results:
        return  # its status.json could not be read, which a note says already
    if has_results:
        text = f"belongs to a run that is {state}, not completed; not counted"
        notes.append(Note(directory / RESULTS, text))
    collection.unfinished.append(_unfinished(directory, state, config, status))


def _unfinished(
    directory: Path, state: str, config: dict[str, Any], status: dict[str, Any]
) -> UnfinishedRun:
    told = [status.get(key) for key in ("exception", "traceback", "reason")]
    lines = [last_line(text) for text in told if isinstance(text, str)]
    message = next((line for line in lines if line), "")
    if state == "queued" and status.get("job_id"):
        message = f"job {status['job_id']}"
    if state == "completed":
        state = INCOMPLETE
        message = f"completed, but there is no {RESULTS}"
    record = RunDirectory(directory)
    if state in ("running", "queued") and record.was_killed:
        state = KILLED
        message = f"its {record.worker} is gone; the same command continues it"
    strategies = config.get("strategies")
    seed = config.get("seed")
    return UnfinishedRun(
        directory=directory,
        state=state,
        strategies=tuple(strategies) if isinstance(strategies, dict) else (),
        seed=seed if isinstance(seed, int) else None,
        message=message,
        host=str(status.get("host") or ""),
        started=_time(status.get("started")),
        ended=_time(status.get("ended")),
    )


def _time(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _optional(path: Path, read: Any, notes: list[Note]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read(path)
    except UnreadableError as error:
        notes.append(Note(path, f"{error}; its content is left out"))
        return {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"cannot be read ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UnreadableError(f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UnreadableError("is not a clpeft file: it holds no JSON object")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise UnreadableError(f"is not valid YAML ({last_line(str(error))})") from error
    if not isinstance(content, dict):
        raise UnreadableError("is not the config of a run: it holds no mapping")
    return content


def _read_status(path: Path) -> dict[str, Any]:
    status = _read_json(path)
    if status.get("status") not in STATES:
        raise UnreadableError(
            f"is not the status of a clpeft run: its 'status' is {status.get('status')!r}, "
            f"not one of {', '.join(STATES)}"
        )
    return status


def _take(content: dict[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    if key not in content:
        raise UnreadableError(f"is not a clpeft result: it has no '{key}'")
    value = content[key]
    # True is an int in Python, and never a seed
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise UnreadableError(f"is not a clpeft result: its '{key}' is {value!r}")
    return value


def _take_per_task(content: dict[str, Any], key: str, tasks: Sequence[str]) -> list[Any] | None:
    value = content.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != len(tasks):
        raise UnreadableError(f"does not have one entry of '{key}' for each of {len(tasks)} tasks")
    return value


def _parse_run(
    directory: Path, content: dict[str, Any], config: dict[str, Any], status: dict[str, Any]
) -> Run:
    schema = _take(content, "schema", object)
    if schema != RESULTS_SCHEMA:
        raise UnreadableError(f"has schema {schema!r}; this version reads schema {RESULTS_SCHEMA}")
    digests = _take(content, "digests", dict)
    tasks = tuple(_take(content, "tasks", list))
    scorers = _take(content, "metric", dict)
    evaluation = _take(content, "evaluation", dict)
    matrix = _take(content, "matrix", list)
    if len(matrix) != len(tasks) + 1:
        raise UnreadableError(
            f"has a matrix of {len(matrix)} rows for {len(tasks)} tasks; "
            f"it needs {len(tasks) + 1}, the first of the untrained model"
        )
    chance = _take_per_task(content, "chance", tasks)
    test_sizes = _take_per_task(content, "test_sizes", tasks)
    try:
        metrics, undefined = compute_metrics(matrix, chance=chance, test_sizes=test_sizes)
    except (ValueError, TypeError) as error:
        raise UnreadableError(f"has a matrix that cannot be used ({error})") from error
    return Run(
        directory=directory,
        name=_take(content, "name", str),
        stream=_take(content, "stream", str),
        order=content.get("order"),
        scenario=_take(content, "scenario", str),
        model=_take(content, "model", str),
        task_type=_take(content, "task_type", str),
        peft=_take(content, "peft", str),
        strategies=tuple(_take(content, "strategies", list)),
        bound=_take(content, "bound", bool),
        seed=_take(content, "seed", int),
        digest=_take(digests, "run", str),
        family=_take(digests, "family", str),
        setting=_take(digests, "setting", str),
        test=str(digests.get("test", "?")),
        base=str(digests.get("base", "?")),
        weights=digests.get("weights"),
        tasks=tasks,
        scorers=tuple(str(scorers.get(task, "?")) for task in tasks),
        split=_take(content, "split", str),
        mode=str(evaluation.get("mode", "?")),
        task_id_given=bool(evaluation.get("task_id_given", False)),
        matrix=matrix,
        chance=chance,
        test_sizes=test_sizes,
        references=content.get("references") or {},
        metrics=metrics,
        undefined=undefined,
        cost=_cost(content),
        parameters=content.get("parameters") or {},
        environment=content.get("environment") or {},
        warnings=_warnings(content),
        config=config,
        status=status,
    )


def _cost(content: dict[str, Any]) -> dict[str, Any]:
    """The costs; earlier versions called `adapter_bytes` what all that trains takes."""
    cost = dict(content.get("cost") or {})
    if "trained_bytes" not in cost and "adapter_bytes" in cost:
        cost["trained_bytes"] = cost.pop("adapter_bytes")
    return cost


def _warnings(content: dict[str, Any]) -> tuple[Warned, ...]:
    try:
        return tuple(
            Warned(w["strategy"], w["verdict"], w["what"], f"{w['text']} {w['advice']}")
            for w in content.get("warnings", [])
        )
    except (KeyError, TypeError) as error:
        raise UnreadableError(f"has warnings that cannot be read ({error!r})") from error


def _disagreements(run: Run, stored: Any) -> Iterator[Note]:
    """Metrics that a results.json states otherwise than its matrix does."""
    if not isinstance(stored, dict):
        return
    for name, value in run.metrics.items():
        said = stored.get(name, value)
        if not isinstance(said, int | float) or abs(said - value) > METRIC_TOLERANCE:
            text = f"says {name} = {said}, but its matrix gives {value:.6g}; the matrix counts"
            yield Note(run.directory / RESULTS, text)


def _count_once(collection: Collection) -> None:
    """Keeps the first of several results of one configuration, and says so."""
    first: dict[tuple[str, int], Run] = {}
    for run in collection.runs:
        kept = first.setdefault((run.digest, run.seed), run)
        if kept is run:
            continue
        text = f"is the same run as {kept.directory} (digest {run.digest}); counted once"
        if run.matrix != kept.matrix:
            text += ", although the two matrices differ"
        collection.notes.append(Note(run.directory / RESULTS, text))
    collection.runs = list(first.values())
