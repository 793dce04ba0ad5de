"""The short language-model training that gives a base model built here something to adapt.

A decoder learns what comes next in the running text. An encoder and an encoder-decoder are shown
texts without their ends: the one tells the words that are masked, and from its first token, which
a classifier reads, how the text ends; the other writes the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from clpeft.config import WarmupConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MASKED_SHARE = 0.15  # of tokens, in masked-language modelling (Devlin et al. 2019)
IGNORED = -100  # the label of what is not asked

Draw = Callable[[torch.Generator], Tensor]  # the loss on a batch drawn at random


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    config: WarmupConfig,
) -> None:
    """Trains all of a model's weights on texts, by AdamW with a linear decay.

    Args:
        model: A decoder, a masked-language model or an encoder-decoder; left in eval mode.
        tokenizer: Its tokenizer, which puts a first token before each text.
        texts: What it learns the language from.
        config: Steps, batch size, length in tokens, learning rate and the seed of what is drawn.
    """
    draw = _objective(model, tokenizer, tokenizer(texts)["input_ids"], config)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - step / max(config.steps, 1))
    )
    model.train()
    for _ in range(config.steps):
        draw(generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _objective(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[list[int]],
    config: WarmupConfig,
) -> Draw:
    """What a model of this family is trained to do; `texts` are token ids."""
    worded = [ids for ids in texts if len(ids) > 1]
    if model.config.is_encoder_decoder:
        return lambda draw: continuation_loss(model, tokenizer, *_passages(worded, config, draw))
    if type(model).__name__.endswith("ForMaskedLM"):
        return lambda draw: masked_loss(model, tokenizer, *_passages(worded, config, draw), draw)
    running = torch.tensor([i for ids in texts for i in (*ids, tokenizer.eos_token_id)])
    crop = torch.arange(config.length)

    def causal_loss(draw: torch.Generator) -> Tensor:
        last = max(len(running) - config.length, 1)
        starts = torch.randint(last, (config.batch_size, 1), generator=draw)
        block = running[(starts + crop) % len(running)]
        return model(input_ids=block, labels=block).loss

    return causal_loss


def _passages(
    texts: list[list[int]], config: WarmupConfig, draw: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """Texts drawn at random, each without its last token, and those last tokens [B].

    Of a text that is longer than `length` tokens it is a stretch, behind the text's first token.
    """
    passages, ends = [], []
    for number in torch.randint(len(texts), (config.batch_size,), generator=draw).tolist():
        first, *words = texts[number]
        spare = len(words) - (config.length - 1)
        start = int(torch.randint(spare + 1, (), generator=draw)) if spare > 0 else 0
        *words, end = words[start : start + config.length - 1]
        passages.append(torch.tensor([first, *words]))
        ends.append(end)
    return passages, torch.tensor(ends)


def _padded(sequences: list[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Sequences of tokens in one [B, L], and which of its places they fill, bool [B, L]."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    block = pad_sequence(sequences, batch_first=True, padding_value=padding)
    return block, torch.arange(block.shape[1]) < lengths[:, None]


def masked_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    passages: list[Tensor],
    ends: Tensor,
    draw: torch.Generator,
) -> Tensor:
    """The surprise at masked tokens, and that of the first token at how each text ends.

    Masked tokens alone ask nothing of the first one, from which a classifier reads. (BERT has it
    tell which sentence follows, for the same reason; Gao & Callan 2021, Condenser, masked tokens.)
    """
    block, real = _padded(passages, tokenizer.pad_token_id)
    masked = (torch.rand(block.shape, generator=draw) < MASKED_SHARE) & real
    masked[:, 0] = False
    given = block.masked_fill(masked, tokenizer.mask_token_id)
    logits = model(input_ids=given, attention_mask=real.long()).logits
    surprise = cross_entropy(logits[masked], block[masked], reduction="sum")
    return surprise / masked.sum().clamp(min=1) + cross_entropy(logits[:, 0], ends)


def continuation_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    passages: list[Tensor],
    ends: Tensor,
) -> Tensor:
    """The surprise at the rest of each text, given its beginning (Raffel et al. 2020, §3.2).

    One text in four is cut in the middle; of the others the rest is how it ends, as in an answer.
    """
    beginnings, rests = [], []
    for row, (passage, end) in enumerate(zip(passages, ends, strict=True)):
        cut = (len(passage) + 1) // 2 if row % 4 == 3 else len(passage)
        beginnings.append(passage[:cut])
        rests.append(torch.cat([passage[cut:], end[None]]))
    block, real = _padded(beginnings, tokenizer.pad_token_id)
    labels, _ = _padded(rests, IGNORED)
    return model(input_ids=block, attention_mask=real.long(), labels=labels).loss
