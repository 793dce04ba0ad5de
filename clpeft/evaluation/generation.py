"""Greedy decoding and the comparison of what was written with what was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clpeft.evaluation.scoring import left_padded, right_padded
from clpeft.models.continuation import continuations

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of prompts.

    Args:
        model: A decoder or an encoder-decoder.
        tokenizer: Its tokenizer.
        prompts: Token ids, one row each.
        max_new_tokens: Where an answer is cut.

    Returns:
        The texts, without special tokens, stripped.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad = int(tokenizer.pad_token_id)
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        ids = right_padded(prompts, pad)
        mask = right_padded([[1] * len(row) for row in prompts], 0)
    else:
        ids, mask = left_padded(prompts, pad)
    settings: Any = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    written = continuations(model, ids.to(device), mask.to(device), settings)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [text.strip() for text in texts]


def exact_match(written: str, references: Sequence[str]) -> float:
    """1 if what was written is one of the references, case and spacing aside; else 0."""
    plain = " ".join(written.lower().split())
    return float(any(plain == " ".join(reference.lower().split()) for reference in references))


def rouge_l(written: str, references: Sequence[str]) -> float:
    """The best ROUGE-L F-measure over the references, with stemming (Lin 2004), 0 to 1."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return max(scorer.score(reference, written)["rougeL"].fmeasure for reference in references)
