"""P-tuning: the networks that make a soft prompt, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from clpeft.config import ConfigError
from clpeft.models.load import count_parameters
from clpeft.peft_methods.base import apply_peft
from clpeft.peft_methods.carried import check_method
from clpeft.peft_methods.p_tuning import PTuningSettings
from tests.architectures import build
from tests.peft_methods.learned_prompts import VIRTUAL, settings
from tests.running import compose

D, H = 16, 8  # the model's width and the network's
IDS = torch.tensor([[5, 6, 7]])


def tuned(method: str) -> Any:
    return apply_peft(build("llama", "causal_lm"), settings(method), "causal_lm", []).eval()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.prompt_encoder["default"].named_parameters()}


def test_size_of_an_mlp() -> None:
    total, _ = count_parameters(build("llama", "causal_lm"))
    # embeddings, then D → H → H → D with biases
    expected = VIRTUAL * D + (D * H + H) + (H * H + H) + (H * D + D)

    assert count_parameters(tuned("p_tuning:mlp")) == (total + expected, expected)


def test_size_of_an_lstm() -> None:
    total, _ = count_parameters(build("llama", "causal_lm"))
    # two directions of four gates, each with a weight on what it reads and on its own state, and
    # two biases; the second layer reads both directions of the first
    layers = sum(2 * 4 * (H * read + H * H + 2 * H) for read in (D, 2 * H))
    # then 2H → 2H → D with biases
    expected = VIRTUAL * D + layers + (2 * H * 2 * H + 2 * H) + (2 * H * D + D)

    assert count_parameters(tuned("p_tuning:lstm")) == (total + expected, expected)


def test_width_is_the_models_if_none_is_given() -> None:
    chosen = PTuningSettings("p_tuning", VIRTUAL, "mlp", None, 2, 0.0)
    model = apply_peft(build("llama", "causal_lm"), chosen, "causal_lm", [])

    assert weights(model)["mlp_head.0.weight"].shape == (D, D)


def mlp(found: dict[str, Tensor], layers: list[int], x: Tensor) -> Tensor:
    for place, layer in enumerate(layers):
        x = x if place == 0 else x.relu()
        x = x @ found[f"mlp_head.{layer}.weight"].T + found[f"mlp_head.{layer}.bias"]
    return x


def lstm(found: dict[str, Tensor], x: Tensor) -> Tensor:
    """Two layers in both directions, gate by gate: [V, D] to [V, 2H]."""
    for layer in range(2):
        directions = []
        for suffix, backwards in (("", False), ("_reverse", True)):
            name = f"lstm_head.{{}}_l{layer}{suffix}"
            w_x, w_h = found[name.format("weight_ih")], found[name.format("weight_hh")]
            bias = found[name.format("bias_ih")] + found[name.format("bias_hh")]
            h = c = torch.zeros(H)
            states = []
            for vector in x.flip(0) if backwards else x:
                i, f, g, o = (w_x @ vector + w_h @ h + bias).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                states.append(h)
            directions.append(torch.stack(states[::-1] if backwards else states))
        x = torch.cat(directions, dim=1)
    return x


@pytest.mark.parametrize("method", ["p_tuning:mlp", "p_tuning:lstm"])
@torch.no_grad()
def test_prompt_is_what_the_network_makes(method: str) -> None:
    model = tuned(method)
    found = weights(model)
    if method.endswith("mlp"):
        prompt = mlp(found, [0, 2, 4], found["embedding.weight"])
    else:
        prompt = mlp(found, [0, 2], lstm(found, found["embedding.weight"]))

    base = build("llama", "causal_lm")
    text = base.get_input_embeddings()(IDS)
    expected = base(inputs_embeds=torch.cat([prompt[None], text], dim=1)).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["peft.reparameterization=mlp", "peft.encoder_num_layers=3"],
            "peft.encoder_num_layers=3 .* are settings of an LSTM",
        ),
        (
            ["peft.reparameterization=mlp", "peft.encoder_dropout=0.1"],
            "peft.encoder_dropout=0.1 are settings of an LSTM",
        ),
        (
            ["peft.encoder_num_layers=1", "peft.encoder_dropout=0.1"],
            "acts between an LSTM's layers, but peft.encoder_num_layers=1",
        ),
        (["peft.reparameterization=gru"], "choose one of lstm, mlp"),
        (["peft.encoder_hidden_size=0"], "peft.encoder_hidden_size=0 is too small"),
    ],
)
def test_settings_that_cannot_work(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(["peft=p_tuning", *options])


@pytest.mark.parametrize("method", ["p_tuning:lstm", "prefix:projection"])
def test_what_a_network_made_cannot_be_trained_on(
    bases: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    folder = bases("tiny_llama")
    first = apply_peft(
        AutoModelForCausalLM.from_pretrained(folder), settings(method), "causal_lm", []
    )
    first.save_pretrained(tmp_path)

    told = f"{tmp_path} holds what a network made .*; start from its base model, {folder}"
    with pytest.raises(ConfigError, match=told):
        check_method(str(tmp_path), settings(method))
