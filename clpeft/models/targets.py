"""Which layers of a model an adapter goes on: what `peft.target` comes down to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from clpeft.config import ConfigError, alike

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

CHOICES = ("minimal", "attention", "all-linear")
ALIASES = {"auto": "minimal"}  # the name that it had

# Query and value projections, as LoRA's paper adapts (Hu et al. 2021, table 5), by the names that
# architectures give them within an attention layer; fused projections where there is nothing else.
QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Mixtral, Qwen, Gemma, Phi, OPT, GPT-J, BART, ViT
    ("query", "value"),  # BERT, RoBERTa
    ("query_proj", "value_proj"),  # DeBERTa-v2
    ("q_lin", "v_lin"),  # DistilBERT
    ("q", "v"),  # T5
    ("query_key_value",),  # GPT-NeoX/Pythia, BLOOM, Falcon
    ("qkv_proj",),  # Phi-3
    ("c_attn",),  # GPT-2
    ("Wqkv",),  # MPT
    ("in_proj",),  # DeBERTa
)

# where a model that is none of transformers' names the modules that answer: its paths of them
ANSWERING = "clpeft_answering_modules"


def check_target(target: Any) -> None:
    """Checks `peft.target` as far as no model is needed.

    Raises:
        ConfigError: If it is neither a choice nor names.
    """
    names = target if isinstance(target, list) else [target]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"peft.target={target} names no modules; set it to {', '.join(CHOICES)} or a list of "
            f"module names such as [q_proj,v_proj]."
        )


def find_targets(
    model: nn.Module, target: str | Sequence[str], new: Iterable[str] = ()
) -> list[str]:
    """The modules that `peft.target` means, by names as PEFT takes and saves them.

    PEFT adapts every module whose path is one of the names or ends in a dot and one of them. The
    names given back match just what is meant: neither a head nor what is new, and no layer
    elsewhere that happens to be called alike.

    Args:
        model: The base model.
        target: `minimal`, `attention`, `all-linear`, or names (a module is meant if its path ends
            in one).
        new: Paths of modules that train whole because the model's source has no weights for them.

    Returns:
        Names, each of which some module has.

    Raises:
        ConfigError: If nothing is meant by one; it names the layers that exist.
    """
    wanted = target_paths(model, target, new)
    paths = [path for path, _ in model.named_modules() if path]
    if isinstance(target, str):
        return _shortest_names(wanted, paths)
    matched = {path for path in paths for name in target if _is_called(path, name)}
    return list(target) if matched == set(wanted) else _shortest_names(wanted, paths)


def target_paths(
    model: nn.Module, target: str | Sequence[str], new: Iterable[str] = ()
) -> list[str]:
    """The paths of the modules that `peft.target` means; see `find_targets`."""
    left_out = [*head_paths(model), *new]
    linear = linear_paths(model, left_out)
    choice = ALIASES.get(target, target) if isinstance(target, str) else None
    if choice == "all-linear":
        found = linear
        _tell_of_matrices(model)
    elif choice == "attention":
        found = _in_attention(model, linear)
    elif choice == "minimal":
        attention = _in_attention(model, linear)
        names = {_last(path) for path in attention}
        known = {name for group in QUERY_AND_VALUE if names.issuperset(group) for name in group}
        found = [path for path in attention if _last(path) in known]
    else:
        return _named(model, [target] if isinstance(target, str) else target, left_out)
    if not found:
        example = f", for example peft.target=[{_last(linear[0])}]" if linear else ""
        raise ConfigError(
            f"peft.target={target} finds nothing in {type(model).__name__}; name the modules to "
            f"adapt{example}, among {_told(linear)}."
        )
    return found


def head_paths(model: nn.Module) -> list[str]:
    """Paths of the modules that turn what a model has understood into an answer.

    Of a model of transformers they are what stands beside its body (`base_model`) and its output
    embeddings; of another, what was said of it when it was built.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return list(vars(model).get(ANSWERING, ()))
    body, output = model.base_model, model.get_output_embeddings()
    beside = (
        [] if body is model else [n for n, child in model.named_children() if child is not body]
    )
    return beside + [path for path, module in model.named_modules() if module is output]


def linear_paths(model: nn.Module, left_out: Iterable[str] = ()) -> list[str]:
    """Paths of the linear layers that can be adapted, those within `left_out` excepted."""
    from torch import nn
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        # torch's attention reads this one's weight past any adapter on it
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and not _is_within(path, left_out)
    ]


def _in_attention(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Those within a module whose class is some kind of attention, by its name."""
    blocks = [
        path
        for path, module in model.named_modules()
        if path and "Attention" in type(module).__name__
    ]
    return [path for path in paths if _is_within(path, blocks)]


def _named(model: nn.Module, names: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """Paths of the layers that the user has named."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    linear = linear_paths(model, left_out)
    modules = {path: module for path, module in model.named_modules() if path}
    can = [
        path
        for path, module in modules.items()
        if path in linear
        or (isinstance(module, (nn.Embedding, _ConvNd)) and not _is_within(path, left_out))
    ]
    found: set[str] = set()
    for name in names:
        meant = [path for path in modules if _is_called(path, name)]
        usable = {path for path in can if path in meant}
        if not usable:
            raise ConfigError(
                f"peft.target names '{name}', {_fault(model, meant, left_out)}; choose among "
                f"{_told(linear)}.{'' if meant else alike(name, {_last(p) for p in linear})}"
            )
        found |= usable
    return [path for path in modules if path in found]


def _fault(model: nn.Module, meant: Sequence[str], left_out: Sequence[str]) -> str:
    """Why nothing can be adapted by a name."""
    kind = type(model).__name__
    if not meant:
        return f"which no module of {kind} is called"
    if _is_within(meant[0], left_out):
        return f"a head of {kind} or new in it, which trains whole or stays as it is"
    module = type(model.get_submodule(meant[0])).__name__
    return f"which in {kind} is a {module}, which can carry no adapter"


def _told(paths: Iterable[str]) -> str:
    """Linear layers by their last names."""
    return f"its linear layers: {', '.join(sorted({_last(path) for path in paths}))}"


def _tell_of_matrices(model: nn.Module) -> None:
    """Says which weights are matrices but no linear layers, as those of a mixture's experts are."""
    from torch import nn

    stacked = {
        f"{_last(path)}.{name}"
        for path, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }
    if stacked:
        log.warning(
            "peft.target=all-linear leaves %s of %s as they are: stacks of matrices, one per "
            "expert, that are no linear layers",
            " and ".join(sorted(stacked)),
            type(model).__name__,
        )


def _shortest_names(wanted: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The shortest ends of paths that no other path has, sorted.

    Raises:
        ConfigError: If a whole path is the end of another one's.
    """
    wanted = set(wanted)
    taken = {end: path for path in paths if path not in wanted for end in _ends(path)}
    names = set()
    for path in wanted:
        free = [end for end in _ends(path) if end not in taken]
        if not free:
            raise ConfigError(
                f"peft.target means {path} and not {taken[path]}, which PEFT cannot tell apart, "
                f"because the path of one is how the other's ends; rename one of them."
            )
        names.add(free[0])
    # what a longer one says again
    return sorted(name for name in names if not any(n in names for n in _ends(name)[:-1]))


def _ends(path: str) -> list[str]:
    """Every end of a path, the shortest first: c, b.c, a.b.c."""
    parts = path.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _is_called(path: str, name: str) -> bool:
    """PEFT's rule."""
    return path == name or path.endswith(f".{name}")


def _is_within(path: str, outer: Iterable[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in outer)
