"""Sampled text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from clpeft.models.continuation import continuations

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    count: int,
    *,
    max_new_tokens: int,
    top_k: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Sampled continuations of one prompt.

    The same seed gives the same ones; every source of random numbers is left as it was.

    Args:
        model: A decoder or an encoder-decoder, without dropout.
        tokenizer: Its tokenizer.
        prompt: Token ids.
        count: How many continuations, written side by side.
        max_new_tokens: Where one that does not end is cut.
        top_k: From how many of the likeliest tokens each is drawn.
        temperature: What the logits are divided by.
        seed: Of the draws.

    Returns:
        Token ids of each, the end-of-sequence token included where it was written.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)] * count, device=device)
    end = tokenizer.eos_token_id
    # all that could come from a generation_config.json of the model is said here
    settings: Any = GenerationConfig(
        do_sample=True,
        num_beams=1,
        top_k=top_k,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        temperature=temperature,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        rows = continuations(model, ids, torch.ones_like(ids), settings).tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]
