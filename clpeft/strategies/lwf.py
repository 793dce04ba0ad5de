"""Learning without forgetting: on new inputs the model still says what it said before."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clpeft.config import ConfigError, above, at_least, one_of
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence, Strategy, StrategyConfig
from clpeft.strategies.teacher import CachedOutputs, Teacher, cached_outputs, teacher_of
from clpeft.streams.batch import IGNORED
from clpeft.streams.batching import Columns

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.base import Stream
    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run

log = logging.getLogger(__name__)

NO_LABEL = -1  # fills up the shorter ones of several lists of labels


@dataclass
class LwFConfig(StrategyConfig):
    """Settings of LwF."""

    lambda_: float = at_least(0)  # weight of a target's distillation beside its own loss
    temperature: float = above(0)  # of both softmaxes, T in the paper
    teacher: str = one_of("auto", "cached", "live")  # auto: cached where that fits and pays
    cache_gib: float = at_least(0)  # of the device's memory, at most, for cached outputs


def distillation(old: Tensor, new: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(old/T) ‖ softmax(new/T)) for each row of logits.

    Its gradient by `new` is T (softmax(new/T) − softmax(old/T)): the factor T² keeps it from
    vanishing as T grows.

    Args:
        old: The teacher's logits [..., K], minus infinity where a label does not compete.
        new: The student's [..., K], minus infinity at the same places.
        temperature: T.

    Returns:
        [...] in nats; 0 where the two agree.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2; Li &
        Hoiem 2016, Learning without Forgetting, equation 2, less the entropy of the old, which
        does not depend on the new.
    """
    log_p = torch.log_softmax(old / temperature, dim=-1)
    log_q = torch.log_softmax(new / temperature, dim=-1)
    parts = log_p.exp() * (log_p - log_q)
    return temperature**2 * parts.masked_fill(old == -torch.inf, 0.0).sum(dim=-1)


def old_labels(stream: Stream, current: int) -> Tensor:
    """The labels that are distilled over: one softmax per row.

    Args:
        stream: The stream.
        current: Index of the task being trained, not the first.

    Returns:
        Global label ids [softmaxes, labels], filled up with -1. In the task-incremental scenario
        one row per earlier task, its own labels, which compete only with each other; in the
        class-incremental one row of all of theirs together; in the domain-incremental one row of
        the labels that all tasks share.
    """
    if stream.scenario == "task":
        rows = [stream.training_candidates(earlier) for earlier in range(current)]
    else:
        rows = [stream.training_candidates(current - 1)]
    width = max(map(len, rows))
    return torch.tensor([row + [NO_LABEL] * (width - len(row)) for row in rows])


def among(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [..., K] of the labels [softmaxes, k] as [..., softmaxes, k], those of -1 -inf."""
    return logits[..., labels.clamp(min=0)].masked_fill(labels == NO_LABEL, -torch.inf)


@STRATEGIES.register("lwf", config=LwFConfig)
class LwF(Strategy):
    """λT² KL(softmax(old/T) ‖ softmax(new/T)) on the inputs of the task being learned.

    `old` are the logits that the model had after the task before: the teacher is all of the
    weights that train as that task left them (adapter and head, or every weight of the model),
    without dropout; not the base without its adapter, which knows no task. A head is distilled
    over the labels of earlier tasks (`old_labels`), unmasked; a language model over its vocabulary,
    at the tokens of the answer. From the second task on.

    The term is a sum over the targets (examples, or tokens of answers) of the current task divided
    by the number of all targets of the step, as the task's own loss is. So λ = 1 means that each
    new target's distillation weighs as much as its own loss, whatever accumulation, the number of
    processes and other strategies' examples in the batch. Examples of earlier tasks have no term.

    With `teacher=cached` the teacher is asked once about every example, when a task is opened, and
    its logits are kept in float32 on the device: 4 · K bytes per target. With `live` it runs on
    every micro-batch beside the student.

    Source: Li & Hoiem 2016, Learning without Forgetting, equations 1 to 3, summed over earlier
        tasks as there; T² after Hinton et al. 2015, so that their λ = 1 at T = 2 is 0.25 here.
    """

    config: LwFConfig
    supports_multi_process = True
    evidence: ClassVar = {"loss/lwf": Evidence.PENALTY}
    conflicts: ClassVar[dict[str, str]] = {
        "olora": "the teacher is the adapter as the last task left it, and olora makes that a part "
        "of the base and starts afresh, so that the teacher would count it twice"
    }

    def setup(self, run: Run) -> None:
        self._device = run.device
        self._weights: dict[str, Tensor] = {}  # the teacher's; none in the first task
        self._teacher: Teacher | None = None
        self._cache: CachedOutputs | None = None
        self._labels: Tensor | None = None  # those of a head; None: all logits
        if self.config.teacher == "cached":
            self._check_sizes(run)

    def train_examples(self, run: Run, task: EncodedTask, examples: Dataset) -> Dataset:
        self._teacher = self._cache = None
        if not self._weights:
            return examples
        self._teacher = teacher_of(run, self._weights)
        if run.config.model.task_type == "sequence_classification":
            self._labels = old_labels(run.stream.stream, task.index).to(run.device)
        if self.config.teacher != "live":
            self._ask_in_advance(run, task, Columns(examples))
        return examples

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        if self._teacher is None:
            return {}
        assert run.task is not None
        # no label is masked: those of earlier tasks are what counts
        new, labels = run.objective.unmasked(outputs, batch)
        current = self._own(batch) & (batch.task_ids == run.task.index)
        targets = (labels != IGNORED).reshape(len(batch), -1) & current[:, None]
        if self._cache is not None:
            old = self._cache.at(batch.example_ids, targets)
        else:
            old = self._teacher(batch)[0].reshape(*targets.shape, -1)
        new = new.reshape(old.shape)
        if self._labels is not None:
            old, new = among(old, self._labels), among(new, self._labels)
        parts = distillation(old, new, self.config.temperature).reshape(*targets.shape, -1)
        total = parts.sum(dim=-1).masked_fill(~targets, 0.0).sum()
        return {"lwf": self.config.lambda_ * run.per_target(total)}

    @staticmethod
    def _own(batch: Batch) -> Tensor:
        """Which rows are the task loss's, not another strategy's term's: bool [B]."""
        own = torch.zeros_like(batch.task_ids, dtype=torch.bool)
        own[batch.own_rows] = True
        return own

    def after_task(self, run: Run, task: EncodedTask) -> None:
        self._teacher = self._cache = None
        self._weights = {name: p.detach().clone() for name, p in run.trainable.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # copies lie in memory as the first run's do, which can decide the bits of a product
        weights = state["teacher"]
        self._weights = {name: w.to(self._device, copy=True) for name, w in weights.items()}

    def _ask_in_advance(self, run: Run, task: EncodedTask, columns: Columns) -> None:
        """Fills the cache for a task's examples, where that fits into memory and pays."""
        assert self._teacher is not None
        own = np.flatnonzero(columns.numbers["task_id"] == task.index)
        if not len(own):
            return
        if self.config.teacher == "auto" and _examples_read(run) < len(own):
            log.info(
                "lwf: the teacher runs beside the model for '%s': not all of its "
                "examples are read within training.max_steps",
                task.name,
            )
            return
        width = _width(self._teacher, run, columns, own)
        needed = _gib(columns, own, width)
        if needed > self.config.cache_gib:
            self._refuse_size(task, needed)
            log.info(
                "lwf: the teacher runs beside the model for '%s': its outputs would take %.2f GiB, "
                "more than strategies.lwf.cache_gib=%g",
                *(task.name, needed, self.config.cache_gib),
            )
            return
        self._cache = cached_outputs(run, self._teacher, columns, own, width)
        log.info("lwf: the teacher's outputs for '%s' are cached (%.2f GiB)", task.name, needed)

    def _check_sizes(self, run: Run) -> None:
        """Finds at the start what would not fit later."""
        teacher = teacher_of(run, dict(run.trainable))
        for task in run.stream.tasks[1:]:
            columns = Columns(task.train)
            everything = np.arange(len(columns))
            width = _width(teacher, run, columns, everything)
            self._refuse_size(task, _gib(columns, everything, width))

    def _refuse_size(self, task: EncodedTask, needed: float) -> None:
        if self.config.teacher == "cached" and needed > self.config.cache_gib:
            raise ConfigError(
                f"strategies.lwf.teacher=cached needs {needed:.2f} GiB for the task '{task.name}', "
                f"but strategies.lwf.cache_gib is {self.config.cache_gib:g}; raise it, or set "
                f"strategies.lwf.teacher=live."
            )


def _examples_read(run: Run) -> float:
    """How many examples a task's steps read, at most."""
    config = run.config.training
    if config.max_steps is None:
        return math.inf
    return config.max_steps * config.batch_size * config.gradient_accumulation


def _width(teacher: Teacher, run: Run, columns: Columns, rows: np.ndarray) -> int:
    """How many logits there are to a target, seen on one example."""
    return teacher(run.batch(columns, rows[:1]))[0].shape[-1]


def _gib(columns: Columns, rows: np.ndarray, width: int) -> float:
    """What the logits at the targets of some examples take in float32."""
    return 4 * width * int(columns.targets[rows].sum()) / 2**30
