"""Likelihoods of candidate answers: every short cut against one candidate at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from clpeft.evaluation import scoring
from clpeft.evaluation.scoring import (
    causal_scorer,
    expanded_scores,
    left_padded,
    packed_scores,
    right_padded,
    seq2seq_scorer,
)

VOCABULARY = 40
TOKENIZER: Any = SimpleNamespace(pad_token_id=0)
# ragged prompts, one of a single token; candidates of one to four tokens, two with one beginning
PROMPTS = [[3, 9, 27, 4, 12, 36, 31, 16, 8], [24], [22, 7, 21, 13, 39], list(range(30, 16, -1))]
CANDIDATES = [[5], [6, 7, 2], [8, 9], [6, 7, 3, 4]]

# float32 logits of size 10 or so, summed in another order
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}

LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = {**LAYERS, "num_key_value_heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "gpt2": GPT2,
    "gpt_neox": LAYERS,
    "qwen3": {**GROUPED, "head_dim": 4},
    "opt": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 32,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
    # layers that look back over four tokens only
    "mistral": {**GROUPED, "sliding_window": 4},
    "gemma2": {**GROUPED, "head_dim": 4, "sliding_window": 4},
    "gemma3_text": {**GROUPED, "head_dim": 4, "sliding_window": 4},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 64,
    },
    # distances told by ALiBi, not by position ids
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
}
PACKABLE = ("llama", "gpt2", "gpt_neox", "qwen3", "opt")


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """A model in evaluation mode whose every weight matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.4, generator=generator)
    return model.eval()


def decoder(kind: str) -> PreTrainedModel:
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **DECODERS[kind], **special)
    return randomised(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def one_at_a_time(
    model: Any, prompts: Sequence[list[int]], candidates: Sequence[list[int]]
) -> Tensor:
    """log p(candidate | prompt) by its definition: a whole forward pass for every token."""
    scores = torch.zeros(len(prompts), len(candidates))
    for b, prompt in enumerate(prompts):
        for c, candidate in enumerate(candidates):
            for k, token in enumerate(candidate):
                before = torch.tensor([[*prompt, *candidate[:k]]])
                last = model(input_ids=before).logits[0, -1].float()
                scores[b, c] += torch.log_softmax(last, dim=-1)[token]
    return scores


@pytest.mark.parametrize("kind", PACKABLE)
@torch.no_grad()
def test_packed_and_expanded_are_one_at_a_time(kind: str) -> None:
    model = decoder(kind)
    expected = one_at_a_time(model, PROMPTS, CANDIDATES)

    # the candidates' likelihoods differ by far more than the tolerance
    assert expected.std() > 1.0
    for keeps in (True, False):
        packed = packed_scores(model, PROMPTS, CANDIDATES, pad=0, keeps_logits=keeps)
        torch.testing.assert_close(packed, expected, **TOLERANCE)
    expanded = expanded_scores(model, PROMPTS, CANDIDATES, pad=0)
    torch.testing.assert_close(expanded, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_scorer_of_every_architecture(kind: str) -> None:
    model = decoder(kind)
    score = causal_scorer(model, TOKENIZER)

    torch.testing.assert_close(
        score(PROMPTS, CANDIDATES), one_at_a_time(model, PROMPTS, CANDIDATES), **TOLERANCE
    )


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_packs_wherever_it_may(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> Tensor:
        raise AssertionError

    forbidden = "expanded_scores" if kind in PACKABLE else "packed_scores"
    monkeypatch.setattr(scoring, forbidden, refuse)

    causal_scorer(decoder(kind), TOKENIZER)(PROMPTS, CANDIDATES)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
@torch.no_grad()
def test_packs_within_the_span_of_local_attention(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(scoring, "expanded_scores")
    model = decoder(kind)
    prompts, candidates = [[3, 9], [24]], [[5], [8, 9]]  # four tokens at most

    torch.testing.assert_close(
        causal_scorer(model, TOKENIZER)(prompts, candidates),
        one_at_a_time(model, prompts, candidates),
        **TOLERANCE,
    )


@torch.no_grad()
def test_single_tokens_need_no_room_behind_the_prompt() -> None:
    model = decoder("llama")
    candidates = [[5], [9], [30]]

    packed = packed_scores(model, PROMPTS, candidates, pad=0, keeps_logits=True)

    torch.testing.assert_close(packed, one_at_a_time(model, PROMPTS, candidates), **TOLERANCE)


@torch.no_grad()
def test_candidates_do_not_see_each_other() -> None:
    model = decoder("gpt2")
    alone = [packed_scores(model, PROMPTS, [c], pad=0, keeps_logits=True) for c in CANDIDATES]

    together = packed_scores(model, PROMPTS, CANDIDATES, pad=0, keeps_logits=True)

    torch.testing.assert_close(together, torch.cat(alone, dim=1), **TOLERANCE)


@torch.no_grad()
def test_adapters_take_part() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        decoder("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    )
    plain = causal_scorer(model, TOKENIZER)(PROMPTS, CANDIDATES)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.5)
    model.eval()
    adapted = causal_scorer(model, TOKENIZER)(PROMPTS, CANDIDATES)

    torch.testing.assert_close(adapted, one_at_a_time(model, PROMPTS, CANDIDATES), **TOLERANCE)
    assert (adapted - plain).abs().max() > 0.1


def encoder_decoder(kind: str) -> PreTrainedModel:
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2}
    if kind == "t5":
        settings: dict[str, Any] = {
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        }
    else:
        settings = {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        }
    config = AutoConfig.for_model(kind, **settings, **special)
    return randomised(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@torch.no_grad()
def test_seq2seq_is_one_at_a_time(kind: str) -> None:
    model = encoder_decoder(kind)
    start = model.config.decoder_start_token_id
    expected = torch.zeros(len(PROMPTS), len(CANDIDATES))
    for b, prompt in enumerate(PROMPTS):
        for c, candidate in enumerate(CANDIDATES):
            for k, token in enumerate(candidate):
                logits = model(
                    input_ids=torch.tensor([prompt]),
                    decoder_input_ids=torch.tensor([[start, *candidate[:k]]]),
                ).logits
                expected[b, c] += torch.log_softmax(logits[0, -1].float(), dim=-1)[token]

    found = seq2seq_scorer(model, TOKENIZER, start)(PROMPTS, CANDIDATES)

    assert expected.std() > 1.0
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_padding() -> None:
    ids, mask = left_padded([[1, 2, 3], [4]], 9)

    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert right_padded([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
