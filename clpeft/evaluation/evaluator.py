"""Scores of a model on a task's examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import torch

from clpeft.evaluation.generation import exact_match, generate, rouge_l
from clpeft.evaluation.scoring import causal_scorer, seq2seq_scorer
from clpeft.models.objective import Seq2SeqObjective
from clpeft.streams.batching import Columns, sorted_batches

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.tokenize import EncodedTask
    from clpeft.training.run import Run


# the lengths by which examples are put into batches [N], and what scores a batch by its rows
Batchwise = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]


class Evaluator:
    """Scores tasks under the run's scenario and evaluation settings.

    Args:
        run: The run whose model is scored.
        task_id_given: Whether the task's identity is known at evaluation: in the task-incremental
            scenario, and for strategies that need it.
    """

    def __init__(self, run: Run, task_id_given: bool) -> None:
        self.run = run
        self.config = run.config.evaluation
        self.task_id_given = task_id_given

    def examples(self, task: EncodedTask) -> Dataset:
        """The encoded examples that a task is scored on."""
        return task.test if self.config.split == "test" else task.validation

    def tasks_of_row(self, trained: int) -> Sequence[EncodedTask]:
        """The tasks in row `trained` of the matrix: those seen so far, and the next if asked for.

        Row 0, of the untrained model, has all.
        """
        tasks = self.run.stream.tasks
        return tasks[: trained + self.config.ahead] if trained else tasks

    @torch.inference_mode()
    def score(
        self, task: EncodedTask, seen: int, between: Callable[[], None] = lambda: None
    ) -> float:
        """Scores one task; several processes share its examples.

        Args:
            task: The task.
            seen: How many tasks were trained, which decides what labels compete.
            between: Called between batches; what it raises ends the scoring, and the model is
                left as it was.

        Returns:
            The mean score over its examples, 0 to 1.
        """
        run = self.run
        training = run.model.training
        run.model.eval()
        try:
            with ExitStack() as stack:
                for strategy in run.acting:
                    stack.enter_context(
                        strategy.evaluating(run, task if self.task_id_given else None)
                    )
                stack.enter_context(run.accelerator.autocast())
                scores = self._scores(task, seen, between)
        finally:
            run.model.train(training)
        return float(scores.mean(dtype=np.float64))

    def _scores(self, task: EncodedTask, seen: int, between: Callable[[], None]) -> np.ndarray:
        """The score of each example [N], in the data set's order."""
        labels = self.run.stream.stream.candidates(task.index, seen, self.task_id_given)
        examples = self.examples(task)
        if self.run.config.model.task_type == "sequence_classification":
            lengths, scorer = self._classified(examples, labels)
        elif task.task.labels and self.config.mode == "rank":
            lengths, scorer = self._ranked(examples, labels)
        else:
            lengths, scorer = self._generated(task)
        run = self.run
        scores = np.zeros(len(examples))
        for indices in sorted_batches(lengths, self.config.batch_size)[run.rank :: run.world_size]:
            scores[indices] = scorer(indices)
            between()
        return run.summed(scores)

    def _classified(self, examples: Dataset, labels: Sequence[int]) -> Batchwise:
        run = self.run
        columns = Columns(examples)
        candidates = torch.tensor(labels, device=run.device)

        def score(indices: np.ndarray) -> np.ndarray:
            batch = run.collator(columns, indices).to(run.device)
            logits = run.model(**batch.inputs).logits.float()
            predicted = candidates[logits[:, candidates].argmax(dim=1)]
            return (predicted == batch.labels).cpu().numpy()

        return columns.lengths, score

    def _ranked(self, examples: Dataset, labels: Sequence[int]) -> Batchwise:
        """An answer counts as right if it is the likeliest of the words that compete."""
        run = self.run
        answers = [run.stream.answers[label] for label in labels]
        # labels of different tasks may share an answer word, which is then one candidate
        candidates = list(dict.fromkeys(answers))
        wanted = {label: candidates.index(run.stream.answers[label]) for label in labels}
        if isinstance(run.objective, Seq2SeqObjective):
            scorer = seq2seq_scorer(run.model, run.tokenizer, run.objective.start)
        else:
            scorer = causal_scorer(run.model, run.tokenizer)
        prompts = self._prompts(examples)
        targets = np.array([wanted[label] for label in examples["label"]])

        def score(indices: np.ndarray) -> np.ndarray:
            scores = scorer([prompts[i] for i in indices], candidates)
            return scores.argmax(dim=1).cpu().numpy() == targets[indices]

        return _lengths(prompts), score

    def _generated(self, task: EncodedTask) -> Batchwise:
        run = self.run
        examples = self.examples(task)
        prompts = self._prompts(examples)
        references = self._references(task)
        measure = rouge_l if task.task.metric == "rougeL" else exact_match
        limit = self.config.max_new_tokens
        if task.task.labels:
            limit = max(map(len, run.stream.answers))

        def score(indices: np.ndarray) -> np.ndarray:
            texts = generate(run.model, run.tokenizer, [prompts[i] for i in indices], limit)
            pairs = zip(indices, texts, strict=True)
            return np.array([measure(text, references[i]) for i, text in pairs])

        return _lengths(prompts), score

    def _prompts(self, examples: Dataset) -> list[list[int]]:
        rows = examples["input_ids"]
        if "prompt_length" not in examples.column_names:
            return list(rows)
        return [ids[:end] for ids, end in zip(rows, examples["prompt_length"], strict=True)]

    def _references(self, task: EncodedTask) -> list[list[str]]:
        raw = task.task.test if self.config.split == "test" else task.task.validation
        if task.task.labels:
            return [[task.task.answer_words[label]] for label in raw["label"]]
        return list(raw["references"])


def _lengths(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(list(map(len, prompts)))
