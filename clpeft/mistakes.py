"""What a mistake in a command line or a config comes down to, in one sentence."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clpeft.config import Config, ConfigError, RunError, nearest
from clpeft.models.quantize import QUANTIZATIONS
from clpeft.registry import MODELS, PEFT_METHODS, STRATEGIES, STREAMS
from clpeft.slurm import SlurmSettings

SWEEP_EXTRA = {("hydra/launcher", "joblib"), ("hydra/sweeper", "optuna")}


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
        return unknown_key(unknown.group(1))
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
        return wrong_type(override.group(1), cause or error)
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


def wrong_type(given: str, error: Exception) -> str:
    """Why a value, given as KEY=VALUE or by its key alone, does not fit its field."""
    if "is not a ListConfig" in str(error):
        key, _, value = given.partition("=")
        return f"{given} must be a list: write {key}=[{value}]."
    return f"{given} is of the wrong type: {str(error).splitlines()[0].rstrip('.')}."


def unknown_key(key: str) -> str:
    """Why a dotted key is not there: something else was chosen, or it is written otherwise."""
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
