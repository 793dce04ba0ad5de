"""From what the user typed to a checked config, or to one sentence about what was wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from clpeft.config import Config, ConfigError, RunError, nearest
from clpeft.models.own import check_own
from clpeft.models.quantize import QUANTIZATIONS
from clpeft.processes import sharding, world_size
from clpeft.registry import MODELS, PEFT_METHODS, STRATEGIES, STREAMS, Entry
from clpeft.slurm import SlurmSettings
from clpeft.strategies.base import Strategy, defines

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
SWEEP_EXTRA = {("hydra/launcher", "joblib"), ("hydra/sweeper", "optuna")}


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
        raise ConfigError(_unknown_key(f"{path}{error.full_key}")) from error
    except ValidationError as error:
        raise ConfigError(_wrong_type(f"{path}{error.full_key}", error)) from error


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


def check_fields(node: Any, path: str) -> None:
    """Checks every field against the options or the minimum that its dataclass declares."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        name = f"{path}{field.name}"
        options = field.metadata.get("options")
        if options and value not in options:
            raise ConfigError(
                f"{name}={value} is not possible; choose one of {', '.join(options)}."
                f"{nearest(str(value), options) if len(options) > 6 else ''}"
            )
        for number in value if isinstance(value, list) else [value]:
            _check_range(f"{name}={value}", number, field.metadata)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                if dataclasses.is_dataclass(item):
                    check_fields(item, f"{name}.{key}.")


def _check_range(given: str, number: Any, limits: Mapping[str, Any]) -> None:
    minimum, maximum, limit = (limits.get(name) for name in ("minimum", "maximum", "above"))
    if number is None:
        return
    if limit is not None and not number > limit:
        raise ConfigError(f"{given} is too small; it must be more than {limit}.")
    if minimum is None:
        return
    # so turned that NaN is refused too
    if not number >= minimum:
        raise ConfigError(f"{given} is too small; it must be at least {minimum}.")
    if maximum is not None and not number <= maximum:
        raise ConfigError(f"{given} is too large; it must be at most {maximum}.")


def check_combination(config: Config) -> None:
    """Checks whether the parts of a config go together.

    Raises:
        ConfigError: If they do not, in one sentence.
    """
    names = list(config.strategies)
    classes: dict[str, type[Strategy]] = {name: STRATEGIES[name].target for name in names}
    for name, cls in classes.items():
        _check_capabilities(config, name, cls)
        others = [other for other in names if other != name]
        if cls.is_reference and others:
            raise ConfigError(
                f"'{name}' is a reference that other strategies are compared with, so it runs "
                f"alone; drop it from strategy=[{','.join(names)}] or drop {', '.join(others)}."
            )
        for other in others:
            if other in cls.conflicts:
                raise ConfigError(
                    f"'{name}' and '{other}' cannot be combined: {cls.conflicts[other]}."
                )
    owners = [name for name, cls in classes.items() if cls.owns_adapters]
    if len(owners) > 1:
        raise ConfigError(
            f"{' and '.join(owners)} cannot be combined: each swaps or grows the adapter itself; "
            f"choose one of them."
        )
    strategies = {name: cls(config.strategies[name]) for name, cls in classes.items()}
    steppers = [n for n, strategy in strategies.items() if defines(strategy, "compute_gradients")]
    if len(steppers) > 1:
        raise ConfigError(
            f"{' and '.join(steppers)} cannot be combined: each replaces forward and backward; "
            f"choose one of them."
        )
    if steppers and config.training.compile:
        raise ConfigError(
            f"training.compile=true compiles a forward pass that the strategy '{steppers[0]}' "
            f"replaces; set it to false."
        )
    adders = [n for n, strategy in strategies.items() if defines(strategy, "loss_terms")]
    companion = config.peft.companion and config.peft.companion(config.peft)
    if companion is not None and defines(companion, "loss_terms"):
        adders.append(f"peft={config.peft.kind}")
    lost = [name for name in adders if name not in steppers]
    if steppers and lost:
        raise ConfigError(
            f"{steppers[0]} and {' and '.join(lost)} cannot be combined: {steppers[0]} replaces "
            f"forward and backward, so a term that is added to the loss would be left out."
        )
    _check_peft(config)
    check_own(config)
    for strategy in strategies.values():
        strategy.check(config)
    if len(config.optimizer.betas) != 2:
        raise ConfigError(
            f"optimizer.betas={config.optimizer.betas} must be two numbers, such as [0.9, 0.999]."
        )
    if config.evaluation.mode == "generate" and config.model.task_type == (
        "sequence_classification"
    ):
        raise ConfigError(
            "evaluation.mode=generate needs a model that writes text, but model.task_type is "
            "sequence_classification; use evaluation.mode=rank."
        )


def _check_peft(config: Config) -> None:
    peft = config.peft
    if config.model.task_type not in peft.task_types:
        reason = "" if peft.task_types_reason is None else f", because {peft.task_types_reason}"
        raise ConfigError(
            f"peft={peft.kind} does not work with model.task_type={config.model.task_type}"
            f"{reason}; it works with {', '.join(sorted(peft.task_types))}."
        )
    if not peft.supports_quantized and config.quantization.method != "none":
        raise ConfigError(
            f"peft={peft.kind} {peft.quantized_reason}, which quantization="
            f"{config.quantization.method} does not keep; use quantization=none."
        )
    if peft.companion is not None:
        _check_processes(f"peft={peft.kind}", peft.companion)
    if config.training.gradient_checkpointing and not peft.supports_gradient_checkpointing:
        raise ConfigError(
            f"peft={peft.kind} does not work with training.gradient_checkpointing=true, because "
            f"{peft.gradient_checkpointing_reason}; set it to false."
        )
    if peft.trains_biases and config.quantization.method != "none":
        raise ConfigError(
            f"peft.bias={peft.bias} trains biases of the base, whose number format quantization="
            f"{config.quantization.method} decides; set peft.bias=none."
        )
    for name in config.strategies:
        if name in peft.conflicts:
            raise ConfigError(
                f"The strategy '{name}' does not work with peft={peft.kind}: "
                f"{peft.conflicts[name]}."
            )
    peft.check()


def _check_capabilities(config: Config, name: str, cls: type[Strategy]) -> None:
    if config.model.task_type not in cls.task_types:
        reason = "" if cls.task_types_reason is None else f", because {cls.task_types_reason}"
        raise ConfigError(
            f"The strategy '{name}' does not work with model.task_type={config.model.task_type}"
            f"{reason}; it works with {', '.join(sorted(cls.task_types))}."
        )
    if cls.peft_types is not None and config.peft.kind not in cls.peft_types:
        raise ConfigError(
            f"The strategy '{name}' does not work with peft={config.peft.kind}; "
            f"it works with peft={' or peft='.join(sorted(cls.peft_types))}."
        )
    if not cls.supports_quantized and config.quantization.method != "none":
        raise ConfigError(
            f"The strategy '{name}' needs dense base weights, which quantization="
            f"{config.quantization.method} does not keep; use quantization=none."
        )
    if not cls.supports_gradient_accumulation and config.training.gradient_accumulation > 1:
        raise ConfigError(
            f"The strategy '{name}' does not work with training.gradient_accumulation="
            f"{config.training.gradient_accumulation}; set it to 1 and raise training.batch_size."
        )
    _check_processes(f"The strategy '{name}'", cls)


def _check_processes(subject: str, cls: type[Strategy]) -> None:
    if (shards := sharding()) is not None and shards not in cls.supports_sharding:
        known = ", ".join(sorted(cls.supports_sharding)) or "none yet"
        raise ConfigError(
            f"{subject} is not known to work with a model in shards ({shards} was "
            f"asked for; it works with: {known}); start it with launch/accelerate/ddp.yaml."
        )
    if not cls.supports_multi_process and world_size() > 1:
        raise ConfigError(
            f"{subject} is not known to give the same result on several processes; "
            f"start it with one process (WORLD_SIZE is {world_size()})."
        )


def explain(error: Exception) -> str | None:
    """What a mistake in a command line or a config comes down to, in one sentence.

    Args:
        error: What Hydra, OmegaConf or a check raised.

    Returns:
        The sentence; None if the error is not about the config.
    """
    if isinstance(error, ConfigError | RunError):
        return str(error)
    text = str(error)
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
    if isinstance(cause, ConfigError):
        return str(cause)
    if there := re.search(r"Could not append to config. An item is already at '(\S+)'", text):
        return f"The key '{there.group(1)}' exists already; leave out the + before it."
    if unknown := re.search(r"Could not (?:override|append to config.*?) '?([\w.@/-]+)'", text):
        return _unknown_key(unknown.group(1))
    if choice := re.search(r"Could not find '([\w/-]+)/([^/']+)'", text):
        group, name = choice.groups()
        if (group, name) in SWEEP_EXTRA:
            return (
                f"{group}={name} needs packages that are not installed: "
                f"pip install 'clpeft[sweep]'."
            )
        options = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        return f"{group}={name} does not exist.{nearest(name, options)}"
    if choice := re.search(r"Could not load '([\w/-]+)/([^/']+)'", text):  # one of several
        from clpeft.catalogue import catalogue

        group, name = choice.groups()
        options = [option.name for option in catalogue().get(group, [])]
        return f"{group}={name} does not exist.{nearest(name, options)}"
    if override := re.search(r"Error merging override (\S+)", text):
        return _wrong_type(override.group(1), cause or error)
    if several := re.search(r"Ambiguous value for argument '([^=]+)=([^']*)'", text):
        key, values = several.groups()
        return (
            f"{key}={values} gives several values: to sweep over them put -m before the overrides, "
            f"and for all of them at once write {key}=[{values}]."
        )
    if "Config group override must be" in text:
        return (
            "A config group takes the name of one of its options (`clpeft list` shows them), such "
            "as model=tiny_llama, or several of them, as in strategy=[ewc,replay]."
        )
    if missing := re.search(r"missing mandatory value: [\s\S]*full_key: (\S+)", text):
        return f"{missing.group(1)} has no value yet and needs one."
    if "Unexpected type for root: NoneType" in text:
        return (
            "A setting is given inside a part of the config that is null here, as model.warmup is "
            "where a model is not built but loaded; leave it out."
        )
    if isinstance(error, OmegaConfBaseException) or type(error).__module__.startswith("hydra."):
        lines = [line.strip().rstrip(".") for line in text.splitlines() if line.strip()]
        key = re.search(r"full_key: (\S+)", text)
        where = f" (at {key.group(1)})" if key else ""
        told = [line for line in lines if not re.match(r"(full_key|object_type|reference)", line)]
        return "; ".join(told) + where + "."
    return None


def _wrong_type(given: str, error: Exception) -> str:
    if "is not a ListConfig" in str(error):
        key, _, value = given.partition("=")
        return f"{given} must be a list: write {key}=[{value}]."
    return f"{given} is of the wrong type: {str(error).splitlines()[0].rstrip('.')}."


def _unknown_key(key: str) -> str:
    parts = key.split(".")
    if parts[0] == "strategies" and len(parts) > 1:
        name = parts[1]
        if name not in STRATEGIES:
            options = [entry.name for entry in STRATEGIES]
            return f"{key}: there is no strategy '{name}'.{nearest(name, options)}"
        fields = [field.name for field in dataclasses.fields(STRATEGIES[name].config)]
        if len(parts) > 2 and parts[2] not in fields:
            return f"{key} does not exist: '{name}' has no such setting.{nearest(parts[2], fields)}"
        return (
            f"{key} is set although the strategy '{name}' was not chosen; "
            f"choose strategy={name} or leave it out."
        )
    if key == "peft.options":
        return f"{key} adds an option to those that are set: write +peft.options.<name>=<value>."
    if key.startswith("peft.options."):
        return f"{key} is none of the options that are set; to add one write +{key}=<value>."
    options = [
        f"{group}={name}"
        for group, name, schema in _chosen_schemas()
        if parts[0] == group and parts[-1] in {field.name for field in dataclasses.fields(schema)}
    ]
    if options:
        return f"{key} is a setting of {' and '.join(options)}, and something else was chosen."
    known = sorted(_all_keys())
    return f"The key '{key}' does not exist.{nearest(key, known) if known else ''}"


def _chosen_schemas() -> Iterator[tuple[str, str, type]]:
    """Group, option and settings of the parts whose settings hang on what is chosen."""
    for registry in (PEFT_METHODS, STREAMS, MODELS):
        for entry in registry:
            yield registry.kind, entry.name, entry.config
    for name, schema in QUANTIZATIONS.items():
        yield "quantization", name, schema


def _all_keys() -> set[str]:
    def keys(schema: type, prefix: str) -> set[str]:
        node = OmegaConf.structured(schema)
        found = set()
        for name in node:
            found.add(f"{prefix}{name}")
            inner = OmegaConf.get_type(node, name)
            if dataclasses.is_dataclass(inner):
                found |= keys(inner, f"{prefix}{name}.")
        return found

    groups = {"model", "peft", "strategy", "stream", "optimizer", "scheduler", "training"}
    found = keys(Config, "") | keys(SlurmSettings, "hydra.launcher.") | groups
    for group, _, schema in _chosen_schemas():
        found |= keys(schema, f"{group}.")
    return found
