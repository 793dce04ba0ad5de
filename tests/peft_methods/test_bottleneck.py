"""Bottleneck adapters: how many numbers, which function, and a life as any other PEFT method's."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

import clpeft.tuners
from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.models.load import count_parameters
from clpeft.peft_methods.base import apply_peft
from clpeft.peft_methods.bottleneck import BottleneckSettings
from clpeft.training.loop import Loop
from clpeft.tuners.bottleneck import BottleneckConfig, BottleneckLayer
from tests.running import Outcome, compose_only, run_it, same_bits

Overrides = Callable[..., list[str]]

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 40,
    **{f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos"))},
}
IDS = torch.tensor([[5, 6, 7, 2], [9, 8, 3, 2]])
POOLER = ["bert.pooler.dense", "classifier"]


def settings(**changes: Any) -> BottleneckSettings:
    values = {
        "method": "bottleneck",
        "placement": "houlsby",
        "reduction_factor": 4.0,
        "activation": "gelu",
        "dropout": 0.0,
        "scaling": 1.0,
        "target": "auto",
    }
    return BottleneckSettings(**(values | changes))


def llama(**sizes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model("llama", **SIZES | {"num_key_value_heads": 2} | sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def bert(**sizes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model("bert", **SIZES | {"num_labels": 3} | sizes)
    return AutoModelForSequenceClassification.from_config(config).eval()


def t5() -> PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    special = {"vocab_size": 40, "decoder_start_token_id": 0, "dropout_rate": 0.0}
    config = AutoConfig.for_model("t5", **sizes, **special)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], str, Sequence[str]]] = {
    "llama": (llama, "causal_lm", []),
    "bert": (bert, "sequence_classification", POOLER),
    "t5": (t5, "seq2seq_lm", []),
}


def adapted(family: str, **changes: Any) -> Any:
    """A model with adapters; every time on the same base."""
    torch.manual_seed(0)
    base, task_type, new = FAMILIES[family]
    return apply_peft(base(), settings(**changes), task_type, new).eval()


def logits(model: Any) -> Tensor:
    given = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**given).logits


def training(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stir(model: nn.Module, seed: int = 0) -> None:
    """Moves what trains away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in training(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


# How many, and where.


@pytest.mark.parametrize(
    ("family", "placement", "width", "adapters"),
    [
        ("llama", "houlsby", 4, 2 * 2),
        ("llama", "pfeiffer", 4, 2),
        ("bert", "houlsby", 4, 2 * 2),
        ("bert", "pfeiffer", 4, 2),
        # two blocks of an encoder and two of a decoder
        ("t5", "houlsby", 4, 4 * 2),
        ("t5", "pfeiffer", 4, 4),
    ],
)
def test_sizes(family: str, placement: str, width: int, adapters: int) -> None:
    base, _, new = FAMILIES[family]
    total, _ = count_parameters(base())
    model = adapted(family, placement=placement)

    # down and up, each with its bias
    expected = adapters * (2 * 16 * width + width + 16)
    # copies of BERT's pooler and classifier train beside the frozen ones
    whole = (16 * 16 + 16) + (3 * 16 + 3) if new else 0
    assert count_parameters(model) == (total + expected + whole, expected + whole)


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"bottleneck": 5}, 5),
        ({"bottleneck": None, "reduction_factor": 16.0}, 1),
        ({"reduction_factor": 3.0}, 5),  # 16 / 3, rounded down
        ({"reduction_factor": 100.0}, 1),  # never less than one
        ({"reduction_factor": 0.5}, 32),
        ({"bottleneck": 2, "reduction_factor": 1.0}, 2),
    ],
)
def test_width(changes: dict[str, Any], width: int) -> None:
    model = adapted("llama", **changes)
    downs = [p for name, p in training(model).items() if "bottleneck_down" in name and p.dim() == 2]

    assert [p.shape for p in downs] == [(width, 16)] * 4


def test_only_adapters_and_what_is_new_train() -> None:
    for family, (_, _, new) in FAMILIES.items():
        names = set(training(adapted(family)))
        adapters = {name for name in names if ".bottleneck_" in name}
        assert {name.split(".bottleneck_")[1] for name in adapters} == {
            f"{part}.default.{kind}" for part in ("down", "up") for kind in ("weight", "bias")
        }
        assert names - adapters == {
            f"base_model.model.{module}.modules_to_save.default.{kind}"
            for module in new
            for kind in ("weight", "bias")
        }


def test_modules_that_are_named() -> None:
    model = adapted("bert", target=["attention.output.dense"], placement="pfeiffer")
    adapters = {name.split(".bottleneck_")[0] for name in training(model) if "bottleneck_" in name}

    assert adapters == {
        f"base_model.model.bert.encoder.layer.{n}.attention.output.dense" for n in range(2)
    }
    # what is new trains whole, and has no adapter: the pooler is called dense too
    model = adapted("bert", target=["dense"])
    assert not any("pooler" in name and "bottleneck_" in name for name in training(model))
    assert sum(".bottleneck_up.default.weight" in name for name in training(model)) == 2 * 3


def test_heads_of_several_layers_have_no_adapter() -> None:
    config = AutoConfig.for_model("roberta", **SIZES, num_labels=3)
    base = AutoModelForSequenceClassification.from_config(config)
    new = ["classifier.dense", "classifier.out_proj"]
    model = apply_peft(base, settings(target=["dense"]), "sequence_classification", new)

    whole = {name for name in training(model) if "bottleneck_" not in name}
    assert len(whole) == 4
    assert all(".classifier.modules_to_save.default." in name for name in whole)


def test_modules_that_are_to_train_whole_exist() -> None:
    with pytest.raises(ConfigError, match="modules_to_save names 'LayerNrom', which no module"):
        adapted("bert", modules_to_save=["LayerNrom"])


def test_norms_may_train_with_it() -> None:
    """As in Houlsby et al. 2019."""
    names = set(training(adapted("bert", modules_to_save=["LayerNorm"])))

    # of the embeddings, and two of each layer
    assert sum("LayerNorm.modules_to_save" in name for name in names) == 2 * (1 + 2 * 2)


# Which function.


def bottleneck(x: Tensor, weights: dict[str, Tensor], activation: Any = F.gelu) -> Tensor:
    down = x @ weights["down.weight"].T + weights["down.bias"]
    return activation(down) @ weights["up.weight"].T + weights["up.bias"]


def weights_of(layer: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return {
        f"{part}.{kind}": layer.get_parameter(f"bottleneck_{part}.{adapter}.{kind}")
        for part in ("down", "up")
        for kind in ("weight", "bias")
    }


def weights_at(model: nn.Module, path: str) -> dict[str, Tensor]:
    return weights_of(model.get_submodule(f"base_model.model.{path}"))


def normed(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_function_in_a_bert(placement: str) -> None:
    """One layer with one head, written out."""
    torch.manual_seed(0)
    base = bert(num_hidden_layers=1, num_attention_heads=1, hidden_dropout_prob=0.0)
    plain = copy.deepcopy(base).bert
    model = apply_peft(base, settings(placement=placement), "sequence_classification", POOLER)
    stir(model.eval())
    with torch.no_grad():
        layer = plain.encoder.layer[0]
        x = plain.embeddings(input_ids=IDS)
        own = layer.attention.self
        query, key, value = (
            x @ part.weight.T + part.bias for part in (own.query, own.key, own.value)
        )
        shares = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(16), dim=-1)
        out = layer.attention.output
        read = (shares @ value) @ out.dense.weight.T + out.dense.bias
        path = "bert.encoder.layer.0"
        if placement == "houlsby":
            read = read + bottleneck(read, weights_at(model, f"{path}.attention.output.dense"))
        x = normed(read + x, out.LayerNorm)
        wide = F.gelu(x @ layer.intermediate.dense.weight.T + layer.intermediate.dense.bias)
        made = wide @ layer.output.dense.weight.T + layer.output.dense.bias
        norm = layer.output.LayerNorm
        if placement == "houlsby":
            made = made + bottleneck(made, weights_at(model, f"{path}.output.dense"))
        else:
            # Pfeiffer et al. 2021: it reads behind the norm, and adds before it
            read = normed(made + x, norm)
            made = made + bottleneck(read, weights_at(model, f"{path}.output.LayerNorm"))
        expected = normed(made + x, norm)
        found = model.base_model.model.bert(input_ids=IDS).last_hidden_state

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain(input_ids=IDS).last_hidden_state, atol=0.1)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_function_in_a_llama(placement: str) -> None:
    """A decoder layer from the base's own parts: what is read is not normalised again."""
    torch.manual_seed(0)
    base = llama(num_hidden_layers=1)
    plain = copy.deepcopy(base).model
    model = apply_peft(base, settings(placement=placement), "causal_lm", []).eval()
    stir(model)
    with torch.no_grad():
        layer, x = plain.layers[0], plain.embed_tokens(IDS)
        positions = plain.rotary_emb(x, torch.arange(4)[None])
        # attention_mask: later tokens are not read
        mask = torch.full((1, 1, 4, 4), -torch.inf).triu(1)
        read, _ = layer.self_attn(
            layer.input_layernorm(x), position_embeddings=positions, attention_mask=mask
        )
        if placement == "houlsby":
            path = "model.layers.0.self_attn.o_proj"
            read = read + bottleneck(read, weights_at(model, path))
        x = x + read
        made = layer.mlp(layer.post_attention_layernorm(x))
        made = made + bottleneck(made, weights_at(model, "model.layers.0.mlp.down_proj"))
        expected = plain.norm(x + made)
        found = model.base_model.model.model(input_ids=IDS).last_hidden_state

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    # of -1: Φ(-1) = 0.158655, σ(-1) = 0.268941, tanh(-1) = -0.761594
    [("relu", 0.0), ("gelu", -0.158655), ("silu", -0.268941), ("tanh", -0.761594)],
)
def test_activation_and_scaling_by_hand(name: str, value: float) -> None:
    base = nn.Linear(2, 2)
    adapters = BottleneckLayer(
        base, "default", BottleneckConfig(width=1, activation=name, scaling=0.5)
    )
    weights = weights_of(adapters)
    with torch.no_grad():
        base.weight.copy_(torch.eye(2))
        base.bias.zero_()
        weights["down.weight"].copy_(torch.tensor([[1.0, -1.0]]))
        weights["down.bias"].fill_(1.0)
        weights["up.weight"].copy_(torch.tensor([[4.0], [-2.0]]))
        weights["up.bias"].copy_(torch.tensor([0.0, 3.0]))
    # down: 1 - 3 + 1 = -1
    found = adapters(torch.tensor([1.0, 3.0]))

    expected = torch.tensor([1 + 0.5 * 4 * value, 3 + 0.5 * (-2 * value + 3)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_of_what_is_added() -> None:
    torch.manual_seed(0)
    base = nn.Linear(1, 1000)
    config = BottleneckConfig(width=1, dropout=0.25, scaling=3.0)
    adapters = BottleneckLayer(base, "default", config)
    with torch.no_grad():
        base.weight.zero_()
        base.bias.fill_(1.0)
        weights_of(adapters)["up.bias"].fill_(1.0)
    found = adapters(torch.zeros(1))

    # nothing, or 3 / (1 - 0.25), beside what was there
    assert set(found.tolist()) == {1.0, 5.0}
    assert (found == 5).float().mean() == pytest.approx(0.75, abs=0.05)
    assert adapters.eval()(torch.zeros(1)).tolist() == [4.0] * 1000


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_nothing(family: str, placement: str) -> None:
    base, task_type, new = FAMILIES[family]
    plain = base().requires_grad_(False)  # kernels differ by whether a weight trains
    expected = logits(plain)
    model = apply_peft(plain, settings(placement=placement), task_type, new).eval()

    assert torch.equal(logits(model), expected)
    stir(model)
    assert not torch.allclose(logits(model), expected, atol=1e-2)


# As any PEFT method.


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, placement: str, tmp_path: Path) -> None:
    base, task_type, new = FAMILIES[family]
    torch.manual_seed(0)
    plain = base()
    changes = {"placement": placement, "bottleneck": 3, "activation": "silu", "scaling": 0.7}
    model = apply_peft(copy.deepcopy(plain), settings(**changes), task_type, new).eval()
    stir(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()

    assert torch.equal(logits(loaded), logits(model))
    assert training(loaded) == {}
    slim = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in slim.parameters())
    assert all(
        torch.equal(value, loaded.state_dict()[name])
        for name, value in slim.state_dict().items()
        if "bottleneck_" in name
    )
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert training(again).keys() == training(model).keys()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("default" in name for name in tensors)
    assert sum(name.endswith(".bottleneck_down.weight") for name in tensors) == len(
        [module for module in loaded.modules() if isinstance(module, BottleneckLayer)]
    )
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["width"]) == ("BOTTLENECK", 3)
    names = loaded.peft_config["default"].target_modules
    assert len(names) == {"llama": 2, "bert": 2, "t5": 4}[family] * (2 - (placement != "houlsby"))


def test_loaded_by_a_process_that_has_imported_clpefts_tuners(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = apply_peft(base, settings(), "causal_lm", []).eval()
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    code = f"""
import clpeft.tuners
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
print(float(model(input_ids=torch.tensor({IDS.tolist()})).logits.double().sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(logits(model).double().sum()), rel=1e-6)


def test_wide_models_are_loaded_too(tmp_path: Path) -> None:
    """From twenty targets on PEFT shortens their names."""
    base = llama(num_hidden_layers=12)
    model = apply_peft(copy.deepcopy(base), settings(), "causal_lm", []).eval()
    stir(model)
    model.save_pretrained(tmp_path)

    assert sum(isinstance(module, BottleneckLayer) for module in model.modules()) == 24
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path).eval()), logits(model))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_live_side_by_side(family: str, placement: str, tmp_path: Path) -> None:
    model = adapted(family, placement=placement)
    none = logits(model)
    stir(model, 1)
    first = logits(model)
    config = copy.deepcopy(model.peft_config["default"])
    config.width = 7
    model.add_adapter("second", config)
    assert torch.equal(logits(model.eval()), first)
    model.set_adapter("second")
    stir(model, 2)
    second = logits(model)

    assert not torch.allclose(second, first, atol=1e-2)
    assert all("second" in name for name in training(model))
    for name, expected in (("default", first), ("second", second), ("default", first)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
        assert all(name in parameter for parameter in training(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), none)
    assert torch.equal(logits(model), first)
    # each is saved on its own, and can be put beside another
    model.save_pretrained(tmp_path)
    other = adapted(family, placement=placement)
    other.load_adapter(tmp_path / "second", adapter_name="loaded")
    other.set_adapter("loaded")
    assert torch.equal(logits(other.eval()), second)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any(".default." in name for name in model.state_dict() if "bottleneck_" in name)


def test_second_one_elsewhere_trains_when_it_is_chosen() -> None:
    model = adapted("llama", target=["o_proj"])
    stir(model)
    first = logits(model)
    config = copy.deepcopy(model.peft_config["default"])
    config.target_modules = ["down_proj"]
    model.add_adapter("second", config)
    assert all("o_proj" in name and "default" in name for name in training(model))
    assert torch.equal(logits(model.eval()), first)
    model.set_adapter("second")
    assert all("down_proj" in name and "second" in name for name in training(model))


def test_active_ones_act_one_after_another() -> None:
    layer = nn.Linear(2, 2)
    adapters = BottleneckLayer(layer, "one", BottleneckConfig(width=1))
    adapters.update_layer("two", BottleneckConfig(width=2))
    adapters.set_adapter(["one", "two"])
    stir(adapters)
    x = torch.randn(3, 2)
    one, two = (weights_of(adapters, name) for name in ("one", "two"))
    read = layer(x)
    read = read + bottleneck(read, one)

    torch.testing.assert_close(adapters(x), read + bottleneck(read, two))


def test_taken_off_again() -> None:
    plain = llama()
    expected = logits(plain)
    model = apply_peft(plain, settings(), "causal_lm", []).eval()
    stir(model)
    bare = model.unload()

    assert not any(isinstance(module, BottleneckLayer) for module in bare.modules())
    # kernels differ by whether a weight trains
    torch.testing.assert_close(logits(bare), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused(merge: str) -> None:
    model = adapted("llama")
    stir(model)
    before = logits(model)
    with pytest.raises(ConfigError) as refused:
        getattr(model, merge)()

    assert str(refused.value) == (
        "A bottleneck adapter cannot be merged into the base model: there is a nonlinearity in it, "
        "and a weight is linear; keep the adapter beside the model."
    )
    assert torch.equal(logits(model), before)


# Beside layers of other kinds.


def test_half_precision_base_with_an_adapter_in_single() -> None:
    model = adapted("llama", placement="houlsby")
    base = llama().to(torch.bfloat16)
    half = apply_peft(base, settings(), "causal_lm", []).eval()
    stir(half)

    assert {p.dtype for p in training(half).values()} == {torch.float32}
    half.add_adapter("second", copy.deepcopy(half.peft_config["default"]))
    assert {p.dtype for n, p in half.named_parameters() if "second" in n} == {torch.float32}
    layer = half.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert layer(torch.randn(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert logits(half).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Rounded(nn.Linear):
    """A linear layer whose weight is kept in bytes, and which computes in half precision."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = layer.weight.abs().max().item() / 127
        whole = torch.round(layer.weight.detach() / self.scale).to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16() * self.scale)


def test_quantized_layer_with_an_adapter_in_single_precision() -> None:
    layer = Rounded(nn.Linear(8, 4))
    bytes_before = layer.weight.clone()
    adapters = BottleneckLayer(layer, "default", BottleneckConfig(width=3))
    x = torch.randn(2, 8)
    assert torch.equal(adapters(x), layer(x))
    stir(adapters)
    found = adapters(x)
    found.float().square().sum().backward()

    assert found.dtype == torch.bfloat16
    parameters = weights_of(adapters)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    assert torch.equal(layer.weight, bytes_before)
    read = layer(x).float()
    # rounded to eight bits after the addition
    expected = read + bottleneck(read, parameters)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_gpt2s_transposed_layers_and_others() -> None:
    config = BottleneckConfig(width=2)
    layer = Conv1D(5, 3)  # three numbers in, five out
    adapters = BottleneckLayer(layer, "default", config)
    stir(adapters)
    x = torch.randn(1, 2, 3)
    weights = weights_of(adapters)
    torch.testing.assert_close(adapters(x), layer(x) + bottleneck(layer(x), weights))

    with pytest.raises(ConfigError, match=r"peft\.target names a Embedding, but a bottleneck"):
        BottleneckLayer(nn.Embedding(3, 2), "default", config)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient() -> None:
    for family in FAMILIES:
        model = adapted(family, placement="pfeiffer")
        stir(model)
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            given = {"input_ids": IDS}
            if family == "t5":
                given["decoder_input_ids"] = IDS
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            model(**given).logits.square().sum().backward()
            found.append([p.grad.clone() for p in training(model).values()])
            model.zero_grad()
        for one, other in zip(*found, strict=True):
            # T5 computes without its cache then, which rounds otherwise
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
        assert sum(bool(gradient.any()) for gradient in found[0]) > len(found[0]) / 2


# In a run.


@pytest.fixture(scope="session")
def bottlenecked(tiny: Overrides) -> Overrides:
    """Overrides of a tiny run with bottleneck adapters."""

    def overrides(strategy: str, *more: str, model: str) -> list[str]:
        kept = [o for o in tiny(strategy, model=model) if not o.startswith("peft.")]
        own = ["peft=bottleneck", "peft.reduction_factor=4", "peft.dropout=0.1"]
        short = ["stream.num_tasks=2", "evaluation.untrained=false", "evaluation.ahead=false"]
        return [*kept, *own, *short, *more]

    return overrides


MODELS = {
    "tiny_llama": (AutoModelForCausalLM, {}),
    "tiny_bert": (AutoModelForSequenceClassification, {"num_labels": 4}),
    "tiny_t5": (AutoModelForSeq2SeqLM, {}),
}


@pytest.mark.parametrize(
    ("model", "placement"),
    [
        ("tiny_llama", "houlsby"),
        ("tiny_bert", "pfeiffer"),
        pytest.param("tiny_t5", "pfeiffer", marks=pytest.mark.slow),
    ],
)
def test_trained_stopped_and_loaded(
    bottlenecked: Overrides,
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    placement: str,
) -> None:
    overrides = bottlenecked("ewc", f"peft.placement={placement}", model=model)
    whole = run_it(overrides, tmp_path / "whole")
    original, calls = Loop._backward, iter(range(1, 100))

    def backward(self: Loop, batches: Any) -> Any:
        if next(calls) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with mock.patch.object(Loop, "_backward", backward):
        run_it(overrides, tmp_path / "run", interrupted=True)
    resumed = run_it(overrides, tmp_path / "run")

    assert same_bits(resumed.after, whole.after)
    assert resumed.results["matrix"] == whole.results["matrix"]
    assert whole.results["peft"] == "bottleneck"
    assert max(step["train/loss/ewc"] for step in whole.steps(1)) > 0
    frozen = whole.before.keys() - whole.trainable.keys()
    assert all(torch.equal(whole.before[name], whole.after[name]) for name in frozen)
    assert all(
        not torch.equal(whole.before[name], value)
        for name, value in whole.trainable.items()
        if "pooler" not in name
    )
    auto, labels = MODELS[model]
    (folder,) = (whole.directory / "adapters").glob("2_*")
    loaded = PeftModel.from_pretrained(auto.from_pretrained(bases(model), **labels), folder).eval()
    run = whole.run
    batch = run.loader(run.stream.tasks[0].test, shuffle=False).batch(0)
    with torch.no_grad():
        found, expected = (
            run.objective.forward(which.eval(), batch).logits for which in (loaded, run.model)
        )
    assert torch.equal(found, expected)
    check_started_from(folder, whole, overrides, tmp_path)


def check_started_from(folder: Path, whole: Outcome, overrides: list[str], directory: Path) -> None:
    """A run that begins with another's adapter has that, once."""
    kept = [o for o in overrides if not o.startswith("model.path=")]
    more = [f"model.path={folder}", "stream.num_tasks=1", "training.max_steps=1"]
    outcome = run_it([*kept, *more], directory / "more")

    assert outcome.trainable.keys() == whole.trainable.keys()
    assert all(torch.equal(outcome.before[n], value) for n, value in whole.trainable.items())


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns(family: str, placement: str) -> None:
    """Two examples by heart, on a base that knows nothing."""
    base, task_type, new = FAMILIES[family]
    torch.manual_seed(0)
    # weights as small as a Llama's usually are at first leave it no way to be sure
    plain = llama(initializer_range=0.5) if family == "llama" else base()
    changes = {"placement": placement, "reduction_factor": 1.0}
    model = apply_peft(plain, settings(**changes), task_type, new).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    labels = torch.tensor([2, 0]) if family == "bert" else torch.tensor([[9, 4, 7], [3, 3, 8]])
    optimizer = torch.optim.Adam(training(model).values(), lr=1e-2)
    losses = []
    for _ in range(100):
        given = {"input_ids": IDS[:, :3], "labels": labels}
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses[0] > 1.0
    assert losses[-1] < 0.3 * losses[0]


# What is refused.


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("peft.placement=behind", "peft.placement=behind is not possible; choose one of houlsby,"),
        ("peft.bottleneck=0", "peft.bottleneck=0 is too small; it must be at least 1."),
        ("peft.reduction_factor=0", "peft.reduction_factor=0.0 is too small; it must be more than"),
        (
            "peft.activation=swish",
            "peft.activation=swish is not possible; choose one of gelu, relu",
        ),
        (
            "peft.target=all-linear",
            "peft.target=all-linear names no modules; set it to auto (peft.",
        ),
        ("peft.target=[]", "peft.target=[] names no modules; set it to auto"),
        ("peft.target=null", "peft.target=None names no modules"),
        ("strategy=olora", "The strategy 'olora' does not work with peft=bottleneck"),
    ],
)
def test_mistakes(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settle(compose_only(["peft=bottleneck", override]))
    assert str(refused.value).startswith(sentence)


def test_names_that_no_module_has() -> None:
    with pytest.raises(
        ConfigError, match=r"peft\.target names 'o_projj', .* Did you mean 'o_proj'"
    ):
        adapted("llama", target=["o_projj"])


def test_config_without_targets() -> None:
    from peft import get_peft_model

    with pytest.raises(ConfigError, match=r"BottleneckConfig\.target_modules is not set"):
        get_peft_model(llama(), clpeft.tuners.BottleneckConfig())
