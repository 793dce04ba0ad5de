"""A soft prompt and LoRA together: each does what it does alone, and PEFT knows both as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from clpeft.config import ConfigError
from clpeft.models.load import count_parameters
from clpeft.peft_methods.base import apply_peft
from tests.architectures import build, heads_of
from tests.peft_methods.learned_prompts import VIRTUAL, moved, settings
from tests.running import compose

IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0]])
TEXTS: dict[str, Any] = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
BEGUN = {"decoder_input_ids": torch.tensor([[0, 4, 3], [0, 9, 8]])}


def hybrid(kind: str, task_type: str) -> Any:
    base = build(kind, task_type)
    new = heads_of(base) if task_type == "sequence_classification" else []
    return apply_peft(base, settings("lisa_hybrid"), task_type, new).eval()


def prompt_of(model: Any, name: str = "default") -> Tensor:
    return model.base_model.soft_prompt[name].weight


def set_prompt(model: Any, values: Tensor) -> None:
    with torch.no_grad():
        prompt_of(model).copy_(values)


def test_sizes() -> None:
    total, _ = count_parameters(build("llama", "causal_lm"))
    # query and output 16 → 16, key and value 16 → 8, gate and up 16 → 32, down 32 → 16, rank 2
    lora = 2 * 2 * (2 * (16 + 16) + 2 * (16 + 8) + 2 * (16 + 32) + (32 + 16))
    expected = lora + VIRTUAL * 16

    assert count_parameters(hybrid("llama", "causal_lm")) == (total + expected, expected)


@pytest.mark.parametrize(
    ("kind", "task_type"),
    [
        ("llama", "causal_lm"),
        ("gpt2", "causal_lm"),
        ("opt", "causal_lm"),  # its language model calls the decoder within its model
        ("bloom", "causal_lm"),
        ("gemma2", "causal_lm"),  # multiplies embeddings by a number
        ("t5", "seq2seq_lm"),
        ("bart", "seq2seq_lm"),
        ("llama", "sequence_classification"),
        ("opt", "sequence_classification"),
    ],
)
@torch.no_grad()
def test_prompt_does_what_it_does_alone(kind: str, task_type: str) -> None:
    model = hybrid(kind, task_type)  # whose LoRA is 0 yet
    base = build(kind, task_type)
    new = heads_of(base) if task_type == "sequence_classification" else []
    plain = base(**TEXTS, **(BEGUN if task_type == "seq2seq_lm" else {})).logits
    alone = apply_peft(base, settings("prompt"), task_type, new).eval()
    set_prompt(model, alone.prompt_encoder["default"].embedding.weight)
    given = TEXTS | (BEGUN if task_type == "seq2seq_lm" else {})

    found, expected = model(**given).logits, alone(**given).logits
    if task_type == "causal_lm":
        # what becomes of the prompt is taken out here and stays in there
        assert found.shape == (2, 5, 40)
        found, expected = found[TEXTS["attention_mask"] == 1], expected[:, VIRTUAL:]
        expected = expected[TEXTS["attention_mask"] == 1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (model(**given).logits - plain).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "deberta-v2", "distilbert"])
@torch.no_grad()
def test_prompt_stands_behind_the_token_that_an_encoders_head_reads(kind: str) -> None:
    model = hybrid(kind, "sequence_classification")  # whose LoRA is 0 yet
    base = build(kind, "sequence_classification")
    text = base.get_input_embeddings()(IDS)
    prompts = prompt_of(model).expand(2, -1, -1)
    mask = torch.cat([torch.ones(2, VIRTUAL), TEXTS["attention_mask"]], dim=1)
    expected = base(
        inputs_embeds=torch.cat([text[:, :1], prompts, text[:, 1:]], dim=1),
        attention_mask=mask,
        output_hidden_states=True,
    )

    found = model(**TEXTS, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    own = [0, *range(VIRTUAL + 1, VIRTUAL + 5)]
    for states, others in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(states, others[:, own], rtol=1e-4, atol=1e-5)
    assert (found.logits - base(**TEXTS).logits).abs().max() > 0.1


@torch.no_grad()
def test_lora_does_what_it_does_alone() -> None:
    model = moved(hybrid("llama", "causal_lm"))
    names = sorted(model.peft_config["default"].target_modules)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=names)
    alone = get_peft_model(build("llama", "causal_lm"), lora).eval()
    state = {k: v for k, v in model.state_dict().items() if "soft_prompt" not in k}
    alone.load_state_dict(state)

    text = alone.get_input_embeddings()(IDS[:1])
    embeddings = torch.cat([prompt_of(model)[None], text], dim=1)
    expected = alone(inputs_embeds=embeddings).logits[:, VIRTUAL:]
    torch.testing.assert_close(model(input_ids=IDS[:1]).logits, expected, rtol=1e-4, atol=1e-5)
    # neither is without effect
    without = alone(input_ids=IDS[:1]).logits
    assert (expected - without).abs().max() > 0.1
    assert (expected - build("llama", "causal_lm")(input_ids=IDS[:1]).logits).abs().max() > 0.1


@torch.no_grad()
def test_types_of_tokens_and_positions_count_on() -> None:
    model = hybrid("bert", "sequence_classification")
    kinds = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    base = build("bert", "sequence_classification")
    text = base.get_input_embeddings()(IDS)
    prompts = prompt_of(model).expand(2, -1, -1)

    none = torch.zeros(2, VIRTUAL, dtype=torch.long)
    expected = base(
        inputs_embeds=torch.cat([text[:, :1], prompts, text[:, 1:]], dim=1),
        attention_mask=torch.cat([torch.ones(2, VIRTUAL), TEXTS["attention_mask"]], dim=1),
        token_type_ids=torch.cat([kinds[:, :1], none, kinds[:, 1:]], dim=1),
    ).logits
    torch.testing.assert_close(model(**TEXTS, token_type_ids=kinds).logits, expected)

    decoder = hybrid("llama", "causal_lm")
    places = (TEXTS["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    told = decoder(**TEXTS, position_ids=places).logits
    own = TEXTS["attention_mask"] == 1
    torch.testing.assert_close(told[own], decoder(**TEXTS).logits[own])


@torch.no_grad()
def test_adapters_are_switched_between_and_off(tmp_path: Path) -> None:
    model = moved(hybrid("llama", "causal_lm"))
    first = model(**TEXTS).logits
    model.save_pretrained(tmp_path)
    set_prompt(model, prompt_of(model) + 1)
    second = model(**TEXTS).logits
    assert (second - first).abs().max() > 0.1

    model.load_adapter(tmp_path, "other")
    assert torch.equal(model(**TEXTS).logits, second)
    model.set_adapter("other")
    torch.testing.assert_close(model(**TEXTS).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(**TEXTS).logits, build("llama", "causal_lm")(**TEXTS).logits)
    torch.testing.assert_close(model(**TEXTS).logits, first)
    model.delete_adapter("default")
    assert list(model.base_model.soft_prompt) == ["other"]
    torch.testing.assert_close(model(**TEXTS).logits, first)


def test_only_the_active_adapter_trains(tmp_path: Path) -> None:
    model = hybrid("llama", "causal_lm")
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other", is_trainable=True)

    def training() -> dict[str, set[bool]]:
        return {
            name: {p.requires_grad for path, p in model.named_parameters() if f".{name}." in path}
            for name in ("default", "other")
        }

    model.set_adapter("other")
    assert training() == {"default": {False}, "other": {True}}
    model.set_adapter("default")
    assert training() == {"default": {True}, "other": {False}}
    model.set_requires_grad("default", False)
    assert training() == {"default": {False}, "other": {False}}
    loaded = PeftModel.from_pretrained(build("llama", "causal_lm"), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = PeftModel.from_pretrained(build("llama", "causal_lm"), tmp_path, is_trainable=True)
    assert prompt_of(again).requires_grad


def test_there_is_no_weight_to_merge_a_prompt_into() -> None:
    model = hybrid("llama", "causal_lm")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="soft prompt cannot be merged"):
            merge()
    with pytest.raises(ValueError, match="no weighted sum"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with torch.no_grad():
        base = model.unload()
        assert torch.equal(base(**TEXTS).logits, build("llama", "causal_lm")(**TEXTS).logits)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["peft.init=text"], "peft.init=text needs the text"),
        (["peft.target=[]"], r"peft.target=\[\] names no modules"),
        (["peft.r=0"], "peft.r=0 is too small"),
    ],
)
def test_settings_that_cannot_work(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(["peft=lisa_hybrid", *options])
