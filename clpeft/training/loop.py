"""The training loop: one task after another, each hook in its place."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.strategies.base import with_hook
from clpeft.training.adapters import save_adapter
from clpeft.training.optim import make_optimizer, make_schedule

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.evaluation.evaluator import Evaluator
    from clpeft.stopping import StopRequests
    from clpeft.streams.batching import Batch
    from clpeft.streams.tokenize import EncodedTask
    from clpeft.tracking.base import Observer
    from clpeft.training.checkpoint import Checkpoints
    from clpeft.training.cost import Cost
    from clpeft.training.run import Run

log = logging.getLogger(__name__)


class Loop:
    """Trains a run through its stream and fills the matrix.

    Args:
        run: What is trained.
        evaluator: Scores the tasks.
        observer: Is told what happens; never changes it.
        checkpoints: Where the state at task boundaries is kept.
        cost: Adds up time, steps and memory.
        stop: Whether the process was asked to stop.

    Attributes:
        matrix: `matrix[t][i]` is the score on task i after t tasks; None where not evaluated.
    """

    def __init__(
        self,
        run: Run,
        evaluator: Evaluator,
        observer: Observer,
        checkpoints: Checkpoints,
        cost: Cost,
        stop: StopRequests,
    ) -> None:
        self.run = run
        self.evaluator = evaluator
        self.observer = observer
        self.checkpoints = checkpoints
        self.cost = cost
        self.stop = stop
        self.matrix: list[list[float | None]] = []
        self.skipped = 0  # tasks whose training a strategy left to a later one, as `joint` does
        self.gradient_makers = with_hook(run.strategies, "compute_gradients")
        self.transformers = with_hook(run.strategies, "transform_gradients")
        self.batchers = with_hook(run.strategies, "transform_batch")
        self.terms = with_hook(run.strategies, "loss_terms")
        self.finishers = with_hook(run.strategies, "after_step")

    def train(self) -> None:
        """Goes through the tasks that are left."""
        run = self.run
        if not self.matrix:
            self._evaluate(0, run.config.evaluation.untrained)
        for task in run.stream.tasks[run.tasks_seen :]:
            run.begin(task)
            examples = task.train
            with self.cost.around_task():
                for strategy in run.strategies:
                    strategy.before_task(run, task)
                run.refresh_trainable()
                for strategy in run.strategies:
                    examples = strategy.train_examples(run, task, examples)
            self.skipped += 1
            trained = len(examples) > 0
            if trained:
                self.train_task(task, examples)
                self.skipped = 0
            with self.cost.around_task():
                for strategy in reversed(run.strategies):
                    strategy.after_task(run, task)
            run.tasks_seen += 1
            self._evaluate(run.tasks_seen, trained)
            if trained:
                save_adapter(run, task, Path(run.directory))
            self.cost.end_task(run)
            self.observer.on_task_end(task.index)
            self.checkpoints.save(self)

    def _evaluate(self, trained: int, wanted: bool) -> None:
        """Fills row `trained`; a model that was not trained is not scored again."""
        row: list[float | None] = [None] * len(self.run.stream.tasks)
        if wanted:
            with self.cost.evaluating():
                row = self.evaluator.row(trained)
        self.matrix.append(row)
        self.observer.on_evaluation(trained, row)

    def train_task(self, task: EncodedTask, examples: Dataset) -> None:
        """Trains on the examples of one task, with an optimizer and a schedule of its own."""
        run, config = self.run, self.run.config.training
        batches = math.ceil(len(examples) / config.batch_size)
        per_epoch = math.ceil(batches / config.gradient_accumulation)
        steps = config.epochs * per_epoch
        if config.max_steps is not None:
            steps = config.max_steps * self.skipped
        run.optimizer = make_optimizer(run.config.optimizer, run.trainable.values())
        schedule = make_schedule(run.config.scheduler, run.optimizer, steps)
        run.prepared, run.optimizer = run.accelerator.prepare(run.model, run.optimizer)
        run.prepared.train()
        self.observer.on_task_start(task.index, task.name, steps)
        log_every = run.config.tracking.log_every
        with self.cost.training():
            for done, micro_batches in enumerate(islice(self._portions(examples), steps), 1):
                run.logging = (run.step + 1) % log_every == 0 or done == steps
                logs = self._step(micro_batches)
                logs |= {"train/lr": schedule.get_last_lr()[0], "train/epoch": done / per_epoch}
                schedule.step()
                run.step += 1
                self.observer.on_step(run.step, self._read(logs) if run.logging else None)
        run.model = run.accelerator.unwrap_model(run.prepared, keep_fp32_wrapper=False)
        # else Accelerate takes it for prepared at the next task and leaves its autocast off
        run.model._is_accelerate_prepared = False  # type: ignore[assignment]
        run.prepared = run.model
        run.accelerator.free_memory()
        run.optimizer = None

    def _portions(self, examples: Dataset) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step, epoch after epoch, without end."""
        size = self.run.config.training.gradient_accumulation
        epoch = 0
        while True:
            batches = iter(self.run.loader(examples, epoch=epoch))
            while portion := list(islice(batches, size)):
                yield [batch.to(self.run.device) for batch in portion]
            epoch += 1

    def _step(self, micro_batches: list[Batch]) -> dict[str, float | Tensor]:
        """One optimizer step; returns what may be logged, unread."""
        run = self.run
        for strategy in self.batchers:
            micro_batches = [strategy.transform_batch(run, batch) for batch in micro_batches]
        self.cost.count_step(sum(map(len, micro_batches)))
        logs = self._backward(micro_batches)
        parameters = list(run.trainable.values())
        run.accelerator.unscale_gradients(run.optimizer)
        for strategy in self.transformers:
            for name, value in strategy.transform_gradients(run).items():
                logs[f"train/{name}" if "/" in name else f"train/gradient/{name}"] = value
        limit = run.config.training.max_grad_norm
        if limit is not None:
            logs["train/grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, limit)
        run.optimizer.step()
        run.optimizer.zero_grad()
        for strategy in self.finishers:
            strategy.after_step(run)
        return logs

    def _backward(self, micro_batches: list[Batch]) -> dict[str, float | Tensor]:
        """Accumulates the gradients of one step: the mean over its targets plus the terms."""
        run = self.run
        targets = sum(batch.num_targets for batch in micro_batches)
        sums: dict[str, Any] = {"train/loss/task": 0.0}
        for batch in micro_batches:
            if self.gradient_makers:
                part = self.gradient_makers[0].compute_gradients(run, batch)
                sums["train/loss/task"] += part / len(micro_batches)
                continue
            outputs = run.objective.forward(run.prepared, batch)
            loss = run.objective.total(outputs, batch) / targets
            sums["train/loss/task"] += loss.detach()
            for strategy in self.terms:
                for name, term in strategy.loss_terms(run, batch, outputs).items():
                    share = term / len(micro_batches)
                    loss = loss + share
                    key = f"train/loss/{name}"
                    sums[key] = sums.get(key, 0.0) + share.detach()
            run.accelerator.backward(loss)
        return sums

    def _read(self, logs: dict[str, float | Tensor]) -> dict[str, float]:
        """Moves what is logged off the device; the total loss is the sum of its named parts.

        Each part is given as a ratio to the task's own loss too: what a strength amounts to.
        """
        values = {name: float(value) for name, value in logs.items()}
        parts = {n.removeprefix("train/loss/"): v for n, v in values.items() if "/loss/" in n}
        own = parts["task"]
        ratios = {f"train/ratio/{n}": v / own for n, v in parts.items() if own > 0 and n != "task"}
        return {"train/loss": sum(parts.values()), **values, **ratios}
