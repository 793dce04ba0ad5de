"""`clpeft run` as a Hydra application, and what it says when something goes wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from omegaconf import DictConfig


def run_application(overrides: Sequence[str]) -> int:
    """Hands a command line to Hydra.

    Args:
        overrides: Hydra's overrides and flags.

    Returns:
        The exit code: 1 after a mistake in the command line, told in one sentence, and after a
        sweep in which a run failed; all that failed are listed at its end, the others went on.
    """
    from hydra import main
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from clpeft.composition import explain, register_schemas
    from clpeft.launching import run_composed
    from clpeft.stopping import Preempted

    sys.argv = ["clpeft", *overrides]
    wants_trace = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
    # Hydra would print and exit by itself; told to raise, it leaves the wording to us
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[str] = []
    started = False

    def job(composed: DictConfig) -> float | None:
        nonlocal started
        started = True
        try:
            return run_composed(composed)
        except Exception as error:
            sentence = explain(error)
            settings = HydraConfig.get()
            if settings.mode == RunMode.MULTIRUN:
                told = sentence or f"{type(error).__name__}: {error}"
                failures.append(f"{Path(settings.runtime.output_dir)}: {told}")
                raise
            if sentence is None or wants_trace:
                raise
            # an exit rather than an exception, which Hydra would announce in words of its own
            raise SystemExit(_refuse(sentence)) from error

    register_schemas()
    try:
        main(config_path="pkg://clpeft.conf", config_name="config", version_base="1.3")(job)()
    except Preempted as asked:
        return asked.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if wants_trace:
            raise
        if failures:
            runs = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
            return _refuse("\n  ".join([f"{runs} of this sweep failed:", *failures]))
        sentence = explain(error)
        if sentence is None and isinstance(error, OSError) and not started:
            sentence = (
                f"the run directory cannot be made ({error.strerror}: {error.filename}); set "
                f"paths.output_dir to a folder that can be written."
            )
        if sentence is None:
            raise
        return _refuse(sentence)
    return 0


def _refuse(told: str) -> int:
    typer.echo(f"clpeft: {told}", err=True)
    return 1
