"""What `peft.target` means for each architecture: `python -m clpeft.models.architectures`.

Seen on models built from their configurations, as small as they go; no weights are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clpeft.models.targets import CHOICES, find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
GROUPED = {**LAYERS, "num_key_value_heads": 2}
GROUPED_8 = {**GROUPED, "head_dim": 8}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 64}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


@dataclass(frozen=True)
class Architecture:
    """A family of models, and how to build its smallest member."""

    name: str
    model_type: str  # of transformers' configuration
    auto: str  # the Auto class that builds it
    settings: dict[str, Any] = field(default_factory=dict)


def _decoder(name: str, model_type: str, **settings: Any) -> Architecture:
    return Architecture(name, model_type, "AutoModelForCausalLM", settings | VOCABULARY)


def _encoder(name: str, model_type: str, **settings: Any) -> Architecture:
    return Architecture(name, model_type, "AutoModelForMaskedLM", settings | VOCABULARY)


def _both(name: str, model_type: str, **settings: Any) -> Architecture:
    return Architecture(name, model_type, "AutoModelForSeq2SeqLM", settings | VOCABULARY)


ARCHITECTURES = (
    _decoder("Llama", "llama", **GROUPED),
    _decoder("Mistral", "mistral", **GROUPED),
    _decoder("Mixtral", "mixtral", **GROUPED, num_local_experts=2),
    _decoder("Qwen2, Qwen2.5", "qwen2", **GROUPED),
    _decoder("Qwen3", "qwen3", **GROUPED_8),
    _decoder("Gemma", "gemma", **GROUPED_8),
    _decoder("Gemma 2", "gemma2", **GROUPED_8),
    _decoder("Gemma 3 (text)", "gemma3_text", **GROUPED_8),
    _decoder("Phi-1, Phi-2", "phi", **LAYERS),
    _decoder("Phi-3", "phi3", **GROUPED),
    _decoder("Falcon", "falcon", **LAYERS),
    _decoder("GPT-2", "gpt2", **GPT),
    _decoder("GPT-J", "gptj", **GPT, rotary_dim=4),
    _decoder("GPT-NeoX, Pythia", "gpt_neox", **LAYERS),
    _decoder("BLOOM", "bloom", hidden_size=16, n_layer=1, n_head=4),
    _decoder("OPT", "opt", **LAYERS, ffn_dim=32, word_embed_proj_dim=8),
    _decoder("MPT", "mpt", d_model=16, n_layers=1, n_heads=4, max_seq_len=64),
    _both("T5", "t5", **T5),
    _both("T5 v1.1, Flan-T5", "t5", **T5, feed_forward_proj="gated-gelu"),
    _both("BART", "bart", **BART),
    _encoder("BERT", "bert", **LAYERS),
    _encoder("RoBERTa", "roberta", **LAYERS),
    _encoder("ELECTRA", "electra", **LAYERS, embedding_size=16),
    _encoder("DistilBERT", "distilbert", dim=16, n_layers=1, n_heads=4, hidden_dim=32),
    _encoder("DeBERTa", "deberta", **LAYERS, **DISENTANGLED),
    _encoder("DeBERTa v2, v3", "deberta-v2", **LAYERS, **DISENTANGLED, share_att_key=True),
    Architecture(
        "ViT",
        "vit",
        "AutoModelForImageClassification",
        {**LAYERS, "image_size": 8, "patch_size": 4},
    ),
)


def build(architecture: Architecture, **changes: Any) -> PreTrainedModel:
    """The smallest model of an architecture, with random weights.

    Args:
        architecture: Which.
        changes: To its configuration.
    """
    import transformers

    settings = architecture.settings | changes
    config = transformers.AutoConfig.for_model(architecture.model_type, **settings)
    return getattr(transformers, architecture.auto).from_config(config)


def target_table() -> str:
    """A Markdown table of architectures by choices of `peft.target`, as the models have them."""
    rows = [("architecture", *(f"`{choice}`" for choice in CHOICES))]
    rows += [tuple("---" for _ in rows[0])]
    for architecture in ARCHITECTURES:
        model = build(architecture)
        cells = (" ".join(f"`{n}`" for n in find_targets(model, choice)) for choice in CHOICES)
        rows.append((architecture.name, *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(target_table())
