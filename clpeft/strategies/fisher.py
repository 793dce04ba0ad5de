"""The diagonal of the Fisher information, from per-example gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.models.objective import IGNORED
from clpeft.streams.batching import Batch, Columns

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.training.run import Run


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
    parameters = list(run.trainable.values())
    fisher = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    chosen = torch.randperm(len(dataset), generator=generator)[:examples].numpy()
    columns = Columns(dataset)
    with run.eval_mode():
        for number, index in enumerate(chosen):
            batch = run.batch(columns, [int(index)])
            draws = torch.rand(batch.labels.shape, generator=generator, dtype=torch.float64)
            if number % run.world_size != run.rank:
                continue  # another process's, which draws the same numbers
            for weight, gradient in _score_functions(run, batch, kind, draws):
                squared = torch._foreach_mul(gradient, gradient)
                torch._foreach_add_(fisher, squared, alpha=weight / len(chosen))
    return run.sum_gradients(fisher)


def _score_functions(
    run: Run, batch: Batch, kind: str, draws: Tensor
) -> list[tuple[float, list[Tensor]]]:
    """Gradients of one example's log-likelihood, each with its probability.

    Args:
        run: Whose model.
        batch: One example.
        kind: See `fisher_diagonal`.
        draws: Uniform in [0, 1), one for each of the batch's labels.
    """
    with run.accelerator.autocast():
        outputs = run.objective.forward(run.model, batch)
    logits, labels = run.objective.predicted(outputs, batch)
    scores = torch.log_softmax(logits, dim=-1)
    if kind == "exact":
        weights = scores[0].detach().exp()
        possible = [label for label in range(len(weights)) if weights[label] > 0]
        return [
            (float(weights[label]), _gradient(run, scores[0, label], label != possible[-1]))
            for label in possible
        ]
    targets = labels
    if kind == "sampled":
        targets = _drawn(scores.detach(), draws.to(labels.device)[..., -labels.shape[-1] :])
        targets = targets.masked_fill(labels == IGNORED, IGNORED)
    picked = scores.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    likelihood = picked.masked_fill(targets == IGNORED, 0.0).sum()
    return [(1.0, _gradient(run, likelihood, False))]


def _drawn(scores: Tensor, draws: Tensor) -> Tensor:
    """Labels drawn from log-probabilities [..., K] by uniform numbers [...], through the CDF."""
    summed = scores.double().exp().cumsum(dim=-1)
    # what is drawn is below the last sum, whatever that was rounded to
    return torch.searchsorted(summed, (draws * summed[..., -1])[..., None], right=True).squeeze(-1)


def _gradient(run: Run, likelihood: Tensor, retain_graph: bool) -> list[Tensor]:
    parameters = list(run.trainable.values())
    found: Any = torch.autograd.grad(
        likelihood, parameters, allow_unused=True, retain_graph=retain_graph
    )
    return [
        torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
        for p, g in zip(parameters, found, strict=True)
    ]
