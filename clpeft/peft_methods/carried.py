"""An adapter that a run starts from: the model's source is an adapter's folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpeft.config import ConfigError
from clpeft.models.adapted import adapter_settings
from clpeft.peft_methods.base import PeftMethodConfig, method_of
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

log = logging.getLogger(__name__)

ADAPTER = "default"
# what says who wrote an adapter, and for what
NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}
# how a soft prompt begins, which PEFT does not call init_...
PROMPT_BEGINS = {
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
}
# what is compared by the modules that it comes down to
BY_MODULES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}

# what reads init_lora_weights, and with which beginnings its values take out of the base's own
# weights what the adapter begins as
LORA = {"lora", "lisa_hybrid"}
CONVERTIBLE = ("pissa", "corda", "olora", "lora_ga")
CHANGES_BASE = (*CONVERTIBLE, "loftq")
CONVERT = (
    "have PEFT save it anew as plain LoRA, with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), or "
)
MERGE = "merge it where it was made (merge_and_unload) and start from the whole model"


def check_method(path: str | None, method: PeftMethodConfig) -> None:
    """Refuses an adapter to start from that the chosen method does not make or cannot train.

    Its settings are compared later, by `take_over`: some need the model.

    Args:
        path: `model.path`, which may hold an adapter.
        method: Settings of the chosen PEFT method.

    Raises:
        ConfigError: If it holds such an adapter.
    """
    if path is None or (settings := adapter_settings(str(Path(path).expanduser()))) is None:
        return
    there = settings["peft_type"].lower()
    if there != (method.peft_type or method.kind):
        kind = method_of(there)
        right = f"peft={kind}" if kind in PEFT_METHODS else f"peft=any peft.type={there.upper()}"
        raise ConfigError(
            f"peft={method.kind} was asked for, but model.path={path} holds a {kind} adapter; "
            f"choose {right}, or set model.path to its base model."
        )
    if there in LORA and _begins(settings.get("init_lora_weights"), CHANGES_BASE):
        init = settings["init_lora_weights"]
        raise ConfigError(
            f"The adapter in model.path={path} was made with init_lora_weights={init}, which "
            f"changed the weights of its base, so that it does not stand on "
            f"{settings['base_model_name_or_path']} as that is; "
            f"{CONVERT if _begins(init, CONVERTIBLE) else ''}{MERGE}."
        )
    if there == "p_tuning" or settings.get("prefix_projection"):
        raise ConfigError(
            f"The adapter in model.path={path} holds what a network made that was not saved with "
            f"it, so that it cannot be trained on; start from its base model, "
            f"{settings['base_model_name_or_path']}."
        )


def take_over(model: Any, source: str, method: PeftMethodConfig) -> None:
    """Gives the adapter that was put on a model the weights of the one in its source, if any.

    So it is applied once, by the same way as a new one, and is what the run's settings say.

    Args:
        model: The model with its adapter.
        source: What the model was loaded from.
        method: Settings of the chosen PEFT method.

    Raises:
        ConfigError: If the source's adapter is another than the chosen settings make.
    """
    if adapter_settings(source) is None:
        return
    from peft import (
        PeftConfig,
        get_peft_model_state_dict,
        load_peft_weights,
        set_peft_model_state_dict,
    )

    carried, asked = PeftConfig.from_pretrained(source), model.peft_config[ADAPTER]
    if told := _differences(carried, asked, model, method.of_training):
        raise ConfigError(
            f"The adapter in {source} is not the one that peft={method.kind} makes here ({told}); "
            f"set peft's settings to the adapter's, or model.path to its base model."
        )
    own = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    weights = method.to_go_on(load_peft_weights(source, device="cpu"), own)
    if told := _misfits(weights, own):
        raise ConfigError(
            f"The adapter in {source} does not fit the model of this run ({told}); start from its "
            f"base model."
        )
    set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
    log.info("the run starts from the %s adapter in %s", method.kind, source)


def _differences(
    carried: PeftConfig, asked: PeftConfig, model: PeftModel, of_training: frozenset[str]
) -> str:
    """The settings that two adapters do not share, as `r is 4 there and 8 here`."""
    one, other = _settings(carried), _settings(asked)
    told = sorted(
        f"{key} is {one[key]} there and {other[key]} here"
        for key in one.keys() & other.keys()
        if one[key] != other[key] and key not in of_training and _counts(key)
    )
    if "target_modules" in other:
        paths = [path for path, _ in model.get_base_model().named_modules()]
        there, here = ({path for path in paths if _targets(c, path)} for c in (carried, asked))
        if there != here:
            more, fewer = (
                ", ".join(sorted({path.rpartition(".")[2] for path in lot})) or "none"
                for lot in (there - here, here - there)
            )
            told.append(f"adapted there only: {more}; here only: {fewer}")
    return ", ".join(told)


def _settings(config: PeftConfig) -> dict[str, Any]:
    """As the file has them: sets as lists, in one order."""
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    if plain.get("modules_to_save") is not None:
        plain["modules_to_save"] = sorted({*plain["modules_to_save"]})
    return json.loads(json.dumps(plain, default=str))


def _counts(key: str) -> bool:
    """Whether a setting is the adapter's own, and not one of how its training starts or goes."""
    if key in NO_MATTER | PROMPT_BEGINS | BY_MODULES:
        return False
    begins = key.startswith("init_") and key != "init_r"  # which is AdaLoRA's rank
    return not begins and not key.endswith("dropout")


def _begins(init: bool | str | None, names: tuple[str, ...]) -> bool:
    return isinstance(init, str) and init.lower().startswith(names)


def _targets(config: PeftConfig, path: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, path))


def _misfits(weights: dict[str, Any], own: dict[str, Any]) -> str:
    """The first weights that one adapter has and another has not, or in another shape."""
    for name in sorted({*weights, *own}):
        there, here = (list(w[name].shape) if name in w else "not at all" for w in (weights, own))
        if there != here:
            return f"{name} is {there} there and {here} here"
    return ""
