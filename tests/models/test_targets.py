"""The layers an adapter goes on, architecture by architecture, on toy sizes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from clpeft.config import ConfigError
from clpeft.models.targets import find_targets, linear_modules

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
DECODERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (GROUPED, ["q_proj", "v_proj"]),
    "mistral": (GROUPED, ["q_proj", "v_proj"]),
    "qwen3": ({**GROUPED, "head_dim": 4}, ["q_proj", "v_proj"]),
    "gemma": ({**GROUPED, "head_dim": 4}, ["q_proj", "v_proj"]),
    "opt": (OPT, ["q_proj", "v_proj"]),
    "gptj": ({**GPT2, "rotary_dim": 4}, ["q_proj", "v_proj"]),
    "phi3": (GROUPED, ["qkv_proj"]),
    "gpt2": (GPT2, ["c_attn"]),
    "gpt_neox": (LAYERS, ["query_key_value"]),
    "bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 4}, ["query_key_value"]),
    "falcon": (LAYERS, ["query_key_value"]),
    "mpt": ({"d_model": 16, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}, ["Wqkv"]),
}
ENCODERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bert": (LAYERS, ["query", "value"]),
    "roberta": (LAYERS, ["query", "value"]),
    "electra": ({**LAYERS, "embedding_size": 16}, ["query", "value"]),
    "deberta-v2": (LAYERS, ["query_proj", "value_proj"]),
    "distilbert": (
        {"dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 32},
        ["q_lin", "v_lin"],
    ),
}
BOTH: dict[str, tuple[dict[str, Any], list[str]]] = {
    "t5": (T5, ["q", "v"]),
    "bart": (BART, ["q_proj", "v_proj"]),
}
CASES = [
    *[(kind, AutoModelForCausalLM, *case) for kind, case in DECODERS.items()],
    *[(kind, AutoModelForMaskedLM, *case) for kind, case in ENCODERS.items()],
    *[(kind, AutoModelForSeq2SeqLM, *case) for kind, case in BOTH.items()],
]


def toy(kind: str, auto: Any, settings: dict[str, Any]) -> nn.Module:
    return auto.from_config(AutoConfig.for_model(kind, **settings, **SPECIAL))


@pytest.mark.parametrize(("kind", "auto", "settings", "expected"), CASES)
def test_query_and_value_are_found(
    kind: str, auto: Any, settings: dict[str, Any], expected: list[str]
) -> None:
    model = toy(kind, auto, settings)

    assert find_targets(model, "auto") == expected
    # and they are linear layers of an attention block
    for name in expected:
        assert all("att" in path.lower() for path in linear_modules(model)[name])


def test_all_linear_layers_but_the_head() -> None:
    model = toy("llama", AutoModelForCausalLM, GROUPED)

    attention, forward = ["k_proj", "o_proj", "q_proj", "v_proj"], ["down", "gate", "up"]
    expected = sorted([*attention, *(f"{name}_proj" for name in forward)])
    assert find_targets(model, "all-linear") == expected


def test_the_head_of_a_classifier_is_no_target() -> None:
    model = toy("roberta", AutoModelForSequenceClassification, LAYERS)

    assert not [
        path for paths in linear_modules(model).values() for path in paths if "classifier" in path
    ]


def test_layers_that_are_named() -> None:
    model = toy("llama", AutoModelForCausalLM, GROUPED)

    assert find_targets(model, ["k_proj", "up_proj"]) == ["k_proj", "up_proj"]
    assert find_targets(model, "o_proj") == ["o_proj"]
    path = "model.layers.0.self_attn.q_proj"
    assert find_targets(model, [path]) == [path]


def test_names_that_match_nothing() -> None:
    model = toy("llama", AutoModelForCausalLM, GROUPED)

    with pytest.raises(
        ConfigError, match=r"peft\.target names 'q_prj', which no module of Llama"
    ) as e:
        find_targets(model, ["q_prj", "v_proj"])
    assert "Did you mean 'q_proj'" in str(e.value)
    with pytest.raises(ConfigError, match=r"peft\.target names 'zzz'") as e:
        find_targets(model, ["zzz"])
    # the layers that there are, once
    assert str(e.value).count("down_proj") == 1
    assert "gate_proj" in str(e.value)


def test_part_of_a_name_is_no_match() -> None:
    model = toy("llama", AutoModelForCausalLM, GROUPED)

    with pytest.raises(ConfigError, match="'proj'"):
        find_targets(model, ["proj"])


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 9)


def test_unknown_architecture_lists_its_layers() -> None:
    with pytest.raises(ConfigError) as error:
        find_targets(Unknown(), "auto")

    assert "peft.target=auto knows no attention projection of Unknown" in str(error.value)
    assert "peft.target=[mixer]" in str(error.value)
    assert "lm_head" not in str(error.value)
    assert find_targets(Unknown(), "all-linear") == ["mixer"]
