"""What a model answers to encoded examples: the label it chooses, or what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clpeft.evaluation.generation import generate
from clpeft.evaluation.scoring import causal_scorer, seq2seq_scorer
from clpeft.models.objective import Objective, Seq2SeqObjective
from clpeft.streams.batching import Collator, Columns

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase


# the lengths by which examples are put into batches [N], and what answers a batch by its rows
Batchwise = tuple[np.ndarray, Callable[[np.ndarray], Any]]


def classified(
    model: nn.Module,
    collator: Collator,
    examples: Dataset,
    labels: Sequence[int],
    device: torch.device,
) -> Batchwise:
    """Asks a classifier; a batch is answered with the label of the largest logit [B].

    Args:
        model: With a head over the stream's whole label space.
        collator: Makes its batches.
        examples: What it is asked about.
        labels: Those that compete.
        device: Where the model is.
    """
    columns = Columns(examples)
    candidates = torch.tensor(labels, device=device)

    def choose(rows: np.ndarray) -> np.ndarray:
        batch = collator(columns, rows).to(device)
        logits = model(**batch.inputs).logits.float()
        return candidates[logits[:, candidates].argmax(dim=1)].cpu().numpy()

    return columns.lengths, choose


def ranked(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    examples: Dataset,
    candidates: Sequence[Sequence[int]],
) -> Batchwise:
    """Asks a language model; a batch is answered with the number of the likeliest candidate [B].

    Args:
        model: A decoder or an encoder-decoder.
        tokenizer: Its tokenizer.
        objective: Its objective.
        examples: What it is asked about; their own answers are not shown.
        candidates: The tokens of the answers that compete, all different.
    """
    if isinstance(objective, Seq2SeqObjective):
        scorer = seq2seq_scorer(model, tokenizer, objective.start)
    else:
        scorer = causal_scorer(model, tokenizer)
    prompts = _prompts(examples)

    def choose(rows: np.ndarray) -> np.ndarray:
        scores = scorer([prompts[row] for row in rows], candidates)
        return scores.argmax(dim=1).cpu().numpy()

    return _lengths(prompts), choose


def written(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Dataset, limit: int
) -> Batchwise:
    """Asks a language model; a batch is answered with the text that it writes to each, greedily.

    Args:
        model: A decoder or an encoder-decoder.
        tokenizer: Its tokenizer.
        examples: What it is asked about; their own answers are not shown.
        limit: Tokens at most.
    """
    prompts = _prompts(examples)

    def write(rows: np.ndarray) -> list[str]:
        return generate(model, tokenizer, [prompts[row] for row in rows], limit)

    return _lengths(prompts), write


def _prompts(examples: Dataset) -> list[list[int]]:
    rows = examples["input_ids"]
    if "prompt_length" not in examples.column_names:
        return list(rows)
    return [ids[:end] for ids, end in zip(rows, examples["prompt_length"], strict=True)]


def _lengths(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(list(map(len, prompts)))
