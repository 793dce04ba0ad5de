"""The layers an adapter goes on, architecture by architecture, on toy sizes."""

from __future__ import annotations

import json
import logging
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from clpeft.config import ConfigError
from clpeft.models.architectures import ARCHITECTURES, Architecture, build
from clpeft.models.targets import CHOICES, find_targets, head_paths, target_paths
from clpeft.peft_methods.lora import LoraSettings, apply_lora

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def spelled(*patterns: str) -> set[str]:
    """What patterns such as `a.{b,c}` stand for."""
    found = set()
    for pattern in patterns:
        parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
        found |= {"".join(choice) for choice in product(*parts)}
    return found


# From reading the models' sources: query and value, the rest of attention, the rest of the layers.
LLAMA = (
    "model.layers.0.self_attn.{q,v}_proj",
    "model.layers.0.self_attn.{k,o}_proj",
    "model.layers.0.mlp.{gate,up,down}_proj",
)
FUSED = ("query_key_value", "dense", "{dense_h_to_4h,dense_4h_to_h}")
EXPECTED: dict[str, tuple[str, str, str]] = {
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Mixtral": (LLAMA[0], LLAMA[1], ""),
    "Qwen2, Qwen2.5": LLAMA,
    "Qwen3": LLAMA,
    "Gemma": LLAMA,
    "Gemma 2": LLAMA,
    "Gemma 3 (text)": LLAMA,
    "Phi-1, Phi-2": (
        LLAMA[0],
        "model.layers.0.self_attn.{k_proj,dense}",
        "model.layers.0.mlp.{fc1,fc2}",
    ),
    "Phi-3": (
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.{gate_up,down}_proj",
    ),
    "Falcon": (
        f"transformer.h.0.self_attention.{FUSED[0]}",
        f"transformer.h.0.self_attention.{FUSED[1]}",
        f"transformer.h.0.mlp.{FUSED[2]}",
    ),
    "GPT-2": (
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.{c_fc,c_proj}",
    ),
    "GPT-J": (
        "transformer.h.0.attn.{q,v}_proj",
        "transformer.h.0.attn.{k,out}_proj",
        "transformer.h.0.mlp.{fc_in,fc_out}",
    ),
    "GPT-NeoX, Pythia": (
        f"gpt_neox.layers.0.attention.{FUSED[0]}",
        f"gpt_neox.layers.0.attention.{FUSED[1]}",
        f"gpt_neox.layers.0.mlp.{FUSED[2]}",
    ),
    "BLOOM": (
        f"transformer.h.0.self_attention.{FUSED[0]}",
        f"transformer.h.0.self_attention.{FUSED[1]}",
        f"transformer.h.0.mlp.{FUSED[2]}",
    ),
    "OPT": (
        "model.decoder.layers.0.self_attn.{q,v}_proj",
        "model.decoder.layers.0.self_attn.{k,out}_proj",
        "model.decoder.{project_in,project_out,layers.0.fc1,layers.0.fc2}",
    ),
    "MPT": (
        "transformer.blocks.0.attn.Wqkv",
        "transformer.blocks.0.attn.out_proj",
        "transformer.blocks.0.ffn.{up,down}_proj",
    ),
    "T5": (
        "{encoder.block.0.layer.0.Self,decoder.block.0.layer.0.Self,"
        "decoder.block.0.layer.1.EncDec}Attention.{q,v}",
        "{encoder.block.0.layer.0.Self,decoder.block.0.layer.0.Self,"
        "decoder.block.0.layer.1.EncDec}Attention.{k,o}",
        "{encoder.block.0.layer.1,decoder.block.0.layer.2}.DenseReluDense.{wi,wo}",
    ),
    "T5 v1.1, Flan-T5": (
        "{encoder.block.0.layer.0.Self,decoder.block.0.layer.0.Self,"
        "decoder.block.0.layer.1.EncDec}Attention.{q,v}",
        "{encoder.block.0.layer.0.Self,decoder.block.0.layer.0.Self,"
        "decoder.block.0.layer.1.EncDec}Attention.{k,o}",
        "{encoder.block.0.layer.1,decoder.block.0.layer.2}.DenseReluDense.{wi_0,wi_1,wo}",
    ),
    "BART": (
        "model.{encoder.layers.0.self,decoder.layers.0.self,decoder.layers.0.encoder}_attn.{q,v}_proj",
        "model.{encoder.layers.0.self,decoder.layers.0.self,decoder.layers.0.encoder}_attn."
        "{k,out}_proj",
        "model.{encoder,decoder}.layers.0.{fc1,fc2}",
    ),
    **{
        name: (
            f"{root}.encoder.layer.0.attention.self.{{query,value}}",
            f"{root}.encoder.layer.0.attention.{{self.key,output.dense}}",
            f"{root}.encoder.layer.0.{{intermediate,output}}.dense",
        )
        for name, root in (("BERT", "bert"), ("RoBERTa", "roberta"), ("ELECTRA", "electra"))
    },
    "DistilBERT": (
        "distilbert.transformer.layer.0.attention.{q,v}_lin",
        "distilbert.transformer.layer.0.attention.{k,out}_lin",
        "distilbert.transformer.layer.0.ffn.{lin1,lin2}",
    ),
    "DeBERTa": (
        "deberta.encoder.layer.0.attention.self.in_proj",
        "deberta.encoder.layer.0.attention.{self.pos_proj,self.pos_q_proj,output.dense}",
        "deberta.encoder.layer.0.{intermediate,output}.dense",
    ),
    "DeBERTa v2, v3": (
        "deberta.encoder.layer.0.attention.self.{query,value}_proj",
        "deberta.encoder.layer.0.attention.{self.key_proj,output.dense}",
        "deberta.encoder.layer.0.{intermediate,output}.dense",
    ),
    "ViT": (
        "vit.layers.0.attention.{q,v}_proj",
        "vit.layers.0.attention.{k,o}_proj",
        "vit.layers.0.mlp.{fc1,fc2}",
    ),
}
CASES = [(name, choice) for name in EXPECTED for choice in CHOICES]


def expected(name: str, choice: str) -> set[str]:
    return spelled(*filter(None, EXPECTED[name][: CHOICES.index(choice) + 1]))


TASK_TYPES = {
    "AutoModelForCausalLM": "causal_lm",
    "AutoModelForSeq2SeqLM": "seq2seq_lm",
    "AutoModelForMaskedLM": "sequence_classification",
    "AutoModelForImageClassification": "sequence_classification",
}


def settings(target: Any) -> LoraSettings:
    return LoraSettings(
        method="lora",
        r=2,
        alpha=4,
        dropout=0.0,
        target=target,
        bias="none",
        init_lora_weights="default",
        modules_to_save=None,
    )


def answers(model: nn.Module, architecture: Architecture) -> Tensor:
    """Logits for fixed inputs."""
    ids = torch.arange(24).view(2, 12) + 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if architecture.auto.endswith("Seq2SeqLM"):
        inputs["decoder_input_ids"] = ids[:, :4]
    if architecture.name == "ViT":
        inputs = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}
    return model(**inputs).logits


def test_every_architecture_of_the_table_is_expected() -> None:
    assert EXPECTED.keys() == BY_NAME.keys()


@pytest.mark.parametrize(("name", "choice"), CASES)
def test_what_is_meant_is_adapted_trains_and_is_saved(
    name: str, choice: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    architecture = BY_NAME[name]
    base = build(architecture)
    wanted = expected(name, choice)
    assert set(target_paths(base, choice)) == wanted
    names = find_targets(base, choice)

    model: Any = apply_lora(base, settings(choice), TASK_TYPES[architecture.auto], [])
    model.eval()  # without dropout
    layers = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert {n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in layers} == wanted

    before = answers(model.get_base_model(), architecture)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    torch.logsumexp(before, dim=-1).mean().backward()
    optimizer.step()
    # every one of them has a part in the answer
    assert all(bool(p.any()) for n, p in layers.items() if ".lora_B" in n)
    assert not torch.allclose(answers(model.get_base_model(), architecture), before, atol=1e-4)

    model.create_or_update_model_card = lambda folder: None
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == names


@pytest.mark.parametrize("name", BY_NAME)
def test_no_head_is_meant(name: str) -> None:
    model = build(BY_NAME[name])
    heads = set(head_paths(model))
    output = model.get_output_embeddings()

    assert heads
    assert output is None or any(model.get_submodule(head) is output for head in heads)
    assert not heads & set(target_paths(model, "all-linear"))


CLASSIFIERS: dict[str, tuple[str, ...]] = {
    "Llama": ("score",),
    "GPT-2": ("score",),
    "T5": ("classification_head.dense", "classification_head.out_proj"),
    "BART": ("classification_head.dense", "classification_head.out_proj"),
    "BERT": ("classifier",),
    "RoBERTa": ("classifier.dense", "classifier.out_proj"),
    "DistilBERT": ("pre_classifier", "classifier"),
    "DeBERTa v2, v3": ("pooler.dense", "classifier"),
}


def classifier(name: str) -> nn.Module:
    architecture = BY_NAME[name]
    config = AutoConfig.for_model(architecture.model_type, **architecture.settings, num_labels=3)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_no_head_of_a_classifier_is_meant(name: str) -> None:
    model = classifier(name)
    linear = {p for p, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}

    assert linear - set(target_paths(model, "all-linear")) == set(CLASSIFIERS[name])


def test_layers_that_are_new_are_not_meant_and_nothing_else_is_lost() -> None:
    model, new = classifier("BERT"), ["bert.pooler.dense", "classifier"]

    assert "bert.pooler.dense" in target_paths(model, "all-linear")
    assert set(target_paths(model, "all-linear", new)) == expected("BERT", "all-linear")
    # the name that would reach the pooler is replaced by those that do not
    assert find_targets(model, ["dense"], new) == ["intermediate.dense", "output.dense"]
    assert find_targets(model, ["dense"]) == ["dense"]


def test_names_are_the_same_however_many_layers_there_are() -> None:
    model = build(BY_NAME["GPT-2"], n_layer=12)

    assert find_targets(model, "attention") == ["attn.c_proj", "c_attn"]
    assert len(target_paths(model, "attention")) == 24


def test_the_name_it_had() -> None:
    model = build(BY_NAME["Llama"])

    assert find_targets(model, "auto") == find_targets(model, "minimal") == ["q_proj", "v_proj"]


def test_layers_that_are_named() -> None:
    model = build(BY_NAME["Llama"])

    assert find_targets(model, ["up_proj", "k_proj"]) == ["up_proj", "k_proj"]
    assert find_targets(model, "o_proj") == ["o_proj"]
    path = "model.layers.0.self_attn.q_proj"
    assert find_targets(model, [path]) == [path]
    assert find_targets(model, ["embed_tokens"]) == ["embed_tokens"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["v_proj", "q_prj"], "names 'q_prj', which no module of LlamaForCausalLM is called"),
        (["proj"], "names 'proj', which no module"),  # a part of a name
        (["lm_head"], "names 'lm_head', a head of LlamaForCausalLM or new in it"),
        (
            ["self_attn"],
            "names 'self_attn', which in LlamaForCausalLM is a LlamaAttention, which can",
        ),
        (["norm"], "names 'norm', which in LlamaForCausalLM is a LlamaRMSNorm, which can"),
    ],
)
def test_names_that_mean_nothing(names: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_targets(build(BY_NAME["Llama"], num_hidden_layers=3), names)

    assert str(error.value).startswith(f"peft.target {told}")
    # the layers that there are, once
    linear = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert f"; choose among its linear layers: {linear}." in str(error.value)
    assert ("Did you mean 'q_proj' or 'v_proj' or 'o_proj'" in str(error.value)) == (
        "q_prj" in names
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_q = nn.Linear(4, 4)
        self.multihead = nn.MultiheadAttention(4, 2)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.proj = nn.Linear(4, 4)
        self.answer = nn.ModuleDict({"proj": nn.Linear(4, 9)})


def test_of_an_unknown_architecture_names_are_asked_for() -> None:
    with pytest.raises(ConfigError) as error:
        find_targets(Unknown(), "minimal", ["answer"])
    assert str(error.value) == (
        "peft.target=minimal finds nothing in Unknown; name the modules to adapt, for example "
        "peft.target=[w_q], among its linear layers: proj, w_q."
    )
    assert find_targets(Unknown(), "attention") == ["w_q"]
    # torch's attention multiplies by its output's weight without calling the layer
    with pytest.raises(ConfigError, match="'out_proj', which in Unknown is a NonDynamically"):
        find_targets(Unknown(), ["out_proj"])


class LatentAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.kv_b_proj = nn.Linear(4, 4), nn.Linear(4, 4)


def test_a_query_without_the_value_beside_it_is_not_what_minimal_means() -> None:
    model = nn.ModuleDict({"attention": LatentAttention()})

    with pytest.raises(ConfigError, match="finds nothing in ModuleDict"):
        find_targets(model, "minimal")
    assert find_targets(model, "attention") == ["kv_b_proj", "q_proj"]


def test_paths_that_peft_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"means proj and not answer\.proj, which PEFT cannot"):
        find_targets(Unknown(), "all-linear", ["answer"])


def test_experts_that_are_no_layers_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        find_targets(build(BY_NAME["Mixtral"]), "all-linear")
        find_targets(build(BY_NAME["ViT"]), "all-linear")  # its positions are no matrices

    (record,) = caplog.records
    assert "leaves experts.down_proj and experts.gate_up_proj of MixtralForCausalLM" in (
        record.getMessage()
    )
