"""Where the two sub-layers of a transformer's layer end: self-attention and the feed-forward."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clpeft.config import ConfigError
from clpeft.models.targets import head_paths, linear_paths

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Sublayers:
    """The names at which an architecture's sub-layers end, regular expressions of a path's end.

    Attributes:
        attention: The output projection of self-attention.
        feed_forward: That of the feed-forward.
        norm: Of the sum behind the feed-forward, in a model that normalises after it adds.
        model_types: Whose these names are; any model's that has them, if not given.
    """

    attention: str
    feed_forward: str
    norm: str | None = None
    model_types: frozenset[str] | None = None


# the first whose names a model has is taken
SUBLAYERS = (
    # Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3
    Sublayers(r"self_attn\.o_proj", r"mlp\.down_proj"),
    Sublayers(r"self_attn\.dense", r"mlp\.fc2"),  # Phi
    Sublayers(r"self_attention\.dense", r"mlp\.dense_4h_to_h"),  # Falcon, BLOOM
    Sublayers(r"attention\.dense", r"mlp\.dense_4h_to_h"),  # GPT-NeoX
    Sublayers(r"attn\.c_proj", r"mlp\.c_proj"),  # GPT-2
    Sublayers(r"attn\.out_proj", r"mlp\.fc_out"),  # GPT-J
    Sublayers(r"attn\.out_proj", r"ffn\.down_proj"),  # MPT
    Sublayers(r"SelfAttention\.o", r"DenseReluDense\.wo"),  # T5
    # others of these names normalise before they add: OPT, mBART
    Sublayers(r"self_attn\.out_proj", r"fc2", r"final_layer_norm", frozenset({"bart"})),
    Sublayers(r"self_attn\.out_proj", r"fc2"),
    # BERT, RoBERTa, DeBERTa, ELECTRA
    Sublayers(
        r"attention\.output\.dense",
        r"(?<!attention\.)output\.dense",
        r"(?<!attention\.)output\.LayerNorm",
    ),
    Sublayers(r"attention\.out_lin", r"ffn\.lin2", r"output_layer_norm"),  # DistilBERT
    Sublayers(r"attention\.o_proj", r"mlp\.fc2"),  # ViT
)


def find_sublayers(model: nn.Module, placement: str) -> list[str]:
    """The paths of the modules behind which bottleneck adapters go.

    Args:
        model: The base model.
        placement: `houlsby`: behind self-attention and behind the feed-forward, each before its
            output is added to what it read. `pfeiffer`: behind the feed-forward alone; where the
            sum is then normalised, behind that norm, which is applied once more.

    Raises:
        ConfigError: If the model's architecture is not known; it names the linear layers that
            there are.

    Source: Houlsby et al. 2019, figure 2; Pfeiffer et al. 2021, as their library AdapterHub has it
        (original_ln_before and original_ln_after).
    """
    from transformers import PreTrainedModel

    model_type = model.config.model_type if isinstance(model, PreTrainedModel) else None
    linear = linear_paths(model, head_paths(model))
    for names in SUBLAYERS:
        if names.model_types is not None and model_type not in names.model_types:
            continue
        attention, feed_forward = (
            _ending_in(name, linear) for name in (names.attention, names.feed_forward)
        )
        if attention and feed_forward:
            if placement == "houlsby":
                return attention + feed_forward
            paths = [path for path, _ in model.named_modules()]
            return (_ending_in(names.norm, paths) if names.norm else []) or feed_forward
    present = sorted({path.rpartition(".")[2] for path in linear})
    raise ConfigError(
        f"peft.target=auto does not know where attention and the feed-forward end in "
        f"{type(model).__name__}; name their output projections in peft.target, among its linear "
        f"layers: {', '.join(present)}."
    )


def _ending_in(name: str, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if re.fullmatch(rf"(?:.*\.)?{name}", path)]
