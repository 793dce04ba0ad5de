"""Loading models from folders: sources, heads, adapters that are there already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

from clpeft.config import ConfigError, ModelConfig
from clpeft.models.load import (
    check_model,
    check_positions,
    count_parameters,
    load_model,
    load_tokenizer,
)


def config(path: Path | str | None, task_type: str = "causal_lm", **more: Any) -> ModelConfig:
    where = None if path is None else str(path)
    return ModelConfig(name="mine", task_type=task_type, path=where, **more)


@pytest.fixture
def llama(bases: Callable[[str], Path]) -> tuple[ModelConfig, str, Any]:
    """A tiny decoder's settings, folder and tokenizer."""
    folder = bases("tiny_llama")
    return config(folder), str(folder), AutoTokenizer.from_pretrained(folder)


def test_language_model_has_no_new_weights(llama: Any) -> None:
    model, new = load_model(*llama, labels=4)

    assert type(model).__name__ == "LlamaForCausalLM"
    assert new == []
    assert model.config.pad_token_id == llama[2].pad_token_id
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_classifier_has_a_new_head_and_says_what_else_is_new(
    bases: Callable[[str], Path],
) -> None:
    folder = bases("tiny_bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model, new = load_model(
        config(folder, "sequence_classification"), str(folder), tokenizer, labels=7
    )

    assert model.classifier.out_features == 7
    assert new == ["bert.pooler.dense", "classifier"]


def test_weights_in_another_number_format(llama: Any) -> None:
    model, _ = load_model(config(llama[1], dtype="bfloat16"), llama[1], llama[2], labels=4)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_attention_can_be_chosen(llama: Any) -> None:
    model, _ = load_model(config(llama[1], attention="eager"), llama[1], llama[2], labels=4)

    assert model.config._attn_implementation == "eager"


def test_tokenizer_without_padding_pads_with_its_end(llama: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama[1])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)

    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(config(tmp_path), str(tmp_path), None).pad_token == "</s>"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"path": "/no/such"}, "model.path=/no/such is not a folder"),
        ({"path": "/"}, "model.path=/ holds neither config.json nor adapter_config.json"),
        ({"path": None}, "model=mine says nowhere what to load"),
    ],
)
def test_sources_that_are_none(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_model(config(**settings))


def test_a_run_s_directory_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")

    with pytest.raises(ConfigError, match=f"the directory of a run; take .* {tmp_path}/adapters/<"):
        check_model(config(tmp_path))


def test_folder_with_a_broken_model_is_named(tmp_path: Path, llama: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(ConfigError, match=f"could not load model=mine from model.path={tmp_path}"):
        load_model(config(tmp_path), str(tmp_path), llama[2], labels=4)


def test_counts() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))
    model[1].requires_grad_(False)

    assert count_parameters(model) == (3 * 4 + 4 + 4 * 2, 3 * 4 + 4)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16), 16),
        # two of the table's rows are never reached: positions begin behind the padding's id, 1
        (
            RobertaConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
                max_position_embeddings=18,
            ),
            16,
        ),
        # nor two of these: positions begin at 2
        (
            OPTConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                ffn_dim=8,
                word_embed_proj_dim=8,
                max_position_embeddings=16,
            ),
            16,
        ),
        (
            LlamaConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
                max_position_embeddings=16,
            ),
            None,
        ),
    ],
    ids=["gpt2", "roberta", "opt", "llama"],
)
def test_texts_longer_than_learned_positions_are_refused(config: Any, limit: int | None) -> None:
    model = AutoModel.from_config(config)

    check_positions(model, 16)
    assert model(torch.ones(1, 16, dtype=torch.long) * 3) is not None
    if limit is None:  # rotary positions go on
        check_positions(model, 17)
        return
    with pytest.raises(ConfigError, match=r"17 tokens, .* knows 16 positions; set stream.max_len"):
        check_positions(model, 17)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, 17, dtype=torch.long) * 3)
