"""Bases in 8 and 4 bits: what is quantized, what it takes, and that gradients pass through it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from torch import Tensor, nn
from torchao.quantization import Int8Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from clpeft.config import ConfigError, ModelConfig
from clpeft.models.load import count_parameters, load_model
from clpeft.models.quantize import (
    Int8Config,
    NF4Config,
    QuantizationConfig,
    TorchAOInt8Config,
    base_bytes,
    dequantized,
)
from clpeft.peft_methods.base import apply_peft
from tests.peft_methods.test_lora import settings as lora
from tests.running import build_it, compose, same_bits

Bases = Callable[[str], Path]
Overrides = Callable[..., list[str]]

NF4 = NF4Config("nf4", double_quantization=True, compute_dtype="float32")
SINGLE = NF4Config("nf4", double_quantization=False, compute_dtype="float32")
INT8 = Int8Config("int8", threshold=6.0)
TORCHAO = TorchAOInt8Config("torchao_int8")
NONE = QuantizationConfig("none")
KINDS = {
    "nf4": (NF4, Linear4bit),
    "int8": (INT8, Linear8bitLt),
    "torchao_int8": (TORCHAO, nn.Linear),  # whose weight is a tensor of torchao's
}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Tokenizer:
    """As much of a tokenizer as loading a model looks at."""

    pad_token_id = 0


def load(
    folder: Path | str,
    quantization: QuantizationConfig,
    task_type: str = "causal_lm",
    whole: tuple[str, ...] = (),
    dtype: str = "float32",
) -> tuple[Any, list[str]]:
    config = ModelConfig(name="mine", task_type=task_type, path=str(folder), dtype=dtype)
    tokenizer: Any = Tokenizer()
    return load_model(config, str(folder), tokenizer, 5, quantization, whole)


def quantized(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt))
        or (isinstance(module, nn.Linear) and isinstance(module.weight, Int8Tensor))
    }


# A small Llama: two layers of four matrices 64 × 64 and three of 64 × 128, and in float32 600
# tokens of 64 numbers and five norms; its head is tied to its embeddings.
WEIGHTS = 2 * (4 * 64 * 64 + 3 * 64 * 128)
FLOATING = 4 * (600 * 64 + 5 * 64)
BYTES = {
    "none": (NONE, 4 * WEIGHTS + FLOATING),
    # a byte per weight and, for each row, a scale in float32
    "int8": (INT8, WEIGHTS + 4 * 2 * (4 * 64 + 2 * 128 + 64) + FLOATING),
    # the same, and a zero point in a byte per row, which is 0
    "torchao_int8": (TORCHAO, WEIGHTS + 5 * 2 * (4 * 64 + 2 * 128 + 64) + FLOATING),
    # half a byte per weight and for each 64 a scale in float32; 16 levels for each of 14 matrices
    "nf4, single": (SINGLE, WEIGHTS // 2 + 4 * WEIGHTS // 64 + 14 * 4 * 16 + FLOATING),
    # the scales in a byte each, with one scale in float32 for up to 256 of them and 256 levels
    "nf4": (NF4, WEIGHTS // 2 + WEIGHTS // 64 + 14 * 4 * (16 + 1 + 256) + FLOATING),
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_of_the_base_by_hand(bases: Bases, kind: str) -> None:
    quantization, expected = BYTES[kind]
    model, _ = load(bases("wide_llama"), quantization)
    model.requires_grad_(False)

    assert base_bytes(model) == expected
    # however many bits each has
    assert count_parameters(model) == (WEIGHTS + FLOATING // 4, 0)


def test_what_trains_is_not_counted_to_the_base(
    tiny: Overrides, bases: Bases, tmp_path: Path
) -> None:
    overrides = tiny("finetune", f"model.path={bases('wide_llama')}")
    adapted = build_it([*overrides, "quantization=nf4"], tmp_path).model
    full = [o for o in overrides if not o.startswith("peft.")]

    assert base_bytes(adapted) == BYTES["nf4"][1]
    # tied weights are one parameter under two names
    assert base_bytes(build_it([*full, "peft=full"], tmp_path).model) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_head_is_quantized(bases: Bases, kind: str) -> None:
    quantization, layer = KINDS[kind]
    model, new = load(bases("wide_llama"), quantization)

    assert new == []
    assert {type(model.get_submodule(name)) for name in quantized(model)} == {layer}
    assert quantized(model) == {
        f"model.layers.{number}.{part}_proj"
        for number in (0, 1)
        for part in (
            *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
            *("mlp.gate", "mlp.up", "mlp.down"),
        )
    }


def test_rows_that_a_cpu_misreads_stay_in_floating_point(
    bases: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = bases("tiny_llama")  # rows of 32 weights, and of 64 in the last layer of each block
    last = {f"model.layers.{number}.mlp.down_proj" for number in (0, 1)}

    assert quantized(load(narrow, NF4)[0]) == last
    assert len(quantized(load(narrow, INT8)[0])) == 14
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert len(quantized(load(narrow, NF4)[0])) == 14


def saved(folder: Path, architecture: str, auto: Any, **sizes: Any) -> Path:
    model = auto.from_config(AutoConfig.for_model(architecture, **sizes))
    model.save_pretrained(folder)
    return folder


def test_head_of_its_own_stays_in_floating_point(tmp_path: Path) -> None:
    sizes = SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": False}
    model, _ = load(saved(tmp_path, "llama", AutoModelForCausalLM, **sizes), NF4)

    assert "lm_head" not in quantized(model)
    assert len(quantized(model)) == 7


def test_transposed_layers_are_quantized_too(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 40, "n_positions": 32}
    folder = saved(tmp_path, "gpt2", AutoModelForCausalLM, **sizes)
    model, _ = load(folder, NF4)
    ids = torch.tensor([[3, 4, 5]])
    plain, _ = load(folder, NONE)

    assert quantized(model) == {
        f"transformer.h.0.{path}"
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    # 16 levels between −1 and 1: a tenth of the weights' spread
    found, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert (found - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_head_and_what_else_is_new_stay_in_floating_point(bases: Bases, kind: str) -> None:
    model, new = load(bases("wide_bert"), KINDS[kind][0], "sequence_classification")

    assert new == ["bert.pooler.dense", "classifier"]
    for path in new:
        layer = model.get_submodule(path)
        assert type(layer) is nn.Linear
        assert layer.weight.dtype == torch.float32
    assert len(quantized(model)) == 2 * 6


def test_new_weights_are_those_of_a_base_that_is_not_quantized(bases: Bases) -> None:
    found = []
    for quantization in (NONE, NF4):
        torch.manual_seed(3)
        model, new = load(bases("wide_bert"), quantization, "sequence_classification")
        state = model.state_dict()
        found.append({n: t for n, t in state.items() if n.rpartition(".")[0] in new})

    assert same_bits(*found)


def test_head_that_the_source_has_stays_in_floating_point(tmp_path: Path) -> None:
    auto = AutoModelForSequenceClassification
    folder = saved(tmp_path, "bert", auto, **SIZES, num_labels=5)
    model, new = load(folder, NF4, "sequence_classification")

    assert new == []
    assert type(model.classifier) is nn.Linear
    assert torch.equal(model.classifier.weight, auto.from_pretrained(folder).classifier.weight)
    # a part of the backbone
    assert isinstance(model.bert.pooler.dense, Linear4bit)


def test_head_of_two_layers_stays_in_floating_point(tmp_path: Path) -> None:
    parts = {f"{p}_{n}": v for p in ("encoder", "decoder") for n, v in (("layers", 1),)}
    sizes = {f"{p}_attention_heads": 4 for p in ("encoder", "decoder")}
    sizes |= {f"{p}_ffn_dim": 64 for p in ("encoder", "decoder")}
    special = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 2, "d_model": 64}
    folder = saved(tmp_path, "bart", AutoModelForSeq2SeqLM, **parts, **sizes, **special)
    model, _ = load(folder, NF4, "sequence_classification")

    assert not any(name.startswith("classification_head") for name in quantized(model))
    assert len(quantized(model)) == 6 + 10


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_train_whole_are_not_quantized(bases: Bases, kind: str) -> None:
    model, _ = load(bases("wide_llama"), KINDS[kind][0], whole=("down_proj",))
    settings = lora(modules_to_save=["down_proj"])
    model = apply_peft(model, settings, "causal_lm", [])

    assert not any("down_proj" in name for name in quantized(model))
    whole = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert len(whole) == 2
    assert {p.dtype for p in whole.values()} == {torch.float32}


@pytest.mark.parametrize(
    "chosen",
    [
        ("peft=lora", "peft.modules_to_save=[gate_proj]"),
        ("peft=adalora", "peft.modules_to_save=[gate_proj]"),
        ("peft=ia3", "peft.modules_to_save=[gate_proj]"),
        ("peft=bottleneck", "peft.modules_to_save=[gate_proj]"),
        ("peft=any", "peft.type=VERA", "peft.options={r:4,modules_to_save:[gate_proj]}"),
    ],
    ids=lambda chosen: chosen[0],
)
def test_every_method_tells_which_modules_train_whole(
    bases: Bases, chosen: tuple[str, ...]
) -> None:
    method = compose(chosen)[1].peft
    model, _ = load(bases("wide_llama"), KINDS["nf4"][0], whole=method.trained_whole)
    model = apply_peft(model, method, "causal_lm", [])

    whole = [p for name, p in model.named_parameters() if "gate_proj.modules_to_save." in name]
    assert len(whole) == 2
    assert all(p.requires_grad and p.dtype == torch.float32 for p in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_quantized_computes_in_float32(bases: Bases, kind: str) -> None:
    folder = bases("wide_bert")
    model, new = load(folder, KINDS[kind][0], "sequence_classification", dtype="bfloat16")
    settings = lora()
    model = apply_peft(model, settings, "sequence_classification", new)

    # a tensor of torchao's tells what it stands for
    stored = {"nf4": torch.uint8, "int8": torch.int8, "torchao_int8": torch.float32}[kind]
    assert {p.dtype for p in model.parameters()} == {torch.float32, stored}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_biases_are_rounded_before_training_rather_than_in_it(bases: Bases) -> None:
    bf16 = NF4Config("nf4", double_quantization=True, compute_dtype="bfloat16")
    model, _ = load(bases("wide_bert"), bf16, "sequence_classification")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids)

    layer = model.bert.encoder.layer[0].output.dense
    assert layer.bias.dtype == torch.bfloat16
    assert same_bits(before, model.state_dict())


def input_gradient(model: Any) -> Tensor:
    """What comes back through the base to the embeddings of a sentence."""
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.train()
    model(inputs_embeds=embedded, labels=ids).loss.backward()
    assert embedded.grad is not None
    return embedded.grad


def test_evaluating_does_not_cut_the_base_out_of_later_gradients(bases: Bases) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would pack the weights anew when it evaluates."""
    model, _ = load(bases("wide_llama"), NF4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = input_gradient(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[3, 4, 5]]))

    assert torch.equal(input_gradient(model), first)
    assert same_bits(before, model.state_dict())
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_rounded_weights(bases: Bases, kind: str) -> None:
    """A plain model with the weights that a quantized one stands for says the same."""
    folder = bases("wide_llama")
    model, _ = load(folder, KINDS[kind][0])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name in quantized(model):
        layer: Any = model.get_submodule(name)
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(by_hand(layer))

    # the same float32 products in another order
    torch.testing.assert_close(input_gradient(model), input_gradient(plain), rtol=1e-4, atol=1e-6)


# the 16 levels of NF4, as appendix E of the paper has them
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def by_hand(layer: Any) -> Tensor:
    """The weights that a quantized layer stands for, from its stored bytes."""
    weight = layer.weight
    if isinstance(weight, Int8Tensor):
        return weight.qdata.float() * weight.scale
    if isinstance(layer, Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.float() * scales[:, None] / 127
    state = weight.quant_state
    packed = weight.data.flatten()
    places = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    # doubly quantized: each scale is one of 256 levels times the scale of its block, plus a mean
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax[0] + state.offset
    return (LEVELS[places].view(-1, 64) * scales[:, None]).view(layer.out_features, -1)


# how exactly the scale of a row is computed, from weights that are so stored
EPS = {"float32": 2**-23, "bfloat16": 2**-8}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchao_rounds_to_the_nearest_of_255_steps(bases: Bases, dtype: str) -> None:
    """Each row by itself, to multiples of its largest weight's 127.5th part."""
    folder = bases("wide_llama")
    model, plain = load(folder, TORCHAO, dtype=dtype)[0], load(folder, NONE, dtype=dtype)[0]
    layers = quantized(model)
    assert len(layers) == 14

    for name in layers:
        stored, weight = model.get_submodule(name).weight, plain.get_submodule(name).weight.float()
        largest = weight.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(stored.scale, largest / 127.5, rtol=EPS[dtype], atol=0)
        assert stored.qdata.dtype == torch.int8
        assert not stored.zero_point.any()
        error = (stored.dequantize() - weight).abs() / stored.scale
        assert error[stored.qdata.abs() < 127].max() <= 0.5001
        # a row's largest would be 127.5 steps, and is rounded to 127
        assert error.max() <= 0.5001 + 127.5 * EPS[dtype]
        assert torch.equal(stored.dequantize(), by_hand(model.get_submodule(name)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantized_model_of_torchao_has_the_rounded_weights(bases: Bases, dtype: str) -> None:
    folder = bases("wide_llama")
    model, _ = load(folder, TORCHAO, dtype=dtype)
    names = quantized(model)
    expected = {name: by_hand(model.get_submodule(name)) for name in names}
    model = dequantized(model)

    assert quantized(model) == set()
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert same_bits(
        {name: model.get_submodule(name).weight for name in names},
        {name: weight.to(getattr(torch, dtype)) for name, weight in expected.items()},
    )
    assert not hasattr(model.config, "quantization_config")


def test_layers_that_torchao_keeps_whole_are_those_that_are_named(tmp_path: Path) -> None:
    """By the ends of their paths, at a dot; what is within them too."""
    parts = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    special = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    folder = saved(tmp_path, "t5", AutoModelForSeq2SeqLM, **parts, **special)
    first = ("EncDecAttention", "SelfAttention.k", "i")
    model, _ = load(folder, TORCHAO, "seq2seq_lm", whole=first)

    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    # T5's wo is kept whole by transformers, the head because it answers
    kept = {"lm_head", *(n for n in linear if n.endswith(".wo") or "EncDecAttention" in n)}
    kept |= {n for n in linear if n.endswith("SelfAttention.k")}
    assert linear - quantized(model) == kept
    assert any(n.endswith(".wi") for n in quantized(model))


def test_transposed_layers_are_nothing_that_torchao_quantizes(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 40, "n_positions": 32}
    folder = saved(tmp_path, "gpt2", AutoModelForCausalLM, **sizes)
    with pytest.raises(ConfigError) as refusal:
        load(folder, TORCHAO)
    assert str(refusal.value) == (
        "quantization=torchao_int8 finds no linear layer in GPT2LMHeadModel that it could store in "
        "8 bits; use quantization=int8 or none."
    )


def test_adapter_of_a_quantized_base_loads_on_one_once(
    tiny: Overrides, bases: Bases, tmp_path: Path
) -> None:
    wide = f"model.path={bases('wide_bert')}"
    run = build_it(tiny("finetune", wide, "quantization=nf4", model="tiny_bert"), tmp_path)
    with torch.no_grad():
        for parameter in run.trainable.values():
            parameter.add_(0.01)
    run.model.save_pretrained(tmp_path / "adapter")
    more = (f"model.path={tmp_path / 'adapter'}", "quantization=nf4")
    again = build_it(tiny("finetune", *more, model="tiny_bert"), tmp_path)

    assert sum(isinstance(module, PeftModel) for module in again.model.modules()) == 1
    assert same_bits(dict(again.trainable), dict(run.trainable))
    assert same_bits(again.model.state_dict(), run.model.state_dict())


def test_source_that_is_quantized_already_is_refused(bases: Bases, tmp_path: Path) -> None:
    told = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(bases("wide_llama"), quantization_config=told)
    model.save_pretrained(tmp_path)

    for quantization in (NONE, NF4):
        with pytest.raises(ConfigError, match=r"is stored quantized already; take one"):
            load(tmp_path, quantization)
