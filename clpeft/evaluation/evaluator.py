"""Scores of a model on a task's examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import torch

from clpeft.evaluation.answers import Batchwise, classified, ranked, written
from clpeft.evaluation.generation import exact_match, rouge_l
from clpeft.streams.batching import sorted_batches

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


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
        lengths, choose = classified(run.model, run.collator, examples, labels, run.device)
        wanted = np.array(examples["label"])
        return lengths, lambda rows: choose(rows) == wanted[rows]

    def _ranked(self, examples: Dataset, labels: Sequence[int]) -> Batchwise:
        """An answer counts as right if it is the likeliest of the words that compete."""
        run = self.run
        answers = [run.stream.answers[label] for label in labels]
        # labels of different tasks may share an answer word, which is then one candidate
        candidates = list(dict.fromkeys(answers))
        place = {label: candidates.index(run.stream.answers[label]) for label in labels}
        wanted = np.array([place[label] for label in examples["label"]])
        lengths, choose = ranked(run.model, run.tokenizer, run.objective, examples, candidates)
        return lengths, lambda rows: choose(rows) == wanted[rows]

    def _generated(self, task: EncodedTask) -> Batchwise:
        run = self.run
        references = self._references(task)
        measure = rouge_l if task.task.metric == "rougeL" else exact_match
        limit = self.config.max_new_tokens
        if task.task.labels:
            limit = max(map(len, run.stream.answers))
        lengths, write = written(run.model, run.tokenizer, self.examples(task), limit)

        def score(rows: np.ndarray) -> np.ndarray:
            pairs = zip(rows, write(rows), strict=True)
            return np.array([measure(text, references[row]) for row, text in pairs])

        return lengths, score

    def _references(self, task: EncodedTask) -> list[list[str]]:
        raw = task.task.test if self.config.split == "test" else task.task.validation
        if task.task.labels:
            return [[task.task.answer_words[label]] for label in raw["label"]]
        return list(raw["references"])
