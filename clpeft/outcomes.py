"""What became of the runs of a sweep, as their directories tell it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clpeft.rundir import KILLED, RunDirectory

INCOMPLETE = "incomplete"  # completed, it says, but its results are gone
# in the order in which a summary counts them
STATES = (
    *("completed", "failed", KILLED, INCOMPLETE, "preempted"),
    *("running", "queued", "not started"),
)
# what a sweep must not end with if it is to be called a success; a run that another process works
# on, or that a batch system will start, is merely not there yet
UNSUCCESSFUL = {"failed", KILLED, INCOMPLETE, "preempted", "not started"}


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    directory: Path
    state: str  # one of STATES
    told: str = ""  # the last line of an exception, or where the run is


def outcome_of(directory: Path) -> Outcome:
    """What became of the run of a directory, which need not exist; nothing in it is changed."""
    record = RunDirectory(directory)
    killed = record.was_killed
    status = record.status
    if not status:
        return Outcome(directory, "not started")
    if killed:
        return Outcome(directory, KILLED, f"its {record.worker} is gone")
    state = str(status.get("status"))
    if state == "completed" and not record.results:
        return Outcome(directory, INCOMPLETE, "completed, but there is no results.json")
    return Outcome(directory, state, _told(state, status))


def _told(state: str, status: dict[str, Any]) -> str:
    if state == "failed":
        return last_line(str(status.get("exception") or status.get("traceback") or ""))
    if state == "preempted":
        return str(status.get("reason") or "")
    if state == "running":
        return f"process {status.get('process', '?')} on {status.get('host', '?')}"
    if state == "queued" and status.get("job_id"):
        return f"job {status['job_id']}"
    return ""


def last_line(text: str) -> str:
    """The last line of a traceback that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def count(states: Iterable[str]) -> str:
    """How many runs there are of each state: `3 completed, 1 failed`."""
    states = list(states)
    return ", ".join(f"{states.count(s)} {s}" for s in STATES if s in states)


def summary(outcomes: Iterable[Outcome]) -> str:
    """The counts of a sweep, then a line for each run that is not completed.

    Args:
        outcomes: One per run.

    Returns:
        Several lines, without a line break at the end.
    """
    outcomes = list(outcomes)
    runs = "1 run" if len(outcomes) == 1 else f"{len(outcomes)} runs"
    lines = [f"sweep of {runs}: {count(one.state for one in outcomes)}"]
    for state in STATES[1:]:
        for one in outcomes:
            if one.state == state:
                told = f": {one.told}" if one.told else ""
                lines.append(f"  {state:<11}  {shown(one.directory)}{told}")
    if any(one.state != "completed" for one in outcomes):
        lines.append("the same command does what is left of it")
    return "\n".join(lines)


def shown(directory: Path) -> str:
    """A directory as it is shorter to read and can be pasted: relative where it lies below here."""
    here = Path(os.getcwd())
    return str(directory.relative_to(here) if directory.is_relative_to(here) else directory)
