"""Readings: what the model makes of examples, in one pass without gradients and dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clpeft.evaluation.scoring import causal_scorer, seq2seq_scorer
from clpeft.models.objective import IGNORED, CausalObjective, Seq2SeqObjective
from clpeft.strategies.selection import entropy
from clpeft.streams.batching import Columns, sorted_batches

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


def read(run: Run, dataset: Dataset, reading: Callable[[Batch], Tensor]) -> list[Tensor]:
    """What a reading finds for each example of a data set.

    Several processes share the work, and all of them get everything.

    Args:
        run: Whose model reads.
        dataset: Encoded examples.
        reading: Runs the model on a batch; gives one row per example, [B, ...].

    Returns:
        One tensor per example, whose size may hang on its batch's width: [...] each, on the CPU,
        in the data set's order.
    """
    columns = Columns(dataset)
    batches = sorted_batches(columns.lengths, run.config.training.batch_size)
    found: list[tuple[np.ndarray, Tensor]] = []
    with run.eval_mode(), torch.no_grad():
        for rows in batches[run.rank :: run.world_size]:
            with run.accelerator.autocast():
                values = reading(run.batch(columns, rows))
            # a copy, since a view would take all that it looks at to the other processes
            found.append((rows, values.cpu().clone()))
    everywhere = [pair for part in run.gathered(found) for pair in part]
    by_row = {
        row: value
        for rows, values in everywhere
        for row, value in zip(rows.tolist(), values, strict=True)
    }
    return [by_row[row] for row in range(len(columns))]


def features(run: Run, dataset: Dataset) -> Tensor:
    """Mean hidden states of the last layer over each input: [N, D] in float32."""
    return _stacked(read(run, dataset, lambda batch: run.objective.features(run.model, batch)))


def uncertainty(run: Run, dataset: Dataset) -> Tensor:
    """How unsure the model is of its answers, in nats: [N].

    The entropy over the labels that compete; of a language model over its vocabulary, the mean
    over the answer's tokens.
    """

    def mean_entropy(batch: Batch) -> Tensor:
        outputs = run.objective.forward(run.model, batch)
        logits, labels = run.objective.predicted(outputs, batch)
        counted = (labels != IGNORED).view(len(batch), -1)
        entropies = entropy(logits).view(len(batch), -1).masked_fill(~counted, 0.0)
        return entropies.sum(dim=1) / counted.sum(dim=1)

    return _stacked(read(run, dataset, mean_entropy))


def losses(run: Run, dataset: Dataset) -> Tensor:
    """Negative log-likelihood of each example's answer, summed over its tokens, in nats: [N]."""

    def loss(batch: Batch) -> Tensor:
        return run.per_example_loss(batch, run.objective.forward(run.model, batch))

    return _stacked(read(run, dataset, loss))


def _stacked(rows: list[Tensor]) -> Tensor:
    """Rows as one tensor; of none an empty one, as where no example was admitted."""
    return torch.stack(rows) if rows else torch.zeros(0)


def answer_probabilities(run: Run, task: EncodedTask, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """How likely the model holds each answer to an example of a classification task.

    Args:
        run: Whose model is asked.
        task: The task, one with labels.
        dataset: Encoded examples of it.

    Returns:
        The probability of each answer that competes, [N, C] in float32, adding up to 1; and which
        of them is the example's own, [N] int64.
    """
    stream = run.stream.stream
    given = stream.scenario == "task"
    candidates = stream.candidates(task.index, run.tasks_seen, given)
    if run.config.model.task_type == "sequence_classification":
        scores = _head_scores(run, candidates)
        place = {label: index for index, label in enumerate(candidates)}
    else:
        # labels of different tasks may share an answer, which is then one candidate
        answers = list(dict.fromkeys(run.stream.answers[label] for label in candidates))
        scores = _answer_scores(run, answers)
        place = {label: answers.index(run.stream.answers[label]) for label in candidates}
    found = torch.stack(read(run, dataset, lambda batch: scores(batch).float().softmax(dim=1)))
    return found, torch.tensor([place[label] for label in dataset["label"]])


def _head_scores(run: Run, candidates: Sequence[int]) -> Callable[[Batch], Tensor]:
    """The logits of the labels that compete, [B, C]."""
    chosen = torch.tensor(candidates, device=run.device)
    return lambda batch: run.model(**batch.inputs).logits[:, chosen]


def _answer_scores(run: Run, answers: Sequence[Sequence[int]]) -> Callable[[Batch], Tensor]:
    """The log-likelihoods of the answers that compete, [B, C]."""
    if isinstance(run.objective, Seq2SeqObjective):
        scorer = seq2seq_scorer(run.model, run.tokenizer, run.objective.start)
    else:
        scorer = causal_scorer(run.model, run.tokenizer)

    def scores(batch: Batch) -> Tensor:
        asked = batch.inputs["attention_mask"].bool()
        if isinstance(run.objective, CausalObjective):
            asked = asked & (batch.labels == IGNORED)
        rows = zip(batch.inputs["input_ids"], asked, strict=True)
        return scorer([ids[own].tolist() for ids, own in rows], answers)

    return scores


def num_targets(dataset: Dataset) -> Tensor:
    """What each example's loss is a sum over: 1 for a head, or its answer's tokens: [N]."""
    columns = Columns(dataset)
    if "prompt_length" in columns.numbers:
        return torch.from_numpy(columns.lengths - columns.numbers["prompt_length"])
    if "labels" in columns.ragged:
        return torch.from_numpy(columns.ragged["labels"].lengths)
    return torch.ones(len(columns))


def classes(dataset: Dataset) -> np.ndarray:
    """The class of each example [N]: its global label; generation tasks are a class each."""
    table = dataset.with_format("arrow")[:]
    labels, tasks = (table[name].to_numpy() for name in ("label", "task_id"))
    return np.where(labels >= 0, labels, -1 - tasks)
