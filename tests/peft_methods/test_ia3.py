"""IA³: which layers it scales, how many numbers that takes, and what the scales do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from clpeft.config import ConfigError
from clpeft.models.load import count_parameters
from clpeft.peft_methods.base import apply_peft
from clpeft.peft_methods.ia3 import IA3Settings, find_scaled
from tests.peft_methods.models import (
    NEW_IN_BERT,
    bert,
    llama,
    llama_classifier,
    logits,
    moved,
    t5,
    training,
)

LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
SPECIAL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**LAYERS, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 64}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
OPT = {**LAYERS, "ffn_dim": 32, "word_embed_proj_dim": 16}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}

AUTO = IA3Settings(method="ia3", target="auto")
# architecture → how its paths end of what is scaled: keys and values, feed-forward layers
SCALED: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "llama": (GROUPED, {"self_attn.k_proj", "self_attn.v_proj"}, "mlp.down_proj"),
    "qwen3": (
        {**GROUPED, "head_dim": 4},
        {"self_attn.k_proj", "self_attn.v_proj"},
        "mlp.down_proj",
    ),
    "opt": (OPT, {"self_attn.k_proj", "self_attn.v_proj"}, "fc2"),
    "phi": (GROUPED, {"self_attn.k_proj", "self_attn.v_proj"}, "mlp.fc2"),
    "phi3": (GROUPED, {"self_attn.qkv_proj"}, "mlp.down_proj"),
    "gptj": ({**GPT2, "rotary_dim": 4}, {"attn.k_proj", "attn.v_proj"}, "mlp.fc_out"),
    "gpt2": (GPT2, {"attn.c_attn"}, "mlp.c_proj"),
    "gpt_neox": (LAYERS, {"attention.query_key_value"}, "mlp.dense_4h_to_h"),
    "bloom": (
        {"hidden_size": 16, "n_layer": 1, "n_head": 4},
        {"self_attention.query_key_value"},
        "mlp.dense_4h_to_h",
    ),
    "falcon": (LAYERS, {"self_attention.query_key_value"}, "mlp.dense_4h_to_h"),
    "mpt": (
        {"d_model": 16, "n_layers": 1, "n_heads": 4, "max_seq_len": 64},
        {"attn.Wqkv"},
        "ffn.down_proj",
    ),
    "bert": (LAYERS, {"attention.self.key", "attention.self.value"}, "0.output.dense"),
    "roberta": (LAYERS, {"attention.self.key", "attention.self.value"}, "0.output.dense"),
    "deberta-v2": (
        LAYERS,
        {"attention.self.key_proj", "attention.self.value_proj"},
        "0.output.dense",
    ),
    "distilbert": (
        {"dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 32},
        {"attention.k_lin", "attention.v_lin"},
        "ffn.lin2",
    ),
    "t5": (
        T5,
        {f"{kind}Attention.{name}" for kind in ("Self", "EncDec") for name in "kv"},
        "DenseReluDense.wo",
    ),
    "bart": (
        BART,
        {f"{kind}.{name}_proj" for kind in ("self_attn", "encoder_attn") for name in "kv"},
        "fc2",
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_what_is_scaled(kind: str) -> None:
    sizes, keys_and_values, forward = SCALED[kind]
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **SPECIAL))
    paths = [path for path, _ in model.named_modules()]
    found = [[p for p in paths if re.fullmatch(pattern, p)] for pattern in find_scaled(model)]

    ends = {path for path in found[0] if not any(path.endswith(f".{e}") for e in keys_and_values)}
    assert ends == set()
    assert all(any(path.endswith(f".{e}") for path in found[0]) for e in keys_and_values)
    assert found[1]
    assert all(path.endswith(f".{forward}") for path in found[1])
    # one for each block of layers, where T5 and BART have two
    assert len(found[1]) == (2 if kind in ("t5", "bart") else 1)


def test_sizes() -> None:
    model = apply_peft(llama(), AUTO, "causal_lm", [])

    # per layer: 8 keys and 8 values (two of four heads), and 32 inputs of the feed-forward layer
    assert count_parameters(model)[1] == 2 * (8 + 8 + 32)
    assert all("ia3_l" in name for name in training(model))


def test_head_and_what_else_is_new_train_with_it() -> None:
    model = apply_peft(bert(), AUTO, "sequence_classification", NEW_IN_BERT)
    whole = {n.split(".modules_to_save")[0] for n in training(model) if "ia3" not in n}
    scaled = {n.split(".ia3_l")[0].removeprefix("base_model.model.") for n in training(model)}

    assert whole == {f"base_model.model.{path}" for path in NEW_IN_BERT}
    # the dense layer at the end of the attention block, which is called alike, is not scaled
    layer = "bert.encoder.layer.0"
    ends = ("attention.self.key", "attention.self.value", "output.dense")
    assert {path for path in scaled if path.startswith(layer)} == {f"{layer}.{e}" for e in ends}
    model = apply_peft(llama_classifier(), AUTO, "sequence_classification", ["score"])
    assert any("score.modules_to_save" in name for name in training(model))


@pytest.mark.parametrize(
    ("make", "task_type"),
    [(llama, "causal_lm"), (t5, "seq2seq_lm"), (bert, "sequence_classification")],
)
def test_function(make: Any, task_type: str) -> None:
    """Scaled outputs are scaled rows of a weight, scaled inputs its columns."""
    base: PreTrainedModel = make()
    plain: PreTrainedModel = make()
    plain.load_state_dict(base.state_dict())
    before = logits(plain)
    model = apply_peft(base, AUTO, task_type, [])
    moved(model)
    for name, scale in model.named_parameters():
        if "ia3_l" not in name:
            continue
        layer = plain.get_submodule(name.split(".ia3_l")[0].removeprefix("base_model.model."))
        assert isinstance(layer, nn.Linear)
        layer.weight.data *= scale.detach()  # [d_out, 1] or [1, d_in]
        if layer.bias is not None and scale.shape[1] == 1:
            layer.bias.data *= scale.detach()[:, 0]
    if task_type == "sequence_classification":
        head: Any = model.get_submodule("base_model.model.classifier.modules_to_save.default")
        plain.classifier.load_state_dict(head.state_dict())

    # float32, in another order of multiplications
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_it_starts_as_nothing() -> None:
    base = llama()
    before = logits(base)

    assert torch.equal(logits(apply_peft(base, AUTO, "causal_lm", [])), before)


def test_modules_that_are_named() -> None:
    chosen = IA3Settings(
        method="ia3", target=["q_proj", "up_proj", "down_proj"], feedforward=["down_proj"]
    )
    chosen.check()
    model = apply_peft(llama(), chosen, "causal_lm", [])

    # 16 queries, 32 outputs of the one, 32 inputs of the other
    assert count_parameters(model)[1] == 2 * (16 + 32 + 32)
    shapes = {n.split(".")[-3]: tuple(p.shape) for n, p in model.named_parameters() if "ia3" in n}
    assert shapes == {"q_proj": (16, 1), "up_proj": (32, 1), "down_proj": (1, 32)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": "all-linear"}, "set it to auto or a list of module names"),
        ({"target": [3]}, "set it to auto or a list of module names"),
        ({"target": ["k_proj"]}, r"peft.feedforward=None must name those of peft.target="),
        (
            {"target": ["k_proj", "wo"], "feedforward": ["wi"]},
            r"peft.feedforward=\['wi'\] must name those of",
        ),
        ({"target": "auto", "feedforward": ["wo"]}, "with peft.target=auto both are found"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        IA3Settings(method="ia3", **changes).check()


class Odd(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("names", "lacking"),
    [(("mixer", "wo"), "key and value projections"), (("k", "v", "mixer"), "feed-forward layers")],
)
def test_model_that_is_not_known(names: tuple[str, ...], lacking: str) -> None:
    model: Any = Odd(*names)
    with pytest.raises(ConfigError, match=f"peft.target=auto knows no {lacking} of Odd"):
        find_scaled(model)
