"""Models of many architectures, as small as they go and with weights that all matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

VOCABULARY = 40
POSITIONS = 64  # of those that learn a vector for each
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
}
GROUPED = {**LAYERS, "num_key_value_heads": 2}  # two queries share a key and a value
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": LAYERS,
    "roberta": {**LAYERS, "max_position_embeddings": POSITIONS + 1},  # its positions begin at 1
    "electra": {**LAYERS, "embedding_size": 8},  # projected up to the layers' size
    "deberta-v2": LAYERS,
    "distilbert": {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 32,
        "max_position_embeddings": POSITIONS,
    },
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},  # heads wider than their share of the layers' size
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neox": LAYERS,
    "phi": LAYERS,
    "opt": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 32,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": 8,  # projected up, too
    },
    # layers that look back over a few tokens only
    "mistral": {**GROUPED, "sliding_window": 6},
    "gemma2": {**GROUPED, "head_dim": 4, "sliding_window": 6},
    # distances told by ALiBi: counted with padding, or without
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS},
    # one key and value for all queries
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {
        "d_model": 16,
        "d_kv": 8,  # heads wider than their share, as in the largest T5
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": POSITIONS,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    },
}
ARCHITECTURES = {**ENCODERS, **DECODERS, **ENCODER_DECODERS}
AUTO = {
    "sequence_classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
}


def build(kind: str, task_type: str, **changes: Any) -> PreTrainedModel:
    """A model without dropout's effect; the same one each time.

    Args:
        kind: One of `ARCHITECTURES`.
        task_type: sequence_classification (three labels), causal_lm or seq2seq_lm.
        changes: Of its configuration.
    """
    labels = {"num_labels": 3} if task_type == "sequence_classification" else {}
    config = AutoConfig.for_model(kind, **{**ARCHITECTURES[kind], **SPECIAL, **labels, **changes})
    model = AUTO[task_type].from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def heads_of(model: PreTrainedModel) -> list[str]:
    """The paths of a classifier's modules that a language model has no weights for."""
    heads = ("classifier", "pre_classifier", "score", "classification_head", "pooler")
    children = [path for path, _ in model.named_modules() if path.split(".")[-1] in heads]
    return [path for path in children if "pooler.dense" not in path]
