"""Checks of a config: each field by what its dataclass declares, and the parts as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clpeft.config import Config, ConfigError, nearest
from clpeft.models.own import check_own
from clpeft.models.quantize import QUANTIZATIONS
from clpeft.processes import sharding, world_size
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Strategy, defines

if TYPE_CHECKING:
    from clpeft.peft_methods.base import PeftMethodConfig


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


def _check_quantized(peft: PeftMethodConfig, method: str) -> None:
    if method == "none" or peft.trains_on(method):
        return
    others = [name for name in QUANTIZATIONS if name != "none" and peft.trains_on(name)]
    if others:
        raise ConfigError(
            f"peft={peft.kind} is not known to train on a base that quantization={method} stores; "
            f"use quantization={' or '.join(['none', *others])}."
        )
    raise ConfigError(
        f"peft={peft.kind} {peft.quantized_reason}, which quantization={method} does not keep; use "
        f"quantization=none."
    )


def _check_peft(config: Config) -> None:
    peft = config.peft
    _check_task_type(config, f"peft={peft.kind}", peft)
    _check_quantized(peft, config.quantization.method)
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
    _check_task_type(config, f"The strategy '{name}'", cls)
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


def _check_task_type(config: Config, subject: str, part: type[Strategy] | PeftMethodConfig) -> None:
    if config.model.task_type not in part.task_types:
        reason = "" if part.task_types_reason is None else f", because {part.task_types_reason}"
        raise ConfigError(
            f"{subject} does not work with model.task_type={config.model.task_type}"
            f"{reason}; it works with {', '.join(sorted(part.task_types))}."
        )


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
