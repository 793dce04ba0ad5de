"""From what the user typed to a checked config."""

from __future__ import annotations

import dataclasses
from importlib import resources
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from clpeft.checks import check_combination, check_fields
from clpeft.config import Config, ConfigError, nearest
from clpeft.mistakes import unknown_key, wrong_type
from clpeft.models.quantize import QUANTIZATIONS
from clpeft.registry import MODELS, PEFT_METHODS, STRATEGIES, STREAMS, Entry
from clpeft.slurm import SlurmSettings

# what Hydra's plugins are set to here, where they are installed: group → option → values
PLUGIN_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "hydra/launcher": {
        # more at once are for whoever knows the machine's memory; and one run after the other to
        # each process, because joblib would hand out several together after completed ones
        "joblib": {"n_jobs": 2, "batch_size": "1"},
    },
    "hydra/sweeper": {
        # the others go on when one fails; n_jobs is how many are chosen before any is scored
        "optuna": {"direction": "maximize", "max_failure_rate": 1.0, "n_jobs": 1},
    },
    # with a seed, the same command asks for the same settings, and so goes on where it stopped
    "hydra/sweeper/sampler": {"tpe": {"seed": 0}, "random": {"seed": 0}},
}


def register_schemas() -> None:
    """Gives Hydra the schemas of everything that can be chosen."""
    store = ConfigStore.instance()
    store.store(group="schema", name="root", node=Config)
    store.store(group="schema", name="slurm", node=SlurmSettings)
    for registry in (STRATEGIES, PEFT_METHODS, STREAMS):
        for entry in registry:
            store.store(group=f"schema/{registry.kind}", name=entry.name, node=entry.config)
    for name, schema in QUANTIZATIONS.items():
        store.store(group="schema/quantization", name=name, node=schema)
    shipped = resources.files("clpeft.conf")
    for entry in STRATEGIES:
        # a third party's strategy can be chosen without a YAML; its dataclass gives the values
        if not (shipped / "strategy" / f"{entry.name}.yaml").is_file():
            package = f"strategies.{entry.name}"
            store.store(group="strategy", name=entry.name, node=entry.config, package=package)
    for entry in MODELS:
        # nor does a model of one's own need one, which is known by the name it is registered under
        if (shipped / "model" / f"{entry.name}.yaml").is_file():
            raise ValueError(
                f"The model '{entry.name}' of {entry.target.__module__} is called as one of "
                f"clpeft's own; rename it."
            )
        node = _own_model(entry)
        store.store(group="schema/model", name=entry.name, node=node)
        store.store(group="model", name=entry.name, node=node)
    _set_plugin_defaults(store)


def _own_model(entry: Entry) -> DictConfig:
    """The settings of a model of one's own, with its name in them."""
    return OmegaConf.merge(  # type: ignore[return-value]
        OmegaConf.structured(entry.config), {"name": entry.name, "builder": entry.name}
    )


def _set_plugin_defaults(store: ConfigStore) -> None:
    Plugins.instance()  # finds the plugins that are installed, which store their own defaults
    for group, options in PLUGIN_DEFAULTS.items():
        for name, values in options.items():
            path = f"{group}/{name}.yaml"
            if store.get_type(path) == ObjectType.CONFIG:
                stored = store.load(path)
                stored.node.merge_with(values)
                store.store(name, stored.node, group, stored.package, stored.provider)


def settle(composed: DictConfig) -> Config:
    """Turns a composed config into its dataclasses, checked as far as no model is needed.

    Args:
        composed: What Hydra composed, or what a run directory's config.yaml holds.

    Returns:
        The settings of one run.

    Raises:
        ConfigError: For anything that could not work, in one sentence.
    """
    config = as_dataclasses(composed)
    check_fields(config, "")
    check_combination(config)
    return config


def as_dataclasses(composed: DictConfig) -> Config:
    """A composed config with the names and types of its schemas; its values are unchecked.

    Raises:
        ConfigError: If something in it does not exist, or is of the wrong type.
    """
    _check_chosen(composed)
    schema = OmegaConf.structured(Config)
    if "builder" in composed.model:
        schema.model = OmegaConf.structured(MODELS[composed.model.builder].config)
    typed = _fitted(schema, OmegaConf.to_container(composed, resolve=True), "")
    nodes = [(f"strategies.{name}", STRATEGIES[name].config) for name in composed.strategies]
    nodes += [("peft", PEFT_METHODS[composed.peft.method].config)]
    nodes += [("stream", STREAMS[composed.stream.kind].config)]
    nodes += [("quantization", QUANTIZATIONS[composed.quantization.method])]
    for path, schema in nodes:
        plain = OmegaConf.to_container(OmegaConf.select(typed, path), resolve=True)
        node = _fitted(OmegaConf.structured(schema), plain, f"{path}.")
        OmegaConf.update(typed, path, node, merge=False)
    return OmegaConf.to_object(typed)  # type: ignore[return-value]


def _fitted(schema: DictConfig, values: Any, path: str) -> DictConfig:
    """Values with the names and types of a schema; what was added to it (`+key=...`) is found."""
    try:
        return OmegaConf.merge(schema, values)  # type: ignore[return-value]
    except ConfigKeyError as error:
        raise ConfigError(unknown_key(f"{path}{error.full_key}")) from error
    except ValidationError as error:
        raise ConfigError(wrong_type(f"{path}{error.full_key}", error)) from error


def _check_chosen(composed: DictConfig) -> None:
    chosen = [
        ("peft.method", PEFT_METHODS, composed.peft.method),
        ("stream.kind", STREAMS, composed.stream.kind),
    ]
    if "builder" in composed.model:
        chosen += [("model.builder", MODELS, composed.model.builder)]
    for group, registry, name in chosen:
        if name not in registry:
            options = [entry.name for entry in registry]
            raise ConfigError(f"{group}={name} does not exist.{nearest(name, options)}")
    if (method := composed.quantization.method) not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization.method={method} does not exist.{nearest(method, QUANTIZATIONS)}"
        )
    for name, node in composed.strategies.items():
        if name not in STRATEGIES:
            options = [entry.name for entry in STRATEGIES]
            raise ConfigError(
                f"strategies.{name} sets values for a strategy that does not exist."
                f"{nearest(str(name), options)}"
            )
        typed = dataclasses.is_dataclass(OmegaConf.get_type(composed.strategies, name))
        if _is_composing(composed) and not typed:
            given = ", ".join(f"strategies.{name}.{key}" for key in node) or f"strategies.{name}"
            others = [str(other) for other in composed.strategies if other != name]
            raise ConfigError(
                f"{given} is set (by a preset or on the command line) although the strategy "
                f"'{name}' was not chosen; remove it, or choose strategy="
                f"{'[' + ','.join([*others, str(name)]) + ']' if others else name}."
            )
    if not composed.strategies:
        raise ConfigError("No strategy is chosen; plain fine-tuning is strategy=finetune.")


def _is_composing(composed: DictConfig) -> bool:
    """Whether schemas are attached: so in a composition, not in a config read from a file."""
    return dataclasses.is_dataclass(OmegaConf.get_type(composed))
