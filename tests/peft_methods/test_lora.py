"""LoRA on toy models: what trains, how much, and that it starts as nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from clpeft.config import ConfigError
from clpeft.models.load import count_parameters
from clpeft.peft_methods.base import apply_peft
from clpeft.peft_methods.full import FullConfig
from clpeft.peft_methods.lora import LoraSettings

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


def settings(**changes: Any) -> LoraSettings:
    values = {
        "method": "lora",
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "target": "auto",
        "bias": "none",
    }
    return LoraSettings(**(values | changes))


def llama() -> PreTrainedModel:
    config = AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config)


def bert() -> PreTrainedModel:
    config = AutoConfig.for_model("bert", **SIZES, num_labels=3)
    return AutoModelForSequenceClassification.from_config(config)


def bart() -> PreTrainedModel:
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 16))
    }
    special = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 2, "num_labels": 3}
    config = AutoConfig.for_model("bart", d_model=16, **sizes, **special)
    return AutoModelForSequenceClassification.from_config(config)


def training(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_sizes() -> None:
    base = llama()
    total, _ = count_parameters(base)
    model = apply_peft(base, settings(), "causal_lm", [])

    # per layer: query 16 → 16 and, with two of four key-value heads, value 16 → 8
    expected = 2 * (4 * (16 + 16) + 4 * (16 + 8))
    assert count_parameters(model) == (total + expected, expected)


def test_only_the_adapter_trains() -> None:
    model = apply_peft(llama(), settings(), "causal_lm", [])

    assert {name.split(".")[-3] for name in training(model)} == {"lora_A", "lora_B"}
    assert len(training(model)) == 2 * 2 * 2


def test_head_and_what_else_is_new_train_with_it() -> None:
    model = apply_peft(
        bert(), settings(), "sequence_classification", ["bert.pooler.dense", "classifier"]
    )
    whole = {name for name in training(model) if "lora" not in name}

    assert whole == {
        f"base_model.model.{module}.modules_to_save.default.{kind}"
        for module in ("bert.pooler.dense", "classifier")
        for kind in ("weight", "bias")
    }


def test_a_head_of_another_name_trains_too() -> None:
    # BART's is neither `classifier` nor `score`, which is all that PEFT knows
    new = ["classification_head.dense", "classification_head.out_proj"]
    model = apply_peft(bart(), settings(), "sequence_classification", new)

    assert sum("classification_head" in name for name in training(model)) == 4


def test_new_layers_get_no_adapter_of_their_own() -> None:
    new = ["bert.pooler.dense", "classifier"]
    model = apply_peft(bert(), settings(target="all-linear"), "sequence_classification", new)

    adapted = {name for name in training(model) if "lora_A" in name}
    # six linear layers in each of two blocks
    assert len(adapted) == 12
    assert not any("pooler" in name or "classifier" in name for name in adapted)


def test_modules_that_the_user_names_train_whole() -> None:
    model = apply_peft(llama(), settings(modules_to_save=["embed_tokens"]), "causal_lm", [])

    assert any("embed_tokens.modules_to_save" in name for name in training(model))


def test_it_starts_as_nothing() -> None:
    base, ids = llama().eval(), torch.tensor([[5, 6, 7]])
    before = base(input_ids=ids).logits.detach()
    model = apply_peft(base, settings(), "causal_lm", []).eval()

    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)])
def test_scaling(rslora: bool, scaling: float) -> None:
    model = apply_peft(llama(), settings(use_rslora=rslora), "causal_lm", [])
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")

    # α/r, or α/√r
    assert layer.scaling["default"] == scaling


def test_model_that_carries_the_adapter_is_not_wrapped_again() -> None:
    model = apply_peft(llama(), settings(), "causal_lm", [])
    again = apply_peft(model, settings(r=2), "causal_lm", [])

    assert again is model
    assert sum(isinstance(module, PeftModel) for module in again.modules()) == 1


def test_adapter_of_another_kind_is_refused() -> None:
    model = apply_peft(llama(), settings(), "causal_lm", [])

    with pytest.raises(
        ConfigError, match=r"peft=full was asked for, .* carries a lora adapter"
    ) as e:
        apply_peft(model, FullConfig(method="full"), "causal_lm", [])
    assert "choose peft=lora" in str(e.value)


def test_full_trains_everything() -> None:
    base = llama()
    base.requires_grad_(False)
    model = apply_peft(base, FullConfig(method="full"), "causal_lm", [])

    assert model is base
    total, trainable = count_parameters(model)
    assert trainable == total > 0


def test_gpt2_says_no_word_about_its_transposed_layers(recwarn: pytest.WarningsRecorder) -> None:
    config = AutoConfig.for_model(
        "gpt2", n_embd=16, n_layer=1, n_head=4, vocab_size=40, bos_token_id=1, eos_token_id=2
    )
    model = apply_peft(AutoModelForCausalLM.from_config(config), settings(), "causal_lm", [])
    layer: Any = model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")

    assert layer.fan_in_fan_out
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
