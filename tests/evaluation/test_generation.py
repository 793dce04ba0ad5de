"""Greedy decoding against a loop over single tokens, and the two ways to compare texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

from clpeft.evaluation.generation import exact_match, generate, rouge_l

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 24))]
PROMPTS = [[3, 9, 17, 4, 12, 8], [14], [22, 7, 21], [5, 5, 6, 6]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def randomised(model: Any, seed: int) -> Any:
    """Random weights, of a seed with which some texts end, some are cut, and no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.0, generator=generator)
    return model.eval()


def llama() -> Any:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        vocab_size=len(WORDS),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return randomised(AutoModelForCausalLM.from_config(config), 0)


def t5() -> Any:
    config = AutoConfig.for_model(
        "t5",
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        vocab_size=len(WORDS),
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return randomised(AutoModelForSeq2SeqLM.from_config(config), 45)


@torch.no_grad()
def one_token_after_another(model: Any, prompt: list[int], limit: int) -> list[int]:
    written: list[int] = []
    while len(written) < limit and 2 not in written:
        if model.config.is_encoder_decoder:
            start = torch.tensor([[0, *written]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("make", [llama, t5])
def test_greedy_continuations(make: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model, limit = make(), 6
    expected = [one_token_after_another(model, prompt, limit) for prompt in PROMPTS]

    texts = generate(model, tokenizer, PROMPTS, limit)

    special = {0, 1, 2}
    assert texts == [
        " ".join(WORDS[token] for token in written if token not in special) for written in expected
    ]
    # some end by themselves, some are cut
    assert {2 in written for written in expected} == {True, False}
    assert len(set(texts)) > 2


@pytest.mark.parametrize(
    ("written", "references", "score"),
    [
        ("north", ["north"], 1.0),
        (" North ", ["north"], 1.0),
        ("the  north\nside", ["The north side"], 1.0),
        ("north", ["south", "north"], 1.0),
        ("north east", ["north"], 0.0),
        ("", ["north"], 0.0),
    ],
)
def test_exact_match(written: str, references: list[str], score: float) -> None:
    assert exact_match(written, references) == score


@pytest.mark.parametrize(
    ("written", "references", "score"),
    [
        # longest common subsequence of 2 words: precision 2/3, recall 2/2
        ("the cat sat", ["the cat"], 0.8),
        # "the ... mat" in this order: 2 of 3 and 2 of 4
        ("the red mat", ["the mat is blue"], 4 / 7),
        # order counts: one word of two
        ("cat the", ["the cat"], 0.5),
        ("two cats", ["two cat"], 1.0),  # stemmed
        ("nothing alike", ["some other words"], 0.0),
        ("the cat sat", ["a dog", "the cat", "x"], 0.8),  # the best of several
        ("", ["the cat"], 0.0),
    ],
)
def test_rouge_l(written: str, references: list[str], score: float) -> None:
    assert rouge_l(written, references) == pytest.approx(score)
