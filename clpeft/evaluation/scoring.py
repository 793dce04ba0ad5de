"""Log-likelihoods of candidate answers, all candidates of a batch in one pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.models.attention import attention_span
from clpeft.models.objective import (
    IGNORED,
    beneath_adapter,
    shift_right,
    takes_logits_to_keep,
)
from clpeft.models.virtual_tokens import reads_prefix, virtual_tokens, widened

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# scores(prompts, candidates) -> log-likelihood of each candidate after each prompt, [B, C] in nats
Scorer = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Tensor]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, L] with the rows' ends aligned."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def right_padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Token ids [B, L] with the rows' beginnings aligned."""
    length = max(map(len, rows))
    return torch.tensor([list(row) + [pad] * (length - len(row)) for row in rows])


def causal_scorer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """How candidates are scored by a decoder: packed where its attention takes a mask of ours.

    That is not so where distance is not told by position ids (ALiBi), where layers carry a state
    from token to token, where an adapter has virtual tokens to put before the prompts, or beyond
    the span of local attention, which a mask of ours would widen.
    """
    span = _packed_span(model)
    keeps = takes_logits_to_keep(model)
    pad = int(tokenizer.pad_token_id)

    def score(prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, prompts)) + max(map(len, candidates))
        if longest <= span:
            return packed_scores(model, prompts, candidates, pad=pad, keeps_logits=keeps)
        return expanded_scores(model, prompts, candidates, pad=pad)

    return score


def _packed_span(model: nn.Module) -> float:
    """How many tokens a decoder reads under an attention mask of ours; 0 if it takes none."""
    from transformers import PreTrainedModel

    base = beneath_adapter(model)
    if not isinstance(base, PreTrainedModel):
        return 0
    described = base.config.get_text_config().to_dict()
    packs = (
        "position_ids" in inspect.signature(base.forward).parameters
        and base.config._attn_implementation in ("eager", "sdpa")
        and not described.get("alibi")
        and not base._is_stateful
        and not virtual_tokens(model)
    )
    return attention_span(model) if packs else 0


def packed_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    *,
    pad: int,
    keeps_logits: bool,
) -> Tensor:
    """Scores candidates behind one copy of each prompt.

    The candidates stand one after another behind the prompt; the attention mask lets each see the
    prompt and itself only, and its positions count on from the prompt's end, so that the model
    computes what it would for prompt + candidate alone.

    Args:
        model: A decoder that takes a 4-D attention mask and position ids.
        prompts: Token ids, B rows.
        candidates: Token ids, C rows.
        pad: The padding id.
        keeps_logits: Whether the model takes `logits_to_keep`.

    Returns:
        Summed log-likelihoods [B, C], in nats.
    """
    device = next(model.parameters()).device
    ids, seen = left_padded(prompts, pad)
    rows, width = ids.shape
    # a candidate's last token is predicted but never read
    read = [list(candidate[:-1]) for candidate in candidates]
    tail = torch.tensor([token for tokens in read for token in tokens], dtype=torch.long)
    owner = torch.tensor([c for c, tokens in enumerate(read) for _ in tokens], dtype=torch.long)
    offset = torch.tensor([k for tokens in read for k in range(len(tokens))], dtype=torch.long)
    lengths = seen.sum(dim=1, keepdim=True)
    positions = torch.cat([(seen.cumsum(dim=1) - 1).clamp(min=0), lengths + offset], dim=1)
    total = width + len(tail)
    visible = torch.zeros(rows, total, total, dtype=torch.bool)
    visible[:, :width, :width] = torch.tril(torch.ones(width, width, dtype=torch.bool))
    visible[:, :, :width] &= seen.bool()[:, None, :]
    visible[:, width:, :width] = seen.bool()[:, None, :]
    visible[:, width:, width:] = (owner[:, None] == owner[None, :]) & (
        offset[:, None] >= offset[None, :]
    )
    # a padding row sees itself, so that its softmax is defined; nobody reads what it computes
    diagonal = torch.arange(total)
    visible[:, diagonal, diagonal] = True
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    kept = len(tail) + 1
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([ids, tail.expand(rows, -1)], dim=1).to(device),
        "attention_mask": bias[:, None].to(device),
        "position_ids": positions.to(device),
        "use_cache": False,
    }
    if keeps_logits:
        inputs["logits_to_keep"] = kept
    logits = model(**inputs).logits[:, -kept:].float()
    scores = torch.log_softmax(logits, dim=-1)
    # column 0 is the prompt's last token, which predicts every candidate's first
    starts = torch.tensor([0] + [len(tokens) for tokens in read]).cumsum(0)[:-1] + 1
    columns, targets, owners = [], [], []
    for c, candidate in enumerate(candidates):
        columns += [0, *range(int(starts[c]), int(starts[c]) + len(candidate) - 1)]
        targets += list(candidate)
        owners += [c] * len(candidate)
    picked = scores[:, columns, targets]
    index = torch.tensor(owners, device=device).expand(rows, -1)
    return picked.new_zeros(rows, len(candidates)).scatter_add_(1, index, picked)


def expanded_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    *,
    pad: int,
) -> Tensor:
    """Scores candidates each behind its own copy of the prompt, for any causal model.

    Args:
        model: A decoder.
        prompts: Token ids, B rows.
        candidates: Token ids, C rows.
        pad: The padding id.

    Returns:
        Summed log-likelihoods [B, C], in nats.
    """
    device = next(model.parameters()).device
    scores = []
    for candidate in candidates:  # one at a time: the logits of all would not fit
        rows = [[*prompt, *candidate] for prompt in prompts]
        targets = [[IGNORED] * (len(prompt) - 1) + list(candidate) for prompt in prompts]
        ids = right_padded(rows, pad).to(device)
        mask = right_padded([[1] * len(row) for row in rows], 0).to(device)
        labels = right_padded(targets, IGNORED).to(device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] : -1].float()
        scores.append(_summed(logits, labels))
    return torch.stack(scores, dim=1)


def seq2seq_scorer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, start: int) -> Scorer:
    """How candidates are scored by an encoder-decoder: each prompt is encoded once."""
    base, pad = beneath_adapter(model), int(tokenizer.pad_token_id)

    def score(prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        device = next(model.parameters()).device
        ids = right_padded(prompts, pad).to(device)
        mask = right_padded([[1] * len(row) for row in prompts], 0).to(device)
        first = torch.full_like(ids[:, :1], start)
        # the model as a whole, so that its adapter puts before the prompts what belongs there
        encoded = model(input_ids=ids, attention_mask=mask, decoder_input_ids=first)
        hidden = encoded.encoder_last_hidden_state
        mask = widened(mask, hidden.shape[1] - ids.shape[1])
        count = len(candidates)
        labels = right_padded(candidates, IGNORED).to(device).repeat(len(prompts), 1)
        hidden = hidden.repeat_interleave(count, dim=0)
        outputs = base(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=mask.repeat_interleave(count, dim=0),
            decoder_input_ids=shift_right(labels, start, pad),
            **_decoders_prefix(model, len(labels)),
        )
        return _summed(outputs.logits.float(), labels).view(len(prompts), count)

    return score


def _decoders_prefix(model: Any, rows: int) -> dict[str, Any]:
    """What the decoder reads before what it writes, where an adapter has learned that."""
    return {"past_key_values": model.get_prompt(rows)} if reads_prefix(model) else {}


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-likelihood of the labels of each row [B]; -100 counts nothing."""
    scores = torch.log_softmax(logits, dim=-1)
    picked = scores.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return picked.masked_fill(labels == IGNORED, 0.0).sum(dim=1)
