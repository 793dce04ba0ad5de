"""Folders that hold an adapter, as PEFT writes it, rather than a whole model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpeft.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_settings(source: str) -> dict[str, Any] | None:
    """What an adapter's folder says of it; None where there is no adapter.

    Args:
        source: A folder, or a name on the Hub, which is taken for a whole model.

    Raises:
        ConfigError: If it is not told as PEFT tells it.
    """
    file = Path(source) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON ({error}); PEFT has to save it anew.") from error
    if missing := {"peft_type", "base_model_name_or_path"} - settings.keys():
        raise ConfigError(
            f"{file} does not tell {' and '.join(sorted(missing))}; PEFT has to save it anew."
        )
    return settings


def whole_source(source: str) -> str:
    """Where the whole model is: of an adapter's folder, the base that it stands on."""
    settings = adapter_settings(source)
    return source if settings is None else settings["base_model_name_or_path"]


def check_adapter(source: str) -> None:
    """Refuses an adapter that would be applied to nothing, or twice.

    Args:
        source: `model.path`, a folder that is there.

    Raises:
        ConfigError: If it holds such an adapter.
    """
    settings = adapter_settings(source)
    if settings is None:
        return
    if (Path(source) / "config.json").is_file():
        raise ConfigError(
            f"model.path={source} holds a whole model (config.json) and an adapter "
            f"(adapter_config.json); put the adapter's files into a folder of their own."
        )
    if not any((Path(source) / name).is_file() for name in WEIGHTS):
        raise ConfigError(
            f"model.path={source} holds an adapter's settings (adapter_config.json) without its "
            f"weights; put {WEIGHTS[0]} beside them."
        )
    base = settings["base_model_name_or_path"]
    where = f"base_model_name_or_path in {source}/adapter_config.json is {base}"
    right = "write there where the whole model lies that the adapter was trained on"
    if base is None or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ConfigError(f"{where}, where there is no model; {right}.")
    if adapter_settings(base) is not None:
        raise ConfigError(f"{where}, which holds an adapter itself; {right}.")


def check_plain(model: PreTrainedModel, unexpected: Iterable[str], source: str) -> None:
    """Refuses a model that was loaded as a base and has an adapter inside it.

    Args:
        model: The loaded model.
        unexpected: What its source holds and it has no place for.
        source: The folder or the Hub's name.

    Raises:
        ConfigError: If it would be adapted twice, or its own weights were not recognised.
    """
    if model._hf_peft_config_loaded:
        raise ConfigError(
            f"{source} holds an adapter, which transformers has applied already; put the adapter's "
            f"files into a folder of their own and set model.path to that."
        )
    # transformers tells them as a set: sorted, the same folder gives the same sentence.
    inside = sorted(
        name for name in unexpected if ".base_layer." in name or ".modules_to_save." in name
    )
    if inside:
        raise ConfigError(
            f"{source} holds the weights of a model with an adapter inside it ({inside[0]}); save "
            f"the adapter with PeftModel.save_pretrained, or the model after merge_and_unload()."
        )
