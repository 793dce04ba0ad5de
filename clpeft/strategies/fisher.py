"""The diagonal of the Fisher information, from gradients of single examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clpeft.models.objective import IGNORED
from clpeft.strategies.per_example import mean_over_examples

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.batch import Batch
    from clpeft.training.run import Run

# what is differentiated: log-likelihoods of a batch's examples [B], and their probabilities [B]
Scored = tuple[Tensor, Tensor]


def fisher_diagonal(
    run: Run, dataset: Dataset, *, kind: str, examples: int, generator: torch.Generator
) -> list[Tensor]:
    """Mean over examples of the squared gradient of each example's log-likelihood.

    The gradients are of single examples, of the pure task loss, and taken without dropout:
    squares of a batch's mean gradient would be smaller by about the batch size.

    Args:
        run: Whose trainable parameters count.
        dataset: Encoded examples.
        kind: `empirical` takes each example's own label; `sampled` one that the model draws;
            `exact` the expectation over the model's labels (classification only). For text the
            log-likelihood is summed over the answer's tokens.
        examples: How many are drawn from the data set, at most.
        generator: Draws the examples and the sampled labels.

    Returns:
        One float32 tensor per entry of `run.trainable`, in its order.

    Source: Kirkpatrick et al. 2017; the kinds after Kunstner et al. 2019, Limitations of the
        empirical Fisher approximation.
    """

    def scored(batch: Batch, seeds: Tensor) -> Iterator[Scored]:
        return _likelihoods(run, batch, kind, seeds)

    return mean_over_examples(
        run, dataset, torch.square, scored, examples=examples, generator=generator
    )


def _likelihoods(run: Run, batch: Batch, kind: str, seeds: Tensor) -> Iterator[Scored]:
    """Log-likelihoods of the examples' labels [B], each with the labels' probabilities [B].

    Args:
        run: Whose model.
        batch: Examples.
        kind: See `fisher_diagonal`.
        seeds: With `sampled`: of what is drawn for each example [B].
    """
    with run.accelerator.autocast():
        outputs = run.objective.forward(run.model, batch)
    logits, labels = run.objective.predicted(outputs, batch)
    scores = torch.log_softmax(logits, dim=-1)
    if kind == "exact":
        weights = scores.detach().exp()
        for label in weights.any(dim=0).nonzero().flatten().tolist():
            # a label that does not compete has probability 0 and a log of minus infinity
            possible = weights[:, label] > 0
            yield scores[:, label].masked_fill(~possible, 0.0), weights[:, label]
        return
    targets = labels
    if kind == "sampled":
        targets = _drawn(scores.detach(), _draws(labels, seeds).to(labels.device))
        targets = targets.masked_fill(labels == IGNORED, IGNORED)
    picked = scores.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    likelihood = picked.masked_fill(targets == IGNORED, 0.0).reshape(len(batch), -1).sum(dim=1)
    yield likelihood, torch.ones_like(likelihood)


def _draws(labels: Tensor, seeds: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) for the targets of a batch, shaped as its labels, in float64.

    The k-th target of an example gets the k-th number of its seed, however the batch is padded.

    Args:
        labels: As the loss sees them, [B] or [B, L]; -100 where there is no target.
        seeds: [B].
    """
    rows = labels.cpu().reshape(len(labels), -1)
    draws = torch.zeros(rows.shape, dtype=torch.float64)
    for row, seed in enumerate(seeds.tolist()):
        own = rows[row] != IGNORED
        draws[row, own] = torch.rand(
            int(own.sum()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    return draws.view(labels.shape)


def _drawn(scores: Tensor, draws: Tensor) -> Tensor:
    """Labels drawn from log-probabilities [..., K] by uniform numbers [...], through the CDF."""
    summed = scores.double().exp().cumsum(dim=-1)
    # what is drawn is below the last sum, whatever that was rounded to
    return torch.searchsorted(summed, (draws * summed[..., -1])[..., None], right=True).squeeze(-1)
