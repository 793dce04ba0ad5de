"""Where sub-layers end, on models made from their configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from clpeft.config import ConfigError
from clpeft.models.sublayers import find_sublayers

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 40,
    **{f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos"))},
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 4}
SHORT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "rotary_dim": 4}
SHORT |= {"bos_token_id": 1, "eos_token_id": 2}
BART = {"d_model": 16, "vocab_size": 40, "num_labels": 3}
BART |= {
    f"{part}_{what}": number
    for part in ("encoder", "decoder")
    for what, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))
}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "vocab_size": 40}
MPT = {"d_model": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 40}
VIT = {name: size for name, size in SIZES.items() if "_token_" not in name and name[0] != "v"}
CAUSAL, SEQUENCE, PICTURE = (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForImageClassification,
)
# class, sizes, where the layers are, and within a layer the end of attention and of the
# feed-forward; the norm behind that, where the sum is normalised
Case = tuple[Any, dict[str, Any], list[str], str, str, str | None]
BERT: tuple[str, str, str] = ("attention.output.dense", "output.dense", "output.LayerNorm")
LLAMA: Case = (CAUSAL, GROUPED, ["model.layers"], "self_attn.o_proj", "mlp.down_proj", None)
ARCHITECTURES: dict[str, Case] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"), LLAMA),
    "phi": (CAUSAL, SIZES, ["model.layers"], "self_attn.dense", "mlp.fc2", None),
    "falcon": (
        *(CAUSAL, SIZES, ["transformer.h"]),
        *("self_attention.dense", "mlp.dense_4h_to_h", None),
    ),
    "gpt2": (CAUSAL, SHORT, ["transformer.h"], "attn.c_proj", "mlp.c_proj", None),
    "gptj": (CAUSAL, SHORT, ["transformer.h"], "attn.out_proj", "mlp.fc_out", None),
    "gpt_neox": (
        *(CAUSAL, SIZES, ["gpt_neox.layers"]),
        *("attention.dense", "mlp.dense_4h_to_h", None),
    ),
    "bloom": (
        *(CAUSAL, {**SHORT, "hidden_size": 16}, ["transformer.h"]),
        *("self_attention.dense", "mlp.dense_4h_to_h", None),
    ),
    "opt": (
        *(CAUSAL, SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16}, ["model.decoder.layers"]),
        *("self_attn.out_proj", "fc2", None),
    ),
    "mpt": (CAUSAL, MPT, ["transformer.blocks"], "attn.out_proj", "ffn.down_proj", None),
    "bart": (
        *(SEQUENCE, BART, ["model.encoder.layers", "model.decoder.layers"]),
        *("self_attn.out_proj", "fc2", "final_layer_norm"),
    ),
    "mbart": (
        *(SEQUENCE, BART, ["model.encoder.layers", "model.decoder.layers"]),
        *("self_attn.out_proj", "fc2", None),
    ),
    "bert": (SEQUENCE, SIZES, ["bert.encoder.layer"], *BERT),
    "roberta": (SEQUENCE, SIZES, ["roberta.encoder.layer"], *BERT),
    "deberta": (SEQUENCE, SIZES, ["deberta.encoder.layer"], *BERT),
    "deberta-v2": (SEQUENCE, SIZES, ["deberta.encoder.layer"], *BERT),
    "electra": (SEQUENCE, SIZES, ["electra.encoder.layer"], *BERT),
    "distilbert": (
        *(SEQUENCE, DISTILBERT, ["distilbert.transformer.layer"]),
        *("attention.out_lin", "ffn.lin2", "output_layer_norm"),
    ),
    "vit": (
        *(PICTURE, VIT | {"image_size": 8, "patch_size": 4}, ["vit.layers"]),
        *("attention.o_proj", "mlp.fc2", None),
    ),
}


def built(kind: str) -> PreTrainedModel:
    auto, sizes, *_ = ARCHITECTURES[kind]
    return auto.from_config(AutoConfig.for_model(kind, **sizes))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_ends_of_sublayers(kind: str) -> None:
    _, _, lists, attention, feed_forward, norm = ARCHITECTURES[kind]
    model = built(kind)
    layers = [f"{path}.{number}" for path in lists for number in range(2)]

    expected = {f"{layer}.{end}" for layer in layers for end in (attention, feed_forward)}
    found = find_sublayers(model, "houlsby")
    assert len(found) == len(expected)
    assert set(found) == expected
    single = find_sublayers(model, "pfeiffer")
    assert single == [f"{layer}.{norm or feed_forward}" for layer in layers]
    for path in [*found, *single]:
        model.get_submodule(path)


def test_ends_of_sublayers_of_t5() -> None:
    """Attention to the encoder is none of the two; the feed-forward stands in another place."""
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **T5))
    blocks = [(part, number) for part in ("encoder", "decoder") for number in range(2)]
    ends = [
        f"{part}.block.{n}.layer.{1 if part == 'encoder' else 2}.DenseReluDense.wo"
        for part, n in blocks
    ]

    assert find_sublayers(model, "pfeiffer") == ends
    attention = [f"{part}.block.{n}.layer.0.SelfAttention.o" for part, n in blocks]
    assert find_sublayers(model, "houlsby") == attention + ends


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if ARCHITECTURES[kind][5]])
def test_named_norm_is_the_last_thing_of_a_layer(kind: str) -> None:
    """What the next layer reads is what it gave: the sum behind the feed-forward, normalised."""
    torch.manual_seed(0)
    model = built(kind).eval()
    path = find_sublayers(model, "pfeiffer")[0]
    layer = model.get_submodule(path.split(".0.")[0] + ".0")
    given: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            given[name] = output[0] if isinstance(output, tuple) else output

        return hook

    model.get_submodule(path).register_forward_hook(keep("norm"))
    layer.register_forward_hook(keep("layer"))
    model(input_ids=torch.tensor([[5, 6, 7, 2]]))
    assert torch.equal(given["norm"], given["layer"])


def test_unknown_architecture() -> None:
    # its experts' weights are no linear layers
    model = CAUSAL.from_config(AutoConfig.for_model("mixtral", **GROUPED))
    with pytest.raises(ConfigError) as refused:
        find_sublayers(model, "houlsby")
    assert str(refused.value) == (
        "peft.target=auto does not know where attention and the feed-forward end in "
        "MixtralForCausalLM; name their output projections in peft.target, among its linear "
        "layers: k_proj, o_proj, q_proj, v_proj."
    )


class Own(nn.Module):
    """Two blocks with names as a Llama's."""

    def __init__(self) -> None:
        super().__init__()
        names = ("self_attn", "mlp")
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Module() for n in names}) for _ in "ab")
        for block in self.blocks:
            block["self_attn"].o_proj = nn.Linear(2, 2)
            block["mlp"].down_proj = nn.Linear(2, 2)


def test_model_of_ones_own_with_known_names() -> None:
    assert find_sublayers(Own(), "pfeiffer") == [f"blocks.{n}.mlp.down_proj" for n in range(2)]
