"""Sweeps: which runs a command line with several values stands for."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from clpeft.composition import register_schemas
from clpeft.config import ConfigError, run_name
from clpeft.mistakes import explain

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass(frozen=True)
class Planned:
    """One run of a sweep, before it is started."""

    overrides: tuple[str, ...]  # what makes this run, one value per key
    composed: DictConfig
    directory: Path  # absolute


def expand(overrides: Sequence[str]) -> list[Planned]:
    """The runs that `clpeft -m <overrides>` would do, without starting any.

    Args:
        overrides: As after `-m`: `seed=0,1`, `strategy=glob(*)`, `optimizer.lr=range(1,4)`, and
            plain ones, Hydra's own among them.

    Returns:
        The runs in Hydra's order; one that is named twice (`seed=0,0`) once.

    Raises:
        ConfigError: In one sentence, if one of them cannot be composed, or if the sweeper chooses
            its runs by the results of others, so that there is no list of them.
    """
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    register_schemas()
    try:
        with initialize_config_module("clpeft.conf", job_name="clpeft", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            given = [*overrides, "hydra.mode=MULTIRUN"]
            whole = loader.load_configuration("config", given, run_mode=RunMode.MULTIRUN)
            return runs_of(loader, whole)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        raise ConfigError(sentence) from error


def is_basic(whole: DictConfig) -> bool:
    """Whether a sweep goes through a list of runs, rather than choosing the next by results."""
    return bool(whole.hydra.sweeper._target_ == BASIC)


def runs_of(loader: Any, whole: DictConfig) -> list[Planned]:
    """The runs of a sweep.

    Args:
        loader: Hydra's config loader.
        whole: The config that the sweep is started with, as Hydra composes it for several runs.

    Returns:
        See `expand`.

    Raises:
        ConfigError: If the sweeper chooses its runs by results.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper = whole.hydra.sweeper
    if not is_basic(whole):
        name = whole.hydra.runtime.choices["hydra/sweeper"]
        raise ConfigError(
            f"hydra/sweeper={name} chooses its runs by the results of earlier ones, so they cannot "
            f"be listed beforehand; leave it out, or start the sweep with clpeft -m."
        )
    given = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    # unresolved, as Hydra takes them: a ${seed} in them is each run's own
    given += OmegaConf.to_container(whole.hydra.overrides.task, resolve=False)  # type: ignore[arg-type]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    planned = [plan(loader, whole, one, number) for number, one in enumerate(combinations)]
    # a directory of two different runs stays twice: the second must be refused, not forgotten
    return list({(one.directory, run_name(one.composed)): one for one in planned}.values())


def plan(loader: Any, whole: DictConfig, overrides: Sequence[str], number: int) -> Planned:
    """Composes one run of a sweep as Hydra's launchers do.

    Args:
        loader: Hydra's config loader.
        whole: The config that the sweep was started with.
        overrides: One value per key.
        number: Which run of the sweep it is, from 0.

    Returns:
        The run, its config without the `hydra` node and with everything in it resolved.
    """
    from hydra.core.hydra_config import HydraConfig

    config = loader.load_sweep_config(whole, list(overrides))
    with flag_override(config, "struct", False):
        config.hydra.job.id = config.hydra.job.num = number
    active = HydraConfig.instance()
    before = active.cfg
    active.set_config(config)  # for what refers to ${hydra:...}
    try:
        folder = os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
        composed = copy.deepcopy(config)
        with flag_override(composed, ["struct", "readonly"], False):
            del composed["hydra"]
        OmegaConf.resolve(composed)
    finally:
        active.cfg = before
    return Planned(tuple(overrides), composed, Path(os.path.abspath(folder)))
