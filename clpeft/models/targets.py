"""Which linear layers of an architecture an adapter goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clpeft.config import ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn

# Query and value projections, as LoRA's paper adapts (Hu et al. 2021, table 5), by the names that
# architectures give them; fused projections where there is nothing else. First match wins.
QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Mixtral, Qwen, Gemma, Phi, OPT, GPT-J, BART
    ("query", "value"),  # BERT, RoBERTa, ViT
    ("query_proj", "value_proj"),  # DeBERTa-v2
    ("q_lin", "v_lin"),  # DistilBERT
    ("q", "v"),  # T5
    ("query_key_value",),  # GPT-NeoX/Pythia, BLOOM, Falcon
    ("qkv_proj",),  # Phi-3
    ("c_attn",),  # GPT-2
    ("Wqkv",),  # MPT
    ("in_proj",),  # DeBERTa
)


def linear_modules(model: nn.Module) -> dict[str, list[str]]:
    """Paths of a model's linear layers by their last name, its output heads left out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    heads = {"lm_head", "embed_out", "classifier", "score", "qa_outputs"}
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not heads & set(path.split(".")):
            found.setdefault(path.rsplit(".", 1)[-1], []).append(path)
    return found


def find_targets(model: nn.Module, target: str | list[str]) -> list[str]:
    """Resolves `peft.target` to the names of modules that the model has.

    Args:
        model: The base model.
        target: `auto`, `all-linear`, or names (a module matches if its path ends in one).

    Returns:
        Names to match, each of which the model has.

    Raises:
        ConfigError: If nothing matches; it names the linear modules that exist.
    """
    present = linear_modules(model)
    if target == "all-linear":
        return sorted(present)
    if target == "auto":
        for pair in QUERY_AND_VALUE:
            if all(name in present for name in pair):
                return list(pair)
        raise ConfigError(
            f"peft.target=auto knows no attention projection of {type(model).__name__}; name the "
            f"modules to adapt, for example peft.target=[{next(iter(present), '')}], among its "
            f"linear layers: {', '.join(sorted(present))}."
        )
    names = [target] if isinstance(target, str) else list(target)
    paths = [path for path, _ in model.named_modules()]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise ConfigError(
                f"peft.target names '{name}', which no module of {type(model).__name__} is called."
                f"{nearest(name, present)}"
            )
    return names
