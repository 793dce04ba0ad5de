"""Models small enough to count their weights by hand, without weights of anybody's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.tensor([[5, 6, 7], [9, 8, 4]])


def llama() -> PreTrainedModel:
    """Two of four heads are key-value heads, so that keys and values are 16 → 8."""
    config = AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config)


def llama_classifier() -> PreTrainedModel:
    config = AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2, num_labels=3)
    return AutoModelForSequenceClassification.from_config(config)


def bert() -> PreTrainedModel:
    config = AutoConfig.for_model("bert", **SIZES, num_labels=3)
    return AutoModelForSequenceClassification.from_config(config)


NEW_IN_BERT = ["bert.pooler.dense", "classifier"]  # where it comes from a language model


def bart() -> PreTrainedModel:
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 16))
    }
    special = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 2, "num_labels": 3}
    config = AutoConfig.for_model("bart", d_model=16, **sizes, **special)
    return AutoModelForSequenceClassification.from_config(config)


def t5() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "t5",
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        vocab_size=40,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return AutoModelForSeq2SeqLM.from_config(config)


def gpt2() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gpt2", n_embd=16, n_layer=1, n_head=4, vocab_size=40, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLM.from_config(config)


def training(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that train."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What a model makes of two short texts."""
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=IDS, **more).logits


def moved(model: torch.nn.Module, size: float = 0.3) -> None:
    """Moves all that trains off its start by numbers that are always the same."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
