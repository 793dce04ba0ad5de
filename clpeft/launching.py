"""Starting, continuing and refusing runs: what stands around an experiment."""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clpeft.composition import settle
from clpeft.config import Config, ConfigError
from clpeft.machine import check_machine
from clpeft.models.quantize import quiet_quantization
from clpeft.processes import is_main
from clpeft.rundir import RunDirectory, job_id
from clpeft.slurm import requeue_if_asked
from clpeft.stopping import Preempted, StopRequests

EPILOGUE_SECONDS = 100.0  # how long the other processes wait for the main one to have written

log = logging.getLogger(__name__)


def run_composed(composed: DictConfig) -> float | None:
    """What `clpeft run` does with the config that Hydra composed."""
    from hydra.core.hydra_config import HydraConfig

    directory = Path(HydraConfig.get().runtime.output_dir)
    return launch(composed, directory)


def resume_directory(directory: Path) -> float | None:
    """What `clpeft resume` does: continues a run with the config frozen in its directory."""
    composed = RunDirectory(directory).frozen
    if composed is None:
        raise ConfigError(f"{directory} holds no config.yaml, so it is not a run's directory.")
    composed.force = False  # which started the run afresh; continuing it must not
    return launch(composed, directory)


def launch(composed: DictConfig, directory: Path) -> float | None:
    """Checks, runs or continues a run; a completed one only shows its result.

    In a job of SLURM, a run that is stopped because the job's time is over has it requeued.

    Args:
        composed: The config of the run.
        directory: The run directory.

    Returns:
        Its average accuracy, which sweepers maximise.

    Raises:
        ConfigError: If the config could not work; nothing is left behind then.
    """
    from clpeft.tracking.console import log_to, show_results

    record = RunDirectory(directory)
    try:
        config = check(composed, directory)
        check_machine(config)
    except Exception:  # also of OmegaConf's, as for a value that is missing
        record.discard_if_empty()
        raise
    if config.force and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        # the job was started afresh before; requeued, it continues what it has done since
        composed.force = config.force = False
    stop = StopRequests()
    with stop.listening():
        if not is_main():
            return _assist(config, composed, record, stop)
        try:
            with record.claimed():
                if config.force:
                    record.clear()
                record.freeze(composed)
                with log_to(directory / "run.log"):
                    results = record.completed_results
                    if results:
                        log.info("%s is completed; force=true starts it afresh", directory)
                        show_results(results)
                    else:
                        results = _carry_out(config, composed, record, stop)
                    for finding in results.get("warnings", []):  # earlier versions had none
                        log.warning("%s %s", finding["text"], finding["advice"])
        except Preempted as asked:
            requeue_if_asked(asked, job_id())
            raise
    return results["metrics"].get("average_accuracy")


def _carry_out(
    config: Config, composed: DictConfig, record: RunDirectory, stop: StopRequests
) -> dict[str, Any]:
    """Trains, and leaves results.json and a true status.json."""
    with record.running():
        from clpeft.experiment import run_experiment  # slow to import: after the checks

        quiet_libraries()
        keep_libraries()
        results = run_experiment(config, composed, record.path, stop)
        record.write_results(results)
    return results


def _assist(
    config: Config, composed: DictConfig, record: RunDirectory, stop: StopRequests
) -> float | None:
    """What the other processes of a run do: train along, and write nothing."""
    from clpeft.experiment import run_experiment

    if record.completed_results and not config.force:
        return None
    quiet_libraries()
    keep_libraries()
    try:
        results = run_experiment(config, composed, record.path, stop)
    except Preempted:
        # the launcher ends all processes once one has gone, and the main one has yet to write
        until = time.monotonic() + EPILOGUE_SECONDS
        while record.status.get("status") == "running" and time.monotonic() < until:
            time.sleep(0.2)
        raise
    return results["metrics"].get("average_accuracy")


def check(composed: DictConfig, directory: Path) -> Config:
    """Checks a run as far as neither a model nor the machine that it is to run on is needed.

    Args:
        composed: The config of the run.
        directory: The run directory, which need not exist.

    Returns:
        Its settings.

    Raises:
        ConfigError: If the config could not work, or the directory holds another run.
    """
    from clpeft.models.load import check_model
    from clpeft.peft_methods.carried import check_method
    from clpeft.streams.build import check_stream

    config = settle(composed)
    check_model(config.model)
    check_method(config.model.path, config.peft)
    check_stream(config.stream, config.paths.data_dir)
    RunDirectory(directory).check_is_for(composed)
    return config


@cache
def keep_libraries() -> None:
    """Spares the garbage collector what the imported libraries hold, which stays for good.

    Accelerate collects at the end of every task, and going through it takes a quarter of a second.
    """
    gc.collect()
    gc.freeze()


def quiet_libraries() -> None:
    """Switches off the libraries' own progress bars and chatter; errors still show."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    quiet_quantization()
    # names that transformers is about to drop: peft asks by one, and older releases know no other
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable"):
        warnings.filterwarnings("ignore", message=f"`{name}` is deprecated")
