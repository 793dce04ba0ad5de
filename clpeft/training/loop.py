"""The training loop: one task after another, each hook in its place."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from clpeft.stopping import Preempted, StopRequests
from clpeft.strategies.base import with_hook
from clpeft.training.adapters import save_adapter
from clpeft.training.checkpoint import resume_course
from clpeft.training.guard import Guard, explained
from clpeft.training.optim import make_optimizer, make_schedule
from clpeft.training.prepared import prepare, release
from clpeft.training.randomness import derived_seed, set_random_states

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.evaluation.evaluator import Evaluator
    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.tracking.base import Observer
    from clpeft.training.checkpoint import Checkpoints
    from clpeft.training.cost import Cost
    from clpeft.training.run import Run

log = logging.getLogger(__name__)

# steps of a task that are logged however seldom others are, spread evenly, the last among them:
# whether a strategy did anything, and too much of it, is judged by what is logged
LOOKS = 5


@dataclass
class Course:
    """The steps of the task under way."""

    steps: int  # made so far
    total: int
    schedule: Any

    @property
    def at_a_look(self) -> bool:
        """Whether a fifth of the task's steps was completed by the latest."""
        return self.steps * LOOKS // self.total > (self.steps - 1) * LOOKS // self.total


class Loop:
    """Trains a run through its stream and fills the matrix.

    Args:
        run: What is trained.
        evaluator: Scores the tasks.
        observer: Is told what happens; never changes it.
        checkpoints: Where the state is kept, and when.
        cost: Adds up time, steps and memory.
        stop: Whether the process was asked to stop.

    Attributes:
        matrix: `matrix[t][i]` is the score on task i after t tasks; None where not evaluated.
        row: The scores of the row being filled, so far; None between rows.
        course: The steps of the task under way; None between tasks.
        skipped: How many tasks' training strategies have left to a later one, as `joint` does.
        unfinished: What a checkpoint within a task holds of its steps, until the task goes on.
        random: The random states to go on with, likewise.
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
        self.guard = Guard(run, run.config.training.on_nan)
        self.matrix: list[list[float | None]] = []
        self.row: list[float | None] | None = None
        self.course: Course | None = None
        self.skipped = 0
        self.unfinished: dict[str, Any] | None = None
        self.random: dict[str, Any] | None = None
        self.gradient_makers = with_hook(run.acting, "compute_gradients")
        self.spectators = with_hook(run.acting, "task_gradients")
        self.transformers = with_hook(run.acting, "transform_gradients")
        self.batchers = with_hook(run.acting, "transform_batch")
        self.terms = with_hook(run.acting, "loss_terms")
        self.finishers = with_hook(run.acting, "after_step")

    def train(self) -> None:
        """Goes through what is left of the tasks.

        Raises:
            Preempted: If the process was asked to stop; the state is saved then.
            RunError: If a loss is not finite, or memory does not suffice.
        """
        run = self.run
        with self.stop.patiently(), explained(run):
            if not self.matrix:
                self._evaluate(0, run.config.evaluation.untrained)
            elif len(self.matrix) == run.tasks_seen:  # stopped while its row was being filled
                self._close(run.stream.tasks[run.tasks_seen - 1])
            for task in run.stream.tasks[run.tasks_seen :]:
                examples = self.open_task(task)
                if len(examples):
                    self.train_task(task, examples)
                    self.skipped = 0
                self.finish_task(task)
                self._pause()
                self._close(task)

    def open_task(self, task: EncodedTask) -> Dataset:
        """Begins a task, or goes on with one; returns what is trained on."""
        run, examples = self.run, task.train
        with self.cost.around_task():
            if self.unfinished is None:
                # alike in all processes, whatever each has drawn before
                set_seed(derived_seed(run.config.seed, "task", task.index))
                run.begin(task)
                for strategy in run.acting:
                    strategy.before_task(run, task)
                run.refresh_trainable()
                self.skipped += 1
            for strategy in run.acting:
                examples = strategy.train_examples(run, task, examples)
        return examples

    def finish_task(self, task: EncodedTask) -> None:
        """Lets the strategies take from a trained task what they keep of it."""
        with self.cost.around_task():
            for strategy in reversed(self.run.acting):
                strategy.after_task(self.run, task)
        self.run.tasks_seen += 1

    def _close(self, task: EncodedTask) -> None:
        """Scores a trained task's row, and leaves its adapter and a checkpoint behind."""
        run, trained = self.run, self.skipped == 0
        self._evaluate(run.tasks_seen, trained)
        if trained:
            save_adapter(run, task, Path(run.directory))
        self.cost.end_task(run)
        self.observer.on_task_end(task.index)
        self.checkpoints.save(self)
        self._pause(saved=True)

    def _evaluate(self, trained: int, wanted: bool) -> None:
        """Fills row `trained`; a model that was not trained is not scored again."""
        run = self.run
        run.phase = "evaluation"
        row = self.row = self.row or [None] * len(run.stream.tasks)
        if wanted:
            try:
                with self.cost.evaluating():
                    for task in self.evaluator.tasks_of_row(trained):
                        if row[task.index] is None:
                            row[task.index] = self.evaluator.score(task, trained, self._interrupt)
                            self._stop_if_asked()
            except Preempted as asked:
                if not asked.at_once:
                    self.checkpoints.save(self)
                raise
        self.row = None
        self.matrix.append(row)
        self.observer.on_evaluation(trained, row)

    def train_task(self, task: EncodedTask, examples: Dataset) -> None:
        """Trains on the examples of one task, with an optimizer and a schedule of its own."""
        run, config = self.run, self.run.config.training
        run.phase = "training"
        batches = math.ceil(len(examples) / config.batch_size)
        per_epoch = math.ceil(batches / config.gradient_accumulation)
        steps = config.epochs * per_epoch
        if config.max_steps is not None:
            steps = config.max_steps * self.skipped
        run.optimizer = make_optimizer(run.config.optimizer, run.trainable.values())
        schedule = make_schedule(run.config.scheduler, run.optimizer, steps)
        prepare(run)
        run.prepared.train()
        course = self.course = Course(0, steps, schedule)
        run.steps_of_task = steps
        self._seed_steps(task)
        self.observer.on_task_start(task.index, task.name, steps)
        log_every = run.config.tracking.log_every
        with self.cost.training():
            portions = self._portions(examples, course.steps, per_epoch)
            for micro_batches in islice(portions, steps - course.steps):
                run.step_of_task = course.steps = course.steps + 1
                run.logging = (run.step + 1) % log_every == 0 or course.at_a_look
                logs = self._step(micro_batches)
                logs["train/epoch"] = course.steps / per_epoch
                run.step += 1
                if run.logging:
                    self.guard.check()
                self.observer.on_step(run.step, self._read(logs) if run.logging else None)
                self._pause(due=self.checkpoints.due(run.step))
        self.course = None
        release(run)

    def _seed_steps(self, task: EncodedTask) -> None:
        """Random states for a task's steps: afresh, or as a checkpoint within the task has them."""
        run, course = self.run, self.course
        assert course is not None
        if self.unfinished is None:
            # of each process its own, for dropout
            set_seed(derived_seed(run.config.seed, "steps", task.index, run.rank))
            return
        course.steps = self.unfinished["steps"]
        resume_course(run, course.schedule, self.unfinished)
        if self.random is not None:
            set_random_states(self.random, run.generator)
        self.unfinished = None

    def _portions(self, examples: Dataset, done: int, per_epoch: int) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step after `done` ones, epoch after epoch."""
        size = self.run.config.training.gradient_accumulation
        epoch, first = divmod(done, per_epoch)
        while True:
            loader = self.run.loader(examples, epoch=epoch)
            for start in range(first * size, len(loader), size):
                portion = range(start, min(start + size, len(loader)))
                yield [loader.batch(index).to(self.run.device) for index in portion]
            epoch, first = epoch + 1, 0

    def _pause(self, *, due: bool = False, saved: bool = False) -> None:
        """Where the run may be saved, and stopped: all processes at the same place.

        Args:
            due: Whether a checkpoint is to be written in any case.
            saved: Whether one was written just now.
        """
        (due_anywhere,) = self.run.agree(int(due))
        wanted = self.stop.agreed(self.run.agree)
        if (wanted or due_anywhere) and not saved:
            self.guard.check()
            saved = self.checkpoints.save(self)
            if wanted and not saved:
                log.warning("the state could not be saved: what was done since the last is lost")
        if wanted:
            raise Preempted(wanted)

    def _stop_if_asked(self) -> None:
        """Stops all processes if one of them was asked to."""
        if wanted := self.stop.agreed(self.run.agree):
            raise Preempted(wanted)

    def _interrupt(self) -> None:
        """Called between batches of an evaluation, where it may be given up for later."""
        # processes have unequal numbers of batches, so that several could not agree here
        if self.run.world_size == 1:
            self._stop_if_asked()

    def _step(self, micro_batches: list[Batch]) -> dict[str, float | Tensor]:
        """One optimizer step, and the schedule's; returns what may be logged, unread."""
        run, course = self.run, self.course
        assert course is not None
        for strategy in self.batchers:
            micro_batches = [strategy.transform_batch(run, batch) for batch in micro_batches]
        self.cost.count_step(sum(batch.rows for batch in micro_batches))
        logs = self._backward(micro_batches)
        logs["train/lr"] = course.schedule.get_last_lr()[0]
        parameters = list(run.trainable.values())
        run.accelerator.unscale_gradients(run.optimizer)
        if self.guard.skips(logs):
            return logs | self._skip()
        for strategy in self.spectators:
            strategy.task_gradients(run)
        for strategy in self.transformers:
            for name, value in strategy.transform_gradients(run).items():
                logs[f"train/{name}" if "/" in name else f"train/gradient/{name}"] = value
        limit = run.config.training.max_grad_norm
        if limit is not None:
            logs["train/grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if self.guard.skips(logs):  # what a strategy made of the gradients
            return logs | self._skip()
        self.guard.watch(logs, micro_batches)
        run.optimizer.step()
        if not run.optimizer.step_was_skipped:  # by the scaler of fp16
            course.schedule.step()
        run.optimizer.zero_grad()
        for strategy in self.finishers:
            strategy.after_step(run)
        return logs

    def _skip(self) -> dict[str, float | Tensor]:
        """Leaves a step out whose loss or gradient is not finite, and counts it.

        Raises:
            RunError: If too many in a row are.
        """
        run = self.run
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.update()  # it has unscaled, and expects a step
        run.optimizer.zero_grad()
        self.cost.skipped_steps += 1
        self.guard.count_skip()
        return {"train/skipped": self.cost.skipped_steps}

    def _backward(self, micro_batches: list[Batch]) -> dict[str, float | Tensor]:
        """Accumulates the gradients of one step: the mean over its targets plus the terms."""
        run = self.run
        run.count_targets(micro_batches)
        sums: dict[str, Any] = {"train/loss/task": 0.0}
        for number, batch in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            with nullcontext() if last else run.accelerator.no_sync(run.prepared):
                if self.gradient_makers:
                    part = self.gradient_makers[0].compute_gradients(run, batch)
                    sums["train/loss/task"] += part / len(micro_batches)
                    continue
                outputs = run.objective.forward(run.prepared, batch)
                loss = run.objective.total(outputs, batch) / run.targets["task"]
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
        names = [name for name in values if name.startswith("train/loss/")]
        means = self.run.means([values[name] for name in names])
        values |= dict(zip(names, means, strict=True))
        parts = {name.removeprefix("train/loss/"): values[name] for name in names}
        own = parts["task"]
        ratios = {f"train/ratio/{n}": v / own for n, v in parts.items() if own > 0 and n != "task"}
        return {"train/loss": sum(parts.values()), **values, **ratios}
