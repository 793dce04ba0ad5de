"""Sampled text, against the distribution that it is drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from clpeft.models.sampling import sample

PROMPT = [1, 40, 41, 42, 43]
HOW: dict[str, Any] = {"max_new_tokens": 12, "top_k": 20, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def loaded(bases: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    """A tiny model and its tokenizer."""

    def load(name: str) -> tuple[Any, Any]:
        auto = AutoModelForSeq2SeqLM if name == "tiny_t5" else AutoModelForCausalLM
        return auto.from_pretrained(bases(name)).eval(), AutoTokenizer.from_pretrained(bases(name))

    return load


def first_logits(model: Any) -> torch.Tensor:
    """The logits of the token after the prompt."""
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id]])
            return model(input_ids=ids, decoder_input_ids=start).logits[0, -1]
        return model(input_ids=ids).logits[0, -1]


# the logits of the one are far apart, those of the other near each other
@pytest.mark.parametrize(("name", "temperature"), [("tiny_llama", 2.0), ("tiny_t5", 0.25)])
def test_tokens_come_from_the_likeliest_by_their_probabilities(
    loaded: Any, name: str, temperature: float
) -> None:
    model, tokenizer = loaded(name)
    how = HOW | {"max_new_tokens": 1, "top_k": 4, "temperature": temperature}
    rows = sample(model, tokenizer, PROMPT, 2000, **how)
    counts = Counter(row[0] for row in rows)
    top = first_logits(model).topk(4)
    expected = torch.softmax(top.values.double() / temperature, dim=0).numpy()

    assert {*counts} == {*top.indices.tolist()}
    found = np.array([counts[token] for token in top.indices.tolist()])
    # the seed is fixed; one right sampler in a thousand would fail with another
    assert stats.chisquare(found, 2000 * expected).pvalue > 0.001
    # and the test can tell: without the temperature they would be others
    plain = torch.softmax(top.values.double(), dim=0).numpy()
    assert stats.chisquare(found, 2000 * plain).pvalue < 1e-6


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_t5"])
def test_seed_decides_and_nothing_else_is_touched(loaded: Any, name: str) -> None:
    model, tokenizer = loaded(name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = sample(model, tokenizer, PROMPT, 6, **HOW)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)

    assert sample(model, tokenizer, PROMPT, 6, **HOW) == one
    assert sample(model, tokenizer, PROMPT, 6, **HOW | {"seed": 6}) != one
    assert len({tuple(row) for row in one}) > 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_end_with_their_end(loaded: Any) -> None:
    model, tokenizer = loaded("tiny_llama")
    end = tokenizer.eos_token_id
    rows = sample(model, tokenizer, PROMPT, 200, **HOW)
    finished = [row for row in rows if row[-1] == end]

    assert 0 < len(finished) < len(rows)
    assert all(end not in row[:-1] for row in rows)
    assert {len(row) for row in rows if row[-1] != end} == {12}
    assert len({len(row) for row in finished}) > 1


def test_one_token_to_choose_from_is_greedy(loaded: Any) -> None:
    model, tokenizer = loaded("tiny_llama")
    (row,) = sample(model, tokenizer, PROMPT, 1, **HOW | {"top_k": 1})
    ids = list(PROMPT)
    for token in row:
        with torch.no_grad():
            assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_a_models_own_generation_settings_play_no_part(loaded: Any) -> None:
    model, tokenizer = loaded("tiny_llama")
    plain = sample(model, tokenizer, PROMPT, 20, **HOW)
    own = model.generation_config
    own.top_p, own.min_p, own.repetition_penalty, own.temperature = 0.1, 0.5, 5.0, 0.1
    own.do_sample, own.num_beams, own.no_repeat_ngram_size = True, 3, 1
    own.min_new_tokens, own.max_new_tokens, own.eos_token_id = 5, 3, 77

    assert sample(model, tokenizer, PROMPT, 20, **HOW) == plain
