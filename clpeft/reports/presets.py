"""Chosen settings as presets: one YAML per strategy, with the commands that found its values."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clpeft.catalogue import catalogue
from clpeft.config import ConfigError
from clpeft.reports.runs import Run
from clpeft.reports.selection import SPLIT, Winner
from clpeft.rundir import RunDirectory

PLACES = ("model.path", "paths.")  # keys whose values are of one machine


def write_presets(winners: Sequence[Winner], metric: str, folder: Path) -> list[Path]:
    """Writes `<strategy>.yaml` for every winner.

    A preset sets the strategy and the keys that were swept, and nothing else; in a folder that is
    named like an experiment it stands on that one.

    Args:
        winners: From `select`.
        metric: By which they were chosen.
        folder: Where to, such as `conf/experiment/standard_cl_minilm`.

    Returns:
        The files.

    Raises:
        ConfigError: If the winners are of several leaderboards.
    """
    boards = {winner.board for winner in winners}
    if len(boards) > 1:
        raise ConfigError(
            f"--presets writes one file per strategy, but these runs are of several boards "
            f"({'; '.join(sorted(boards))}); report on one of them."
        )
    folder.mkdir(parents=True, exist_ok=True)
    known = {item.name for item in catalogue()["experiment"]}
    base = folder.name if folder.name in known else None
    return [_write(winner, metric, folder, base) for winner in winners]


def _write(winner: Winner, metric: str, folder: Path, base: str | None) -> Path:
    names = winner.row.runs[0].strategies
    path = folder / f"{'_'.join(names)}.yaml"
    score = f"{winner.score.text()} (n = {winner.score.n}), the best of {winner.settings}"
    commands = {_command(run) for row in winner.compared for run in row.runs}
    header = [
        "# @package _global_",
        f"# The settings of {winner.strategy} chosen on {SPLIT} data.",
        f"# {metric}: {score}, found by:",
        *(f"#   {command}" for command in sorted(commands)),
        f"# Use: clpeft experiment={folder.name}/{path.stem}",
    ]
    defaults: list[Any] = [] if base is None else [f"/experiment/{base}"]
    defaults += [{"override /strategy": list(names)}, "_self_"]
    body = {"defaults": defaults, **_nested(winner.swept)}
    text = yaml.safe_dump(body, sort_keys=False, default_flow_style=None)
    path.write_text("\n".join(header) + "\n" + text)
    return path


def _command(run: Run) -> str:
    """The command that a run was started with, without where things lie on that machine."""
    words = shlex.split(str(RunDirectory(run.directory).status["command"]))
    pairs = [word.partition("=") for word in words]
    return " ".join(
        f"{key}=<folder>" if value and key.startswith(PLACES) else word
        for word, (key, _, value) in zip(words, pairs, strict=True)
    )


def _nested(flat: dict[str, str]) -> dict[str, Any]:
    """`{"a.b": "1"}` as `{"a": {"b": 1}}`."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.safe_load(value)
    return found
