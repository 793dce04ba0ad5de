"""`clpeft run` as a Hydra application, and what it says when something goes wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from omegaconf import DictConfig

# gives a worker process, which unpickles a `Job`, the resolver that names runs
import clpeft.config  # noqa: F401

if TYPE_CHECKING:
    from clpeft.sweep_launcher import Sweep


class RunFailedError(Exception):
    """What a run of a sweep came to, in words: its own exception may not travel to the sweep."""


@dataclass
class Job:
    """What Hydra calls with the config of a run; in a sweep perhaps in another process.

    Attributes:
        wants_trace: Whether a mistake is to be shown with its traceback.
        stop: A file that appears when a sweep is to start no further run.
        sweep_process: The process of the sweep.
        started: Whether a run was started in this process.
    """

    wants_trace: bool
    stop: Path
    sweep_process: int = field(default_factory=os.getpid)
    started: bool = False

    def __call__(self, composed: DictConfig) -> float | None:
        """Runs it.

        Returns:
            Its average accuracy; None if a sweep was stopped before or in it.

        Raises:
            SystemExit: If a single run is refused, after that was told.
            RunFailedError: If a run of a sweep fails.
            Busy: If a run of a sweep is worked on elsewhere.
        """
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        self.started = True
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            return self._single(composed)
        if os.getppid() != self.sweep_process:
            return self._of_sweep(composed)
        # A worker of a sweep on this machine. Ctrl-C reaches it too, but the sweep tells it when to
        # stop; and it has to outlive that, because a launcher takes a dead worker for a fault.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.stop.exists():
            return None
        try:
            return self._of_sweep(composed)
        except KeyboardInterrupt:
            return None

    def _single(self, composed: DictConfig) -> float | None:
        from clpeft.launching import run_composed
        from clpeft.mistakes import explain

        try:
            return run_composed(composed)
        except Exception as error:
            sentence = explain(error)
            if sentence is None or self.wants_trace:
                raise
            # an exit rather than an exception, which Hydra would announce in words of its own
            raise SystemExit(_refuse(sentence)) from error

    def _of_sweep(self, composed: DictConfig) -> float | None:
        from clpeft.launching import run_composed
        from clpeft.mistakes import explain
        from clpeft.outcomes import last_line
        from clpeft.rundir import Busy

        try:
            return run_composed(composed)
        except Busy:
            raise
        except Exception as error:
            if self.wants_trace:
                traceback.print_exc()
            told = explain(error) or f"{type(error).__name__}: {last_line(str(error))}"
            raise RunFailedError(told) from error


def run_application(overrides: Sequence[str]) -> int:
    """Hands a command line to Hydra.

    Args:
        overrides: Hydra's overrides and flags.

    Returns:
        The exit code: 1 after a mistake in the command line, told in one sentence, and after a
        sweep in which a run failed or was left undone; 128 and the number of the signal if one
        stopped it. A sweep ends with what became of its runs.
    """
    from hydra import main

    from clpeft.composition import register_schemas
    from clpeft.mistakes import explain
    from clpeft.stopping import Preempted
    from clpeft.sweep_launcher import watching

    sys.argv = ["clpeft", *overrides]
    wants_trace = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
    # Hydra would print and exit by itself; told to raise, it leaves the wording to us
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_schemas()
    with watching() as sweep:
        job = Job(wants_trace, sweep.stop)
        try:
            main(config_path="pkg://clpeft.conf", config_name="config", version_base="1.3")(job)()
            code = 0
        except Preempted as asked:
            code = asked.exit_code
        except KeyboardInterrupt:
            code = 130
        except RunFailedError:  # which a sweeper did not want to go past; the summary tells it
            code = 1
        except Exception as error:
            _tell_of(sweep)
            sentence = explain(error)
            if sentence is None and isinstance(error, OSError) and not job.started:
                sentence = (
                    f"the run directory cannot be made ({error.strerror}: {error.filename}); set "
                    f"paths.output_dir to a folder that can be written."
                )
            if sentence is None and type(error).__name__ == "TerminatedWorkerError":  # joblib's
                sentence = (
                    "a worker process was killed from outside, perhaps for want of memory, and "
                    "joblib gave up; repeat the command with a smaller hydra.launcher.n_jobs."
                )
            if wants_trace or sentence is None:
                raise
            return _refuse(sentence)
        undone = _tell_of(sweep)
        return code or undone


def _tell_of(sweep: Sweep) -> int:
    """Tells what became of a sweep, if there is one; returns its part in the exit code."""
    from clpeft.outcomes import UNSUCCESSFUL, summary
    from clpeft.processes import is_main

    outcomes = sweep.outcomes()
    if outcomes and is_main():
        typer.echo(f"clpeft: {summary(outcomes)}", err=True)
    return int(any(outcome.state in UNSUCCESSFUL for outcome in outcomes))


def _refuse(told: str) -> int:
    typer.echo(f"clpeft: {told}", err=True)
    return 1
