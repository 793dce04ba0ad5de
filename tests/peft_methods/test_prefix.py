"""Prefix tuning: its size, and that a prefix does what the tokens would whose states it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clpeft.config import ConfigError
from clpeft.models.load import count_parameters
from clpeft.peft_methods.base import apply_peft
from clpeft.peft_methods.prefix import PrefixSettings
from clpeft.peft_methods.prompt_learning import kept_sizes
from tests.architectures import build
from tests.peft_methods.learned_prompts import VIRTUAL, settings
from tests.running import compose

EARLIER = torch.tensor([[21, 22, 23, 24]])
IDS = torch.tensor([[5, 6, 7]])


def prefixed(kind: str, task_type: str, method: str = "prefix") -> Any:
    return apply_peft(build(kind, task_type), settings(method), task_type, []).eval()


@pytest.mark.parametrize(
    ("kind", "task_type", "sizes"),
    [
        ("llama", "causal_lm", (2, 2, 2 * 4)),  # layers, heads of keys, numbers in all of them
        ("qwen3", "causal_lm", (2, 2, 2 * 8)),
        ("gpt2", "causal_lm", (2, 4, 16)),
        ("falcon", "causal_lm", (2, 1, 4)),
        ("mpt", "causal_lm", (2, 4, 16)),
        ("llama", "sequence_classification", (2, 2, 2 * 4)),
        ("bert", "sequence_classification", (2, 4, 16)),
        ("t5", "seq2seq_lm", (2, 4, 4 * 8)),
        ("bart", "seq2seq_lm", (2, 4, 16)),  # of the decoder, which has another layer
    ],
)
def test_sizes(kind: str, task_type: str, sizes: tuple[int, int, int]) -> None:
    base = build(kind, task_type)
    total, _ = count_parameters(base)
    layers, _, width = sizes

    assert kept_sizes(base) == sizes
    if task_type != "sequence_classification":
        # PEFT makes twice what a decoder with an encoder reads
        expected = VIRTUAL * layers * 2 * width * (2 if task_type == "seq2seq_lm" else 1)
        assert count_parameters(prefixed(kind, task_type)) == (total + expected, expected)


def test_size_of_a_projection() -> None:
    total, _ = count_parameters(build("gpt2", "causal_lm"))
    # embeddings, then 16 → 8 → keys and values of two layers, with biases
    expected = VIRTUAL * 16 + (16 * 8 + 8) + (8 * 2 * 2 * 16 + 2 * 2 * 16)

    assert count_parameters(prefixed("gpt2", "causal_lm", "prefix:projection"))[1] == expected
    wide = apply_peft(
        build("gpt2", "causal_lm"), PrefixSettings("prefix", VIRTUAL, True), "causal_lm", []
    )
    # as wide as the model if nothing is said
    expected = VIRTUAL * 16 + (16 * 16 + 16) + (16 * 64 + 64)
    assert count_parameters(wide) == (total + expected, expected)


def flat(layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Keys and values [1, heads, V, width] of each layer as PEFT has them in a row: [V, n]."""
    rows = [state[0].transpose(0, 1).flatten(1) for pair in layers for state in pair]
    return torch.cat(rows, dim=1)


def kept(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "bloom", "falcon"])
@torch.no_grad()
def test_a_decoders_prefix_does_what_the_tokens_would(kind: str) -> None:
    base, model = build(kind, "causal_lm"), prefixed(kind, "causal_lm")
    cache = base(input_ids=EARLIER, use_cache=True).past_key_values
    model.prompt_encoder["default"].embedding.weight.copy_(flat(kept(cache)))

    expected = base(input_ids=torch.cat([EARLIER, IDS], dim=1)).logits[:, VIRTUAL:]
    ones = torch.ones_like(IDS)
    found = model(input_ids=IDS, attention_mask=ones).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_encoders_prefix_does_what_the_tokens_would() -> None:
    # in one layer, where what a token leaves behind does not hang on those after it
    one = {"num_hidden_layers": 1}
    base = build("bert", "sequence_classification", **one)
    model = apply_peft(
        build("bert", "sequence_classification", **one),
        settings("prefix"),
        "sequence_classification",
        [],
    ).eval()
    attention = base.bert.encoder.layer[0].attention.self
    states = base.bert.embeddings(EARLIER)
    heads = [
        projection(states).view(1, VIRTUAL, 4, 4).transpose(1, 2)
        for projection in (attention.key, attention.value)
    ]
    model.prompt_encoder["default"].embedding.weight.copy_(flat([(heads[0], heads[1])]))

    whole = base.bert(input_ids=torch.cat([EARLIER, IDS], dim=1)).last_hidden_state
    expected = base.classifier(base.bert.pooler(whole[:, VIRTUAL:]))
    found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@torch.no_grad()
def test_a_prefix_of_an_encoder_decoder_stands_before_what_is_written(kind: str) -> None:
    base, model = build(kind, "seq2seq_lm"), prefixed(kind, "seq2seq_lm")
    begun = base(input_ids=IDS, decoder_input_ids=EARLIER, use_cache=True).past_key_values
    # behind each layer's pair stands one that is not read
    layers = kept(begun.self_attention_cache)
    unread = tuple(torch.full_like(state, 7.0) for state in layers[0])
    cache = [pair for layer in layers for pair in (layer, unread)]
    model.prompt_encoder["default"].embedding.weight.copy_(flat(cache))
    written = torch.tensor([[3, 9, 11]])

    both = torch.cat([EARLIER, written], dim=1)
    expected = base(input_ids=IDS, decoder_input_ids=both).logits[:, VIRTUAL:]
    ones = torch.ones_like(IDS)
    found = model(input_ids=IDS, attention_mask=ones, decoder_input_ids=written).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_projection_makes_the_prefix() -> None:
    model, plain = prefixed("gpt2", "causal_lm", "prefix:projection"), prefixed("gpt2", "causal_lm")
    w = {name: p.detach() for name, p in model.prompt_encoder["default"].named_parameters()}
    hidden = (w["embedding.weight"] @ w["transform.0.weight"].T + w["transform.0.bias"]).tanh()
    made = hidden @ w["transform.2.weight"].T + w["transform.2.bias"]
    plain.prompt_encoder["default"].embedding.weight.copy_(made)

    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    torch.testing.assert_close(model(**given).logits, plain(**given).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["training.gradient_checkpointing=true"],
            "peft=prefix does not work with training.gradient_checkpointing=true, because its keys",
        ),
        (
            ["peft.encoder_hidden_size=8"],
            "peft.encoder_hidden_size=8 is the width of the MLP that peft.projection=true has",
        ),
    ],
)
def test_settings_that_cannot_work(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(["peft=prefix", *options])
