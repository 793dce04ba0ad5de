"""Prompt tuning: its size, what it does, what it begins as, and what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from clpeft.config import ConfigError, ModelConfig
from clpeft.models.load import count_parameters, load_model
from clpeft.peft_methods.base import apply_peft
from clpeft.peft_methods.carried import check_method, take_over
from clpeft.peft_methods.prompt import PromptSettings
from tests.architectures import build
from tests.peft_methods.learned_prompts import VIRTUAL, settings
from tests.peft_methods.test_lora import settings as lora
from tests.running import compose

IDS = torch.tensor([[5, 6, 7, 8, 2]])


def prompted(kind: str, task_type: str, new: tuple[str, ...] = ()) -> tuple[Any, torch.Tensor]:
    """A model with a soft prompt, and the prompt's embeddings [V, D]."""
    model = apply_peft(build(kind, task_type), settings("prompt"), task_type, new).eval()
    return model, model.prompt_encoder["default"].embedding.weight.detach()


@pytest.mark.parametrize(
    ("kind", "task_type", "width"),
    [
        ("llama", "causal_lm", 16),
        ("opt", "causal_lm", 8),  # its embeddings are narrower than its layers
        ("t5", "seq2seq_lm", 16),  # and no second prompt, which nothing would read
        ("bart", "seq2seq_lm", 16),
    ],
)
def test_sizes(kind: str, task_type: str, width: int) -> None:
    total, _ = count_parameters(build(kind, task_type))
    model, prompt = prompted(kind, task_type)

    assert prompt.shape == (VIRTUAL, width)
    assert count_parameters(model) == (total + VIRTUAL * width, VIRTUAL * width)


def test_heads_and_what_else_is_new_train_whole() -> None:
    base = build("bert", "sequence_classification")
    total, _ = count_parameters(base)
    model, _ = prompted("bert", "sequence_classification", ("bert.pooler.dense", "classifier"))

    # 16 → 16 and 16 → 3, each with biases, beside the frozen ones that they were copied from
    whole = 16 * 16 + 16 + 16 * 3 + 3
    assert count_parameters(model) == (total + whole + VIRTUAL * 16, whole + VIRTUAL * 16)


@torch.no_grad()
def test_it_is_read_as_if_it_were_embeddings_of_a_text() -> None:
    # a decoder
    model, prompt = prompted("llama", "causal_lm")
    base = build("llama", "causal_lm")
    text = base.get_input_embeddings()(IDS)
    expected = base(inputs_embeds=torch.cat([prompt[None], text], dim=1)).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)

    # an encoder
    model, prompt = prompted("bert", "sequence_classification")
    other = build("bert", "sequence_classification")
    text = other.get_input_embeddings()(IDS)
    expected = other(inputs_embeds=torch.cat([prompt[None], text], dim=1)).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)

    # an encoder and a decoder: the encoder
    model, prompt = prompted("t5", "seq2seq_lm")
    third = build("t5", "seq2seq_lm")
    text = third.get_input_embeddings()(IDS)
    begun = torch.tensor([[0, 4, 3]])
    embeddings = torch.cat([prompt[None], text], dim=1)
    expected = third(inputs_embeds=embeddings, decoder_input_ids=begun).logits
    torch.testing.assert_close(model(input_ids=IDS, decoder_input_ids=begun).logits, expected)


def test_it_may_begin_as_drawn_tokens() -> None:
    _, prompt = prompted("llama", "causal_lm")
    rows = build("llama", "causal_lm").get_input_embeddings().weight

    found = [[torch.equal(vector, row) for row in rows].index(True) for vector in prompt]
    assert len(set(found)) > 1


def test_it_may_begin_as_a_text(bases: Callable[[str], Path]) -> None:
    folder = bases("tiny_llama")
    text = "letters for the desk"
    chosen = PromptSettings("prompt", 12, "text", text)
    model = apply_peft(AutoModelForCausalLM.from_pretrained(folder), chosen, "causal_lm", [])

    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert 1 < len(tokens) < 12
    repeated = (tokens * 12)[:12]
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(
        model.prompt_encoder["default"].embedding.weight,
        base.get_input_embeddings().weight[repeated],
    )


def test_it_may_begin_at_random() -> None:
    torch.manual_seed(0)
    chosen = PromptSettings("prompt", 400, "random")
    model = apply_peft(
        build("llama", "causal_lm", max_position_embeddings=512), chosen, "causal_lm", []
    )
    prompt = model.prompt_encoder["default"].embedding.weight

    # 6400 numbers of N(0, 1): their mean and deviation within four standard errors
    assert abs(float(prompt.mean().detach())) < 4 / 80
    assert abs(float(prompt.std().detach()) - 1) < 4 / 80 / 2**0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["peft.init=text"], "peft.init=text needs the text: set peft.init_text"),
        (["peft.init_text=hello"], "peft.init_text is set, but peft.init=vocabulary does not read"),
        (["peft.init=zero"], "peft.init=zero is not possible; choose one of random, vocabulary"),
        (["peft.num_virtual_tokens=0"], "peft.num_virtual_tokens=0 is too small"),
    ],
)
def test_settings_that_cannot_work(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(["peft=prompt", *options])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_run_may_go_on_from_a_learned_one(
    bases: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    folder = bases("tiny_llama")
    first = apply_peft(
        AutoModelForCausalLM.from_pretrained(folder), settings(method), "causal_lm", []
    )
    first.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = ModelConfig(name="mine", task_type="causal_lm", path=str(tmp_path))
    loaded, _ = load_model(source, str(tmp_path), tokenizer, labels=4)

    model = apply_peft(loaded, settings(method), "causal_lm", [])
    take_over(model, str(tmp_path), settings(method))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == ["prompt_encoder.default.embedding.weight"]
    (prompt,) = trained.values()
    assert torch.equal(prompt, first.prompt_encoder["default"].embedding.weight)
    # PEFT takes the gradient to it, which it would not to one that is only read
    model(input_ids=IDS).logits.sum().backward()
    assert prompt.grad is not None
    assert prompt.grad.abs().max() > 0

    check_method(str(tmp_path), settings(method))
    told = rf"peft=lora was asked for, but .* holds a {method} adapter; choose peft={method},"
    with pytest.raises(ConfigError, match=told):
        check_method(str(tmp_path), lora())


def test_a_classifier_gone_on_with_finds_the_last_token_too(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = bases("tiny_llama")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base.config.pad_token_id = tokenizer.pad_token_id
    first = apply_peft(base, settings("prompt"), "sequence_classification", ["score"]).eval()
    first.save_pretrained(tmp_path)
    source = ModelConfig(name="mine", task_type="sequence_classification", path=str(tmp_path))
    loaded, new = load_model(source, str(tmp_path), tokenizer, labels=4)
    model = apply_peft(loaded, settings("prompt"), "sequence_classification", new).eval()
    take_over(model, str(tmp_path), settings("prompt"))

    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        torch.testing.assert_close(model(**given).logits, first(**given).logits)
        alone = model(input_ids=ids[1:, :2], attention_mask=torch.ones(1, 2, dtype=torch.long))
        torch.testing.assert_close(model(**given).logits[1:], alone.logits)
    assert any("score.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
