"""hydra/launcher=slurm: the runs of a sweep as jobs of a cluster, waited for.

Hydra looks for plugins below `hydra_plugins` and imports what it finds at every start, so nothing
is imported here that takes time. Why not hydra-submitit-launcher: it asks sacct when a job is done,
so that on a cluster without accounting it waits for ever for a job that was cancelled, and it
composes a run's config in the job, from whatever the working tree holds by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SlurmLauncher(Launcher):
    """Submits with submitit, through the same preparations as `clpeft submit`.

    Args:
        settings: `hydra.launcher`; read again, checked, from the whole config.
    """

    def __init__(self, **settings: Any) -> None:
        self._context: HydraContext
        self._config: DictConfig

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """See `Launcher`; the task function is not used, a job resumes a directory.

        Raises:
            ConfigError: If submitit or SLURM is not there, or the settings could not work.
        """
        from clpeft.config import ConfigError
        from clpeft.submission import launcher_settings, require_sbatch

        if util.find_spec("submitit") is None:
            raise ConfigError(
                "hydra/launcher=slurm needs submitit, which is not installed: "
                "pip install 'clpeft[slurm]'; clpeft submit works without it."
            )
        require_sbatch()
        if launcher_settings(config).gpus_per_node > 1:
            raise ConfigError(
                "hydra/launcher=slurm gives a run one process and so one GPU; clpeft submit, with "
                "the same settings, starts one process per GPU."
            )
        self._context, self._config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """See `Launcher`; returns when the last run has ended."""
        from clpeft.slurm_sweep import run_on_slurm

        loader = self._context.config_loader
        return run_on_slurm(loader, self._config, job_overrides, initial_job_idx)
