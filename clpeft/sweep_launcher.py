"""Around Hydra's launchers: a sweep that knows its runs, goes on past failures, and can stop."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from clpeft.config import ConfigError
from clpeft.outcomes import Outcome, outcome_of
from clpeft.rundir import Busy, RunDirectory
from clpeft.stopping import Preempted, StopRequests
from clpeft.sweeps import Planned, is_basic, plan, runs_of


class Sweep:
    """A sweep as it goes on: its runs, and which of them were refused or failed.

    Args:
        stop: A file that appears when no further run is to be started. Processes that a launcher
            started look for it, because they hear of nothing else.

    Attributes:
        planned: The runs that are known of. All from the start, except where a sweeper chooses
            them by results.
    """

    def __init__(self, stop: Path) -> None:
        self.stop = stop
        self.planned: list[Planned] = []
        self._failed: dict[tuple[str, ...], Exception] = {}

    def note(self, overrides: Sequence[str], error: Exception) -> None:
        """Keeps what a run raised: one that was refused leaves nothing in its directory."""
        self._failed[tuple(overrides)] = error

    def outcomes(self) -> list[Outcome]:
        """What became of each run, by its directory and by what it raised."""
        return [self._outcome(run) for run in self.planned]

    def _outcome(self, run: Planned) -> Outcome:
        found = outcome_of(run.directory)
        error = self._failed.get(run.overrides)
        if isinstance(error, Busy):
            busy = found.state not in ("completed", "failed")  # and not ended since
            return Outcome(run.directory, "running", f"elsewhere, {found.told}") if busy else found
        return found if error is None else Outcome(run.directory, "failed", str(error))


@contextmanager
def watching() -> Iterator[Sweep]:
    """Puts itself between Hydra's sweepers and launchers for as long as the inside lasts.

    Yields:
        The sweep; without runs if none is started inside.
    """
    instantiate = Plugins.instantiate_launcher
    with tempfile.TemporaryDirectory(prefix="clpeft-sweep-") as folder:
        sweep = Sweep(Path(folder) / "stop")

        def watched(
            self: Plugins,
            hydra_context: HydraContext,
            task_function: TaskFunction,
            config: DictConfig,
        ) -> Launcher:
            launcher = instantiate(
                self, hydra_context=hydra_context, task_function=task_function, config=config
            )
            return WatchedLauncher(launcher, sweep, hydra_context, config)

        # Hydra has no place for this: its callbacks are not told of runs in other processes
        with mock.patch.object(Plugins, "instantiate_launcher", watched):
            yield sweep


class WatchedLauncher(Launcher):
    """A launcher that tells the sweep of its runs, and stops them when it is asked to.

    Args:
        launcher: Hydra's, which does the work.
        sweep: To be told.
        context: Hydra's.
        config: What the sweep was started with.
    """

    def __init__(
        self, launcher: Launcher, sweep: Sweep, context: HydraContext, config: DictConfig
    ) -> None:
        self._launcher = launcher
        self._sweep = sweep
        self._loader = context.config_loader
        self._config = config
        self._stopped_by = 0
        self._listed = is_basic(config)
        if self._listed:
            sweep.planned = runs_of(self._loader, config)

    def setup(self, **_: Any) -> None:
        """Nothing: the launcher inside is set up already."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """See `Launcher`.

        Raises:
            Preempted: If a signal asked to stop; what was running has saved its state by then.
        """
        if not self._listed:
            for number, overrides in enumerate(job_overrides, initial_job_idx):
                run = plan(self._loader, self._config, overrides, number)
                _check_chosen_by(run)
                self._sweep.planned.append(run)
        try:
            with StopRequests.handling(self._heard):
                returns = self._launcher.launch(job_overrides, initial_job_idx)
        except Exception as error:
            if self._stopped_by:  # a worker that had no run yet may have died of it
                raise Preempted(self._stopped_by) from error
            raise
        for overrides, job in zip(job_overrides, returns, strict=True):
            if job.status == JobStatus.FAILED:
                self._sweep.note(overrides, job._return_value)
                if self._listed:  # the sweeper would leave out the batches after this one
                    job.status, job.return_value = JobStatus.COMPLETED, None
        if self._stopped_by:
            raise Preempted(self._stopped_by)
        return returns

    def _heard(self, number: int, frame: FrameType | None) -> None:
        again, self._stopped_by = self._stopped_by, number
        self._sweep.stop.touch()
        workers = [] if again else self._workers()
        if not workers:
            raise Preempted(number)
        for process in workers:
            os.kill(process, signal.SIGTERM)
        # not print: a handler may stand in the middle of another one
        os.write(2, b"\nstopping after these steps; Ctrl-C again stops at once\n")

    def _workers(self) -> list[int]:
        """The processes that work on runs of this sweep and were started by this one."""
        import psutil

        records = [RunDirectory(run.directory) for run in self._sweep.planned]
        working = {record.status.get("process") for record in records if record.is_claimed}
        children = psutil.Process().children(recursive=True)
        return [child.pid for child in children if child.pid in working]


def _check_chosen_by(run: Planned) -> None:
    """Refuses a search by test scores."""
    if run.composed.evaluation.split != "validation":
        raise ConfigError(
            f"A sweeper that chooses settings by their scores would choose by those of the "
            f"{run.composed.evaluation.split} data; add experiment=tune, or "
            f"evaluation.split=validation."
        )
