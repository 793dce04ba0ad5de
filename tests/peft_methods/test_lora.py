"""LoRA on toy models: what trains, how much, and that it starts as nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clpeft.config import ConfigError
from clpeft.models.load import count_parameters
from clpeft.peft_methods.base import apply_peft
from clpeft.peft_methods.full import FullConfig
from clpeft.peft_methods.lora import LoraSettings
from tests.peft_methods.models import (
    NEW_IN_BERT,
    bart,
    bert,
    gpt2,
    llama,
    llama_classifier,
    logits,
    moved,
    t5,
    training,
)


def settings(**changes: Any) -> LoraSettings:
    values = {
        "method": "lora",
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "target": "auto",
        "bias": "none",
        "init_lora_weights": "default",
    }
    return LoraSettings(**(values | changes))


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
    model = apply_peft(bert(), settings(), "sequence_classification", NEW_IN_BERT)
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
    everywhere = settings(target="all-linear")
    model = apply_peft(bert(), everywhere, "sequence_classification", NEW_IN_BERT)

    adapted = {name for name in training(model) if "lora_A" in name}
    # six linear layers in each of two blocks
    assert len(adapted) == 12
    assert not any("pooler" in name or "classifier" in name for name in adapted)
    # as it is saved: names that do not reach them
    names = {"intermediate.dense", "key", "output.dense", "query", "value"}
    assert model.peft_config["default"].target_modules == names


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


def test_full_trains_everything() -> None:
    base = llama()
    base.requires_grad_(False)
    model = apply_peft(base, FullConfig(method="full"), "causal_lm", [])

    assert model is base
    total, trainable = count_parameters(model)
    assert trainable == total > 0


def test_gpt2_says_no_word_about_its_transposed_layers(recwarn: pytest.WarningsRecorder) -> None:
    model = apply_peft(gpt2(), settings(), "causal_lm", [])
    layer: Any = model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")

    assert layer.fan_in_fan_out
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]


def test_the_head_of_a_language_models_classifier_trains() -> None:
    model = apply_peft(llama_classifier(), settings(), "sequence_classification", ["score"])
    whole = {name for name in training(model) if "lora" not in name}

    assert whole == {"base_model.model.score.modules_to_save.default.weight"}


def test_ranks_and_alphas_by_module() -> None:
    patterns = {
        "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"v_proj": 1.0},
    }
    base = llama()
    total, _ = count_parameters(base)
    model = apply_peft(base, settings(**patterns), "causal_lm", [])

    # q: 16 → 16 of rank 4 in layer 0 and 6 in layer 1; v: 16 → 8 of rank 2 in both
    expected = (4 + 6) * (16 + 16) + 2 * 2 * (16 + 8)
    assert count_parameters(model) == (total + expected, expected)
    layers: Any = model.get_submodule("base_model.model.model.layers")
    scalings = [
        [getattr(layer.self_attn, name).scaling["default"] for name in ("q_proj", "v_proj")]
        for layer in layers
    ]
    assert scalings == [[8 / 4, 1 / 2], [8 / 6, 1 / 2]]


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_match_nothing(pattern: str) -> None:
    with pytest.raises(ConfigError, match=rf"peft\.{pattern} names 'v_prj', which no") as e:
        apply_peft(llama(), settings(**{pattern: {"v_prj": 2}}), "causal_lm", [])
    assert "Did you mean 'v_proj'" in str(e.value)
    # a module that exists and is not adapted
    with pytest.raises(ConfigError, match=f"{pattern} names 'o_proj'"):
        apply_peft(llama(), settings(**{pattern: {"o_proj": 2}}), "causal_lm", [])


def test_pattern_of_a_layer_that_is_left_out() -> None:
    changes = {"layers_to_transform": [0], "rank_pattern": {"layers.1.self_attn.q_proj": 4}}
    with pytest.raises(ConfigError, match=r"peft\.rank_pattern names 'layers\.1\.self_attn\.q_p"):
        apply_peft(llama(), settings(**changes), "causal_lm", [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank_pattern": {"v_proj": 1.5}}, "ends of modules' paths to whole numbers above 0"),
        ({"rank_pattern": {"v_proj": 0}}, "to whole numbers above 0"),
        ({"rank_pattern": {"v_proj": True}}, "to whole numbers above 0"),
        ({"alpha_pattern": {"v_proj": -1.0}}, "to numbers above 0"),
        ({"alpha_pattern": ["v_proj"]}, "to numbers above 0"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs even ranks, and there is one of 3"),
        (
            {"init_lora_weights": "orthogonal", "rank_pattern": {"v_proj": 5}},
            "needs even ranks, and there is one of 5",
        ),
    ],
)
def test_impossible_settings(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings(**changes).check()
    settings(alpha_pattern={"v_proj": 3}).check()


def test_some_layers() -> None:
    model = apply_peft(llama(), settings(layers_to_transform=[1]), "causal_lm", [])

    assert {name.split(".")[4] for name in training(model)} == {"1"}


def test_layers_are_those_of_the_stack() -> None:
    """In T5 a path has two numbers: of the block, which is meant, and of what lies in it."""
    model = apply_peft(t5(), settings(layers_to_transform=[1]), "seq2seq_lm", [])

    # encoder.block.1.layer.0, decoder.block.1.layer.0 and decoder.block.1.layer.1
    paths = {tuple(name.split(".")[2:7]) for name in training(model)}
    assert paths == {
        ("encoder", "block", "1", "layer", "0"),
        ("decoder", "block", "1", "layer", "0"),
        ("decoder", "block", "1", "layer", "1"),
    }


@pytest.mark.parametrize("layer", [2, -1])
def test_layers_that_do_not_exist(layer: int) -> None:
    with pytest.raises(ConfigError, match=f"names layer {layer}, but LlamaForCausalLM has 2 lay"):
        apply_peft(llama(), settings(layers_to_transform=[0, layer]), "causal_lm", [])


def test_layer_in_which_nothing_is_adapted() -> None:
    changes = {"layers_to_transform": [0, 1], "target": ["layers.0.self_attn.q_proj"]}
    with pytest.raises(ConfigError, match=r"peft\.layers_to_transform names layer 1 of LlamaForCa"):
        apply_peft(llama(), settings(**changes), "causal_lm", [])


def test_biases() -> None:
    """BERT: each of two layers has six linear layers and two norms, before them one more norm."""
    biases = {}
    for mode in ("none", "lora_only", "all"):
        model = apply_peft(bert(), settings(bias=mode), "sequence_classification", NEW_IN_BERT)
        names = {n for n in training(model) if n.endswith("bias") and "modules_to_save" not in n}
        biases[mode] = names

    assert biases["none"] == set()
    # query's and value's
    assert {name.split(".")[-3] for name in biases["lora_only"]} == {"query", "value"}
    assert len(biases["lora_only"]) == 2 * 2
    assert biases["lora_only"] < biases["all"]
    assert len(biases["all"]) == 2 * (6 + 2) + 1


def test_module_to_save_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="modules_to_save names 'embed_token', wh") as e:
        apply_peft(llama(), settings(modules_to_save=["embed_token"]), "causal_lm", [])
    assert "Did you mean 'embed_tokens'" in str(e.value)


def test_function() -> None:
    """The logits of the base with s·B·A added to its weights."""
    model = apply_peft(llama(), settings(), "causal_lm", [])
    moved(model)
    plain = llama()
    plain.load_state_dict(
        {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for name, value in model.state_dict().items()
            if "lora" not in name
        }
    )
    for number, layer in enumerate(plain.model.layers):
        for name in ("q_proj", "v_proj"):
            path = f"base_model.model.model.layers.{number}.self_attn.{name}"
            a = model.get_parameter(f"{path}.lora_A.default.weight").detach()
            b = model.get_parameter(f"{path}.lora_B.default.weight").detach()
            getattr(layer.self_attn, name).weight.data += 8 / 4 * b @ a

    # float32, in another order of multiplications
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)


def test_dora() -> None:
    """W' = m·(W + s·B·A)/‖W + s·B·A‖, the norms being those of rows; m starts as W's."""
    model = apply_peft(llama(), settings(use_dora=True, target=["q_proj"]), "causal_lm", [])
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    weight = layer.base_layer.weight.detach()
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), weight.norm(dim=1))

    moved(model)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    changed = weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = x @ (magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(layer(x), expected)
    # per layer: A 4 · 16, B 16 · 4 and a magnitude for each of 16 rows
    assert count_parameters(model)[1] == 2 * (64 + 64 + 16)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_first_weights(kind: str) -> None:
    base = llama()
    before = logits(base)
    torch.manual_seed(0)
    every = settings(init_lora_weights=kind, r=16, target="all-linear")
    model = apply_peft(base, every, "causal_lm", [])

    left = [m.detach() for n, m in model.named_parameters() if "lora_B" in n]
    right = [m.detach() for n, m in model.named_parameters() if "lora_A" in n]
    products = [b @ a for b, a in zip(left, right, strict=True)]
    # B·A = 0: exactly for B = 0, up to float32 for rows that are orthogonal
    tolerance = 0 if kind == "gaussian" else 1e-5
    assert max(float(product.abs().max()) for product in products) <= tolerance
    torch.testing.assert_close(logits(model), before, rtol=0, atol=10 * tolerance)
    if kind == "gaussian":
        assert all(float(b.abs().max()) == 0 for b in left)
        entries = torch.cat([a.flatten() for a in right])
        # std 1/r; of 4 000 numbers it is known to 1/√8000
        assert float(entries.std()) == pytest.approx(1 / 16, rel=0.05)
        assert entries.numel() > 4000
    else:
        assert all(float(b.abs().max()) > 0 for b in left)
