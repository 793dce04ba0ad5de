"""Any PEFT method by the name of its type, its options checked against PEFT's own config of it."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from omegaconf import MISSING

from clpeft.config import ConfigError, nearest
from clpeft.models.quantize import quiet_quantization
from clpeft.models.targets import CHOICES, check_target
from clpeft.peft_methods.base import PEFT_TASK_TYPES, PeftMethodConfig
from clpeft.peft_methods.prefix import PrefixSettings
from clpeft.peft_methods.wrap import wrap
from clpeft.registry import PEFT_METHODS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

# Fields of PEFT's configs that are not options: what sets them instead.
SET_ELSEWHERE = {
    "target_modules": "peft.target does",
    "exclude_modules": "peft.target does",
    "task_type": "model.task_type does",
    "peft_type": "peft.type does",
    "base_model_name_or_path": "the model does",
    "revision": "the model does",
    "fan_in_fan_out": "the model does",
    "auto_mapping": "PEFT does",
    "peft_version": "PEFT does",
    "inference_mode": "PEFT does",
}
# Types that cannot be trained here, and why, as the end of a sentence.
IMPOSSIBLE = {
    "CPT": "its forward pass needs to be told what each token of a prompt is for",
    "MULTITASK_PROMPT_TUNING": "its forward pass needs to be told the task",
    "POLY": "its forward pass needs to be told the task",
    "SHADOW": "it replaces the model's forward pass by one of its own",
    "XLORA": "it mixes adapters that were trained before",
}
# Types that adapt no linear layers, and what they adapt instead; `auto` leaves it to PEFT.
NOT_LINEAR = {
    "ADAPTION_PROMPT": "attention blocks",
    "LN_TUNING": "norms",
    "TRAINABLE_TOKENS": "embeddings",
}
# Types whose keys and values are put into a cache, as those of `peft=prefix` are.
CACHED = frozenset({"CARTRIDGE"})
# Types that trained on int8 and nf4 layers of bitsandbytes 0.50, left the base's bytes as they were
# and gave the same logits when they were loaded again (PEFT 0.21.2, on a CPU).
ON_QUANTIZED = frozenset(
    """BEFT BOFT CARTRIDGE FOURIERFT HIRA LILY LN_TUNING MISS OFT PVERA RANDLORA ROAD SHIRA
    TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT""".split()
)
# Likewise on torchao's, 0.18: HIRA multiplies the base's weight entry by entry, which torchao does
# not, and others take it for the plain layer that it is not with bitsandbytes.
ON_TORCHAO = ON_QUANTIZED - {"HIRA"} | {"C3A", "GRALORA", "LOHA", "LOKR"}


@dataclass
class AnySettings(PeftMethodConfig):
    """Settings of a method that PEFT has."""

    type: str = MISSING  # of peft.PeftType, such as VERA
    # minimal (also called auto), attention, all-linear, a list of module names, or null: left to
    # PEFT, as auto does with types that adapt no linear layers
    target: Any = MISSING
    options: Any = None  # fields of PEFT's config of that type

    task_types_reason: ClassVar[str | None] = "PEFT trains no head beside it"
    quantized_reason: ClassVar[str] = "is not known to train on other than dense weights"
    gradient_checkpointing_reason: ClassVar[str] = PrefixSettings.gradient_checkpointing_reason

    @property
    def kind(self) -> str:
        return self.type.lower()

    @property
    def task_types(self) -> frozenset[str]:  # type: ignore[override]
        trains_head = "modules_to_save" in _fields(config_class(self.type))
        return frozenset(PEFT_TASK_TYPES) - (set() if trains_head else {"sequence_classification"})

    @property
    def supports_quantized(self) -> bool:  # type: ignore[override]
        return self.type in ON_QUANTIZED

    def trains_on(self, quantization: str) -> bool:
        return self.type in (ON_TORCHAO if quantization == "torchao_int8" else ON_QUANTIZED)

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]
        return self.type not in CACHED

    @property
    def meant(self) -> Any:
        """`target`, or None where it is left to PEFT."""
        return None if self.target == "auto" and self.type in NOT_LINEAR else self.target

    @property
    def trained_whole(self) -> list[str]:
        return (self.options or {}).get("modules_to_save") or []

    def check(self) -> None:
        known = _fields(config_class(self.type))
        options = self.options or {}
        if not isinstance(options, dict):
            raise ConfigError(f"peft.options={options} must be a mapping, such as {{r: 8}}.")
        hints = get_type_hints(config_class(self.type))
        for name, value in options.items():
            if name in SET_ELSEWHERE:
                raise ConfigError(f"peft.options.{name} is not to be set: {SET_ELSEWHERE[name]}.")
            if name not in known:
                free = known - SET_ELSEWHERE.keys()
                raise ConfigError(
                    f"peft.options.{name} does not exist: PEFT's {self.type} has no such field."
                    f"{nearest(str(name), free)}"
                )
            if not fits(value, hints[name]):
                raise ConfigError(
                    f"peft.options.{name}={value} is of the wrong type: PEFT's {self.type} takes "
                    f"{told(hints[name])}."
                )
        if "target_modules" not in known and self.target is not None:
            raise ConfigError(
                f"peft.target={self.target} means nothing to peft.type={self.type}, which adapts "
                f"no modules; set peft.target=null."
            )
        if self.meant is not None:
            check_target(self.target)
            self._check_not_linear()
        try:
            config_class(self.type)(**options)
        except ValueError as error:
            raise ConfigError(
                f"peft.options={options} is nothing that PEFT's {self.type} takes: "
                f"{' '.join(str(error).split()).rstrip('.')}."
            ) from error

    def _check_not_linear(self) -> None:
        free = self.type != "ADAPTION_PROMPT"  # whose modules PEFT alone knows
        if self.type not in NOT_LINEAR or (free and self.target not in CHOICES):
            return
        raise ConfigError(
            f"peft.target={self.target} is not for peft.type={self.type}, which adapts "
            f"{NOT_LINEAR[self.type]}; set peft.target=null, which leaves the choice to PEFT"
            f"{', or list their names' * free}."
        )


@PEFT_METHODS.register("any", config=AnySettings)
def apply_any(
    model: PreTrainedModel, config: AnySettings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model and puts an adapter of the chosen type on it.

    Raises:
        ConfigError: If PEFT cannot adapt the model so, or would adapt it otherwise than asked.
    """
    options = config.options or {}
    if config.type == "BOFT" and options.get("boft_n_butterfly_factor", 1) > 1:
        _check_butterflies()
    kind, target = config_class(config.type), config.meant
    if config.type == "LN_TUNING" and target is not None:
        # which are no layers that `peft.target` knows otherwise
        names = [target] if isinstance(target, str) else target
        _check_norms(model, names)
        options, target = options | {"target_modules": names}, None
    with warnings.catch_warnings():
        # PEFT misses BOFT's CUDA extension, which one butterfly factor has no use for
        warnings.filterwarnings("ignore", "Failed to load the CUDA extension|Setting boft_n_")
        if config.type == "LN_TUNING":
            warnings.filterwarnings("ignore", "Unsupported layer type")  # as it calls any norm
        adapted = wrap(model, kind, task_type, new, target, "peft.options.", **options)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    if all(".modules_to_save." in name for name in trained):
        raise ConfigError(
            f"peft.type={config.type} adapts no layer of {type(model).__name__} that "
            f"peft.target={config.target} means: PEFT passes over layers of their kind."
        )
    return adapted


def config_class(name: str) -> type[PeftConfig]:
    """PEFT's config class of a type of adapter.

    Raises:
        ConfigError: If there is none of that name, or it is not for `peft=any`.
    """
    quiet_quantization()  # which PEFT imports
    import peft  # noqa: F401  fills the mapping
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {kind.value: found for kind, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    possible = {n for n in classes if n not in IMPOSSIBLE and own_name(n) is None}
    if name in possible:
        return classes[name]
    if name in IMPOSSIBLE:
        raise ConfigError(f"peft.type={name} cannot be trained here: {IMPOSSIBLE[name]}.")
    if name in classes:
        raise ConfigError(
            f"peft.type={name} has settings of its own: choose peft={own_name(name)}."
        )
    raise ConfigError(f"peft.type={name} does not exist.{nearest(name.upper(), possible)}")


def own_name(peft_type: str) -> str | None:
    """What a type of PEFT is called in this project where a method with settings of its own has it.

    A third party's method may have the type of one of PEFT's too, which stays what it is.
    """
    ours = [entry for entry in PEFT_METHODS if entry.config.__module__.startswith("clpeft.")]
    kind = peft_type.lower()
    if any(entry.name == kind for entry in ours):
        return kind
    named = (entry.name for entry in ours if entry.config.peft_type == kind)  # type: ignore[attr-defined]
    return next(named, None)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a field is declared with."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is dict:
        return isinstance(value, dict) and all(fits(item, parts[1]) for item in value.values())
    if kind in (list, tuple):
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def told(hint: Any) -> str:
    """A type as a message says it."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(told(part) for part in parts)
    if get_origin(hint) is Literal:
        return " or ".join(map(str, parts))
    if parts:
        return f"{get_origin(hint).__name__} of {told(parts[-1])}"
    return "null" if hint is type(None) else hint.__name__


def _fields(kind: type[PeftConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


def _check_norms(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Checks that names are those of norms; PEFT would train whatever is called so, whole."""
    kinds = {path: type(module).__name__ for path, module in model.named_modules() if path}
    norms = {path.rpartition(".")[2] for path, kind in kinds.items() if "norm" in kind.lower()}
    for name in names:
        found = [kind for path, kind in kinds.items() if f".{path}".endswith(f".{name}")]
        if not found or any("norm" not in kind.lower() for kind in found):
            what = "no module" if not found else f"a {found[0]}"
            raise ConfigError(
                f"peft.target names '{name}', which is {what} of {type(model).__name__}, but "
                f"peft.type=LN_TUNING adapts norms; choose among {', '.join(sorted(norms))}."
            )


def _check_butterflies() -> None:
    from peft.tuners.boft.layer import get_fbd_cuda

    if not get_fbd_cuda():
        raise ConfigError(
            "peft.options.boft_n_butterfly_factor is more than 1, for which PEFT needs a CUDA "
            "extension that could not be built here (it takes nvcc and ninja), and would take 1 "
            "instead; set it to 1."
        )
