"""Putting an adapter of any of PEFT's types on a model, its head and what is new in it kept."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from clpeft.config import ConfigError, nearest
from clpeft.models.targets import find_targets
from clpeft.peft_methods.base import peft_task
from clpeft.peft_methods.reach import check_adapted, check_layers

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

HEADS = {"classifier", "score"}  # what PEFT itself trains whole
# PEFT's warnings that an option was given and another value is taken
ADJUSTED = re.compile(r"Invalid `(\w+)` \((.+)\)! Adjusted `\w+` to \((.+)\)")


def wrap(
    model: PreTrainedModel,
    config_class: type[PeftConfig],
    task_type: str,
    new: Sequence[str],
    target: str | list[str] | None = None,
    prefix: str = "peft.",
    **options: Any,
) -> PeftModel:
    """Freezes a model and puts an adapter on it.

    The head of a classifier trains whole, as PEFT does for that task type, and so does what else
    of it is new.

    Args:
        model: The base model.
        config_class: PEFT's config of the adapter's type.
        task_type: sequence_classification, causal_lm or seq2seq_lm.
        new: Paths of modules that the model's source had no weights for.
        target: As `peft.target`; None leaves it to PEFT, or to `options`.
        prefix: What stands before the names of options in messages.
        options: Further fields of `config_class`.

    Raises:
        ConfigError: If no module of the model is called as one that is named, an option is for
            layers or modules that are not adapted, or PEFT cannot adapt those that are, or not as
            asked.
    """
    from transformers.pytorch_utils import Conv1D

    named = options.pop("modules_to_save", None) or []
    _check_modules(model, named, prefix)
    if target is not None:
        options["target_modules"] = find_targets(model, target, new)
    task = peft_task(model, task_type)
    whole = [path for path in new if task is None or not HEADS & set(path.split("."))]
    asked = {
        "modules_to_save": [*named, *whole] or None,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
    }
    fields = {field.name for field in dataclasses.fields(config_class)}
    known = {name: value for name, value in asked.items() if name in fields}
    config = config_class(task_type=task, **known, **options)
    check_layers(model, config, prefix)
    adapted = _put(model, config, prefix)
    check_adapted(adapted, prefix)
    return adapted


def _put(model: PreTrainedModel, config: PeftConfig, prefix: str) -> PeftModel:
    """PEFT's `get_peft_model`, its complaints told in one sentence."""
    from peft import get_peft_model

    what = f"{config.peft_type.value} on {type(model).__name__}"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ADJUSTED.pattern, UserWarning)
        # which are refused, once the model is adapted
        warnings.filterwarnings("ignore", r"The following \w+ keys did not match", RuntimeWarning)
        try:
            return get_peft_model(model, config)
        except UserWarning as warning:
            if (adjusted := ADJUSTED.match(str(warning))) is None:
                raise
            option, given, taken = adjusted.groups()
            raise ConfigError(
                f"{prefix}{option}={given} does not divide the input size of every layer that is "
                f"adapted, and PEFT's {what} would take {taken}; set it to a number that does."
            ) from warning
        except (ValueError, TypeError) as error:
            told = " ".join(str(error).split()).rstrip(".")
            told = told.replace("`target_modules` in `peft_config`", "peft.target")
            lacking = _unset(config) if isinstance(error, TypeError) else []
            if lacking:
                told += f"; it may be for want of {', '.join(prefix + name for name in lacking)}"
            raise ConfigError(f"PEFT cannot put {what}: {told}.") from error


def _unset(config: PeftConfig) -> list[str]:
    """Fields that are null and are not declared to be: PEFT's way to say that they are needed."""
    hints = get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config) if vars(config)[field.name] is None]
    return [name for name in names if type(None) not in get_args(hints[name])]


def _check_modules(model: PreTrainedModel, names: Sequence[str], prefix: str) -> None:
    """Checks that a model has the modules that are to train whole; PEFT passes over others."""
    kind = type(model).__name__
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise ConfigError(
                f"{prefix}modules_to_save names '{name}', which no module of {kind} is called."
                f"{nearest(name, {path.rpartition('.')[2] for path in paths})}"
            )
