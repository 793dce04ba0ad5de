"""Base models and finished runs that tests share; built once per test process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A job in a shell's background ignores Ctrl-C, and so would the runs that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a test stops must not requeue the job that the tests may run in."""
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where generated bases and encoded streams are kept for the whole session."""
    import torch

    import clpeft.experiment  # noqa: F401
    from clpeft.launching import quiet_libraries

    torch.set_num_threads(1)  # tiny models; the test processes share the cores
    quiet_libraries()
    base = tmp_path_factory.getbasetemp()
    # beside the other workers', where there are some: what one of them built, all can use
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def bases(cache_dir: Path) -> Callable[[str], Path]:
    """The folder of a tiny generated base model, by name."""
    from clpeft.models.generated import generated_base
    from clpeft.streams.build import build_stream
    from tests.running import compose
    from tests.settings import TINY, TINY_MODELS

    built: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in built:
            _, config = compose([*TINY, *TINY_MODELS[name]])
            stream = build_stream(config.stream, data_dir=None)
            built[name] = generated_base(config.model, stream, cache_dir)
        return built[name]

    return base


@pytest.fixture(scope="session")
def tiny(cache_dir: Path, bases: Callable[[str], Path]) -> Callable[..., list[str]]:
    """Overrides of a tiny run under one or several strategies, the base model at hand.

    `like` names strategies that it is to be compared with: it is run on a model and in a scenario
    that all of them work with. `peft` is a name of PEFT_SETTINGS.
    """
    from tests.settings import (
        SCENARIOS,
        TINY,
        base_of,
        models_of,
        overrides_of,
        peft_overrides,
        scenarios_of,
        side_by_side,
    )

    def overrides(
        strategy: str,
        *more: str,
        model: str | None = None,
        like: str = "",
        peft: str = "lora",
    ) -> list[str]:
        names = side_by_side(strategy)
        all_names = [*names, *filter(None, like.split("+"))]
        model = model or models_of(*all_names)[0]
        scenario = scenarios_of(*all_names)[0]
        return [
            *TINY,
            *peft_overrides(peft),
            f"model={model}",
            f"model.path={bases(model)}",
            f"paths.cache_dir={cache_dir}",
            *([f"stream.scenario={scenario}"] if scenario != SCENARIOS[0] else []),
            f"strategy=[{','.join(base_of(name) for name in names)}]",
            *[override for name in names for override in overrides_of(name)],
            *more,
        ]

    return overrides


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]
) -> Callable[..., Any]:
    """A finished tiny run, trained the first time it is asked for; not to be changed."""
    from tests.running import Outcome, run_it

    done: dict[tuple[str, ...], Outcome] = {}

    def outcome(strategy: str, *more: str, **given: str) -> Outcome:
        key = tuple(tiny(strategy, *more, **given))
        if key not in done:
            directory = tmp_path_factory.mktemp("finished") / strategy.replace(":", "_")
            done[key] = run_it(key, directory)
        return done[key]

    return outcome
