"""Base models built here: the same everywhere, built once, and seen by nobody's random state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from clpeft.config import ConfigError, ModelConfig, WarmupConfig
from clpeft.models import generated
from clpeft.models.generated import generated_base, train_tokenizer

TRAINING = [f"the {colour} letter goes north" for colour in ("red", "green", "blue")]
NEUTRAL = [f"{one} and {two} are colours" for one in ("red", "green") for two in ("blue", "grey")]

LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[dict[str, Any], Any]] = {
    "llama": (LAYERS, AutoModelForCausalLM),
    "gpt2": (
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
        AutoModelForCausalLM,
    ),
    "bert": (LAYERS, AutoModelForMaskedLM),
    "roberta": (LAYERS, AutoModelForMaskedLM),
    "t5": (
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        AutoModelForSeq2SeqLM,
    ),
}


def stream(training: list[str] = TRAINING, neutral: list[str] = NEUTRAL) -> Any:
    return SimpleNamespace(
        training_text=lambda: iter(training), neutral_text=lambda seed: [*neutral, f"seed {seed}"]
    )


def config(kind: str = "llama", **warmup: Any) -> ModelConfig:
    values = {"steps": 4, "batch_size": 2, "length": 8, "lr": 1e-2, "vocabulary": 320, "seed": 0}
    return ModelConfig(
        name="mine",
        architecture={"model_type": kind, **FAMILIES[kind][0]},
        warmup=WarmupConfig(**(values | warmup)),
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    one = generated_base(config(), stream(), tmp_path / "one")
    torch.manual_seed(99)  # whatever else was drawn before
    other = generated_base(config(), stream(), tmp_path / "other")

    assert one.name == other.name
    assert "model.safetensors" in contents(one)
    assert contents(one) == contents(other)


def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = generated_base(config(), stream(), tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(generated, "warm_up", refuse)
    # the same text in another order and twice is the same text
    assert generated_base(config(), stream(TRAINING[::-1] * 2), tmp_path) == first


@pytest.mark.parametrize(
    "other",
    [
        (config(steps=5), stream()),
        (config(lr=2e-2), stream()),
        (config(seed=1), stream()),
        (config(vocabulary=400), stream()),
        (config("gpt2"), stream()),
        (config(), stream(training=TRAINING[1:])),
        (config(), stream(neutral=NEUTRAL[1:])),
    ],
)
def test_every_ingredient_counts(tmp_path: Path, other: tuple[ModelConfig, Any]) -> None:
    base = generated_base(config(), stream(), tmp_path)

    assert generated_base(*other, tmp_path) != base


def test_random_state_of_the_caller_is_untouched(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    generated_base(config(), stream(), tmp_path)  # built
    built = torch.get_rng_state()
    generated_base(config(), stream(), tmp_path)  # cached

    assert torch.equal(built, before)
    assert torch.equal(torch.get_rng_state(), before)


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(generated, "warm_up", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            generated_base(config(), stream(), tmp_path)

    assert list((tmp_path / "bases").iterdir()) == []
    assert generated_base(config(), stream(), tmp_path).is_dir()


def loss(folder: Path, auto: Any) -> float:
    """How surprised a language model is by the neutral text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), auto.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(" . ".join(NEUTRAL))["input_ids"]])
    with torch.no_grad():
        if auto is AutoModelForSeq2SeqLM:  # is to write the rest of a text
            return float(model(input_ids=ids[:, :-1], labels=ids[:, -1:]).loss)
        if auto is AutoModelForMaskedLM:
            masked = ids.clone()
            masked[:, ::4] = tokenizer.mask_token_id
            return float(model(input_ids=masked, labels=ids).loss)
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("kind", FAMILIES)
def test_warm_up_teaches_every_family(tmp_path: Path, kind: str) -> None:
    auto = FAMILIES[kind][1]
    raw = generated_base(config(kind, steps=0), stream(), tmp_path)
    warm = generated_base(config(kind, steps=40, batch_size=8), stream(), tmp_path)

    # log 320 = 5.8 for a model that knows nothing; a handful of words is soon learned
    assert loss(raw, auto) > 5.0
    assert loss(warm, auto) < loss(raw, auto) - 1.0


def test_tokenizer() -> None:
    tokenizer = train_tokenizer([*TRAINING, *NEUTRAL], 400)

    # bytes, so that nothing is unknown; special tokens around a text
    for text in ("the red letter", "zebra_42 é"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    # words of the text became single tokens, "red" among them
    assert len(tokenizer(" red", add_special_tokens=False)["input_ids"]) == 1
    pair = tokenizer("red", "blue")["input_ids"]
    assert pair.count(tokenizer.eos_token_id) == 1
    special = {tokenizer.pad_token, tokenizer.eos_token, tokenizer.mask_token, tokenizer.unk_token}
    assert special == {"<pad>", "</s>", "<mask>", "<unk>"}
    assert len(tokenizer) <= 400


def test_model_knows_its_tokenizer(tmp_path: Path) -> None:
    folder = generated_base(config(), stream(), tmp_path)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )

    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )


def test_architecture_that_does_not_exist(tmp_path: Path) -> None:
    wrong = dataclasses.replace(config(), architecture={"model_type": "lama"})

    with pytest.raises(ConfigError, match=r"model\.architecture does not describe a model"):
        generated_base(wrong, stream(), tmp_path)


def test_architecture_that_writes_no_text(tmp_path: Path) -> None:
    wrong = dataclasses.replace(
        config(), architecture={"model_type": "vit", "hidden_size": 16, "num_attention_heads": 2}
    )

    with pytest.raises(ConfigError, match="is no language model"):
        generated_base(wrong, stream(), tmp_path)
