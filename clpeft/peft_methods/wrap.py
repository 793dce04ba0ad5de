"""Putting an adapter of any of PEFT's types on a model, its head and what is new in it kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clpeft.config import ConfigError, nearest
from clpeft.models.targets import find_targets
from clpeft.peft_methods.base import peft_task

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

HEADS = {"classifier", "score"}  # what PEFT itself trains whole


def wrap(
    model: PreTrainedModel,
    config_class: type[PeftConfig],
    task_type: str,
    new: Sequence[str],
    target: str | list[str] | None = None,
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
        options: Further fields of `config_class`.

    Raises:
        ConfigError: If no module of the model is called as one that is named, or PEFT cannot adapt
            those that are.
    """
    from peft import get_peft_model
    from transformers.pytorch_utils import Conv1D

    named = options.pop("modules_to_save", None) or []
    _check_modules(model, named)
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
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"PEFT cannot put {config.peft_type.value} on {type(model).__name__}: "
            f"{' '.join(str(error).split()).rstrip('.')}."
        ) from error


def _check_modules(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Checks that a model has the modules that are to train whole; PEFT passes over others."""
    kind = type(model).__name__
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise ConfigError(
                f"modules_to_save names '{name}', which no module of {kind} is called."
                f"{nearest(name, {path.rpartition('.')[2] for path in paths})}"
            )
