"""Scores of a model on a task's examples."""

from __future__ import annotations

from collections.abc import Sequence
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

    def row(self, trained: int) -> list[float | None]:
        """Row `trained` of the matrix: every task seen so far, and the next if asked for."""
        tasks = self.run.stream.tasks
        ahead = trained + 1 if self.config.ahead else trained
        if trained == 0:
            ahead = len(tasks)
        return [self.score(task, trained) if i < ahead else None for i, task in enumerate(tasks)]

    @torch.inference_mode()
    def score(self, task: EncodedTask, seen: int) -> float:
        """Scores one task.

        Args:
            task: The task.
            seen: How many tasks were trained, which decides what labels compete.

        Returns:
            The mean score over its examples, 0 to 1.
        """
        run = self.run
        training = run.model.training
        run.model.eval()
        try:
            with ExitStack() as stack:
                for strategy in run.strategies:
                    stack.enter_context(
                        strategy.evaluating(run, task if self.task_id_given else None)
                    )
                stack.enter_context(run.accelerator.autocast())
                scores = self._scores(task, seen)
        finally:
            run.model.train(training)
        return float(scores.mean(dtype=np.float64))

    def _scores(self, task: EncodedTask, seen: int) -> np.ndarray:
        """The score of each example [N], in the data set's order."""
        labels = self.run.stream.stream.candidates(task.index, seen, self.task_id_given)
        if self.run.config.model.task_type == "sequence_classification":
            return self._classified(self.examples(task), labels)
        if task.task.labels and self.config.mode == "rank":
            return self._ranked(self.examples(task), labels)
        return self._generated(task)

    def _classified(self, examples: Dataset, labels: Sequence[int]) -> np.ndarray:
        run = self.run
        columns = Columns(examples)
        correct = np.zeros(len(examples))
        candidates = torch.tensor(labels, device=run.device)
        for indices in sorted_batches(columns.lengths, self.config.batch_size):
            batch = run.collator(columns, indices).to(run.device)
            logits = run.model(**batch.inputs).logits.float()
            predicted = candidates[logits[:, candidates].argmax(dim=1)]
            correct[indices] = (predicted == batch.labels).cpu().numpy()
        return correct

    def _ranked(self, examples: Dataset, labels: Sequence[int]) -> np.ndarray:
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
        correct = np.zeros(len(prompts))
        for indices in sorted_batches(np.array(list(map(len, prompts))), self.config.batch_size):
            scores = scorer([prompts[i] for i in indices], candidates)
            correct[indices] = scores.argmax(dim=1).cpu().numpy() == targets[indices]
        return correct

    def _generated(self, task: EncodedTask) -> np.ndarray:
        run = self.run
        examples = self.examples(task)
        prompts = self._prompts(examples)
        references = self._references(task)
        measure = rouge_l if task.task.metric == "rougeL" else exact_match
        limit = self.config.max_new_tokens
        if task.task.labels:
            limit = max(map(len, run.stream.answers))
        scores = np.zeros(len(prompts))
        for indices in sorted_batches(np.array(list(map(len, prompts))), self.config.batch_size):
            texts = generate(run.model, run.tokenizer, [prompts[i] for i in indices], limit)
            for i, text in zip(indices, texts, strict=True):
                scores[i] = measure(text, references[i])
        return scores

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
