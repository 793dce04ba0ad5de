"""The Run: all that a strategy may see of a run in progress."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clpeft.config import Config
from clpeft.models.objective import Objective
from clpeft.strategies.base import with_hook
from clpeft.streams.batch import Batch
from clpeft.streams.batching import BatchLoader, Collator, Columns, own_rows, share
from clpeft.training.randomness import derived_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from clpeft.strategies.base import Strategy
    from clpeft.streams.encoded import EncodedStream, EncodedTask


class Run:
    """State of a run that strategies read and the loop advances.

    Args:
        config: The run's settings.
        directory: The run directory.
        accelerator: Places tensors, scales and synchronises gradients.
        model: The model with its adapter, unwrapped.
        tokenizer: The model's tokenizer.
        stream: The encoded tasks.
        objective: Forward pass and loss of the task type.
        strategies: In the order in which they act.
        base: Which weights the adapters stand on, for results.
        source: Where they were loaded from: a folder or a name on the Hub.
        companion: What the PEFT method does to training, if anything.

    Attributes:
        acting: All whose hooks are called: the strategies, then the companion.
        task: The task being trained; None before the first.
        tasks_seen: How many tasks are behind the run.
        step: Optimizer steps taken so far, over all tasks.
        steps_of_task: Optimizer steps that the current task has in all; known from its first.
        step_of_task: Which of them is being made, from 1; one that is left out counts too.
        trainable: Name to parameter, those that train, in the model's order.
        optimizer: Of the current task.
        phase: What is going on, for messages: setup, training or evaluation.
        changed: Name to parameter, all that train or have trained: what a checkpoint holds.
        targets: What the step's losses are means over, per process: of `task` and of each part.
        examples: How many examples of each part have targets in the step, likewise.
        micro_batches: How many the step has.
        logging: Whether this step's values are read; what is costly to compute may wait for that.
        generator: On the CPU, seeded by the run's seed, for what strategies draw.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        accelerator: Accelerator,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        stream: EncodedStream,
        objective: Objective,
        strategies: Sequence[Strategy],
        base: str,
        source: str,
        companion: Strategy | None = None,
    ) -> None:
        self.config = config
        self.directory = directory
        self.accelerator = accelerator
        self.model = model
        self.prepared = model  # what the loop calls forward on: the model as Accelerate wraps it
        self.tokenizer = tokenizer
        self.stream = stream
        self.objective = objective
        self.strategies = list(strategies)
        self.acting = [*self.strategies, *([companion] if companion else [])]
        self.base = base
        self.source = source
        self.task: EncodedTask | None = None
        self.tasks_seen = 0
        self.step = 0
        self.steps_of_task = 0
        self.step_of_task = 0
        self.optimizer: Any = None
        self.logging = False
        self.targets: dict[str, float] = {}
        self.examples: dict[str, float] = {}
        self.micro_batches = 1
        self.phase = "setup"
        self.generator = torch.Generator().manual_seed(config.seed)
        self.collator = Collator(config.model.task_type, int(tokenizer.pad_token_id))
        self.trainable: dict[str, nn.Parameter] = {}
        self.changed: dict[str, nn.Parameter] = {}
        self.refresh_trainable()
        self._hosts: Any = None  # a process group for numbers that lie on the CPU
        if self.world_size > 1:
            self._hosts = torch.distributed.new_group(backend="gloo")

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Which of the processes this is, from 0."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    @property
    def where(self) -> str:
        """The current task, for messages."""
        if self.task is None:
            return "none yet"
        return f"'{self.task.name}' ({self.task.index + 1} of {len(self.stream.tasks)})"

    @property
    def progress(self) -> float:
        """What share of the current task's steps was made before this one, from 0 to 1."""
        return (self.step_of_task - 1) / self.steps_of_task if self.steps_of_task else 0.0

    def agree(self, *wishes: int) -> list[int]:
        """The largest of each number over all processes, which all must call this together."""
        if self.world_size == 1:
            return list(wishes)
        found = torch.tensor(wishes)
        operation = torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(found, op=operation, group=self._hosts)
        return found.tolist()

    def total(self, number: float) -> float:
        """The sum of a number over all processes."""
        return number if self.world_size == 1 else float(self.summed(np.array([number]))[0])

    def means(self, numbers: Sequence[float]) -> list[float]:
        """The mean of each number over all processes."""
        if self.world_size == 1:
            return list(numbers)
        return (self.summed(np.array(numbers)) / self.world_size).tolist()

    def summed(self, numbers: np.ndarray) -> np.ndarray:
        """The sum of each number over all processes, in float64."""
        if self.world_size == 1:
            return numbers
        found = torch.from_numpy(numbers.astype(np.float64))
        torch.distributed.all_reduce(found, group=self._hosts)
        return found.numpy()

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, value, group=self._hosts)
        return found

    def sum_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        """The sum of each tensor over all processes, in one exchange."""
        if self.world_size == 1:
            return gradients
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        return [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]

    def refresh_trainable(self) -> None:
        """Reads from the model which parameters train; strategies that grow it call this."""
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.changed |= self.trainable

    def begin(self, task: EncodedTask) -> None:
        """Makes a task the current one."""
        self.task = task
        allowed = allowed_labels(self.stream, task.index).to(self.device)
        self.objective = self.objective.for_labels(allowed)

    def loader(self, dataset: Dataset, *, epoch: int = 0, shuffle: bool = True) -> BatchLoader:
        """Batches of a data set, bucketed by length; the order depends on seed, task and epoch."""
        index = self.task.index if self.task is not None else 0
        return BatchLoader(
            dataset,
            self.collator,
            batch_size=self.config.training.batch_size,
            seed=self.config.seed * 10_007 + index,
            epoch=epoch,
            shuffle=shuffle,
            rank=self.rank,
            world_size=self.world_size,
        )

    def generator_for(self, owner: str) -> torch.Generator:
        """A CPU generator for one user of random numbers, seeded by the run's seed and its name.

        Args:
            owner: The strategy's name, say; others draw other numbers.
        """
        return torch.Generator().manual_seed(derived_seed(self.config.seed, "owner", owner))

    def batch(self, columns: Columns, indices: Sequence[int] | np.ndarray) -> Batch:
        """A batch of chosen examples, on the run's device."""
        return self.collator(columns, np.asarray(indices)).to(self.device)

    def share_of(self, indices: np.ndarray) -> np.ndarray:
        """The rows of a batch's that are this process's share of it."""
        return own_rows(indices, self.rank, self.world_size)

    def shared_batch(self, columns: Columns, indices: Sequence[int] | np.ndarray) -> Batch:
        """This process's share of a batch of chosen examples, on the run's device.

        Args:
            columns: The data set.
            indices: Rows of the whole batch, at least one; the same in all processes.
        """
        rows = np.asarray(indices)
        return share(self.collator, columns, rows, self.rank, self.world_size).to(self.device)

    def per_example_loss(self, batch: Batch, outputs: Any, part: str | None = None) -> Tensor:
        """Negative log-likelihood of each example, summed over its targets [B], in nats.

        Args:
            batch: What the model read.
            outputs: What it made of that.
            part: Only the examples of this part of the batch.
        """
        rows = slice(None) if part is None else batch.parts[part].rows
        return self.objective.per_example(outputs, batch, rows)

    def count_targets(self, micro_batches: Sequence[Batch]) -> None:
        """Counts what the losses of a step are means over: of the task, and of each part.

        Of several processes each has its share of the targets, and gradients are averaged over
        processes: the numbers are the totals divided by how many there are.
        """
        targets = {"task": sum(batch.num_targets for batch in micro_batches)}
        examples: dict[str, int] = {}
        for batch in micro_batches:
            for name, part in batch.parts.items():
                targets[name] = targets.get(name, 0) + part.num_targets
                examples[name] = examples.get(name, 0) + part.num_examples
        counts = np.array([*targets.values(), *examples.values()], dtype=np.float64)
        shares = (self.summed(counts) / self.world_size).tolist()
        self.targets = dict(zip(targets, shares[: len(targets)], strict=True))
        self.examples = dict(zip(examples, shares[len(targets) :], strict=True))
        self.micro_batches = len(micro_batches)

    def per_target(self, total: Tensor, part: str = "task") -> Tensor:
        """A sum over targets of one micro-batch, as a loss term that is a mean over the step's.

        So that it hangs neither on how a step is cut into micro-batches nor on how many processes
        share it.

        Args:
            total: The sum, a scalar.
            part: Whose targets: those of the task loss, or a part's.
        """
        return self._as_mean(total, self.targets[part])

    def per_example(self, total: Tensor, part: str) -> Tensor:
        """A sum over a part's examples of one micro-batch, as a mean over the step's; see above.

        Args:
            total: The sum, a scalar; examples without targets add nothing to it.
            part: The part's name.
        """
        return self._as_mean(total, self.examples[part])

    def _as_mean(self, total: Tensor, count: float) -> Tensor:
        # the loop divides every term by the number of micro-batches
        return total * (self.micro_batches / max(count, 1 / self.world_size))

    def objections(
        self, task: EncodedTask, examples: Dataset, source: str, beside: Dataset | None = None
    ) -> dict[int, str]:
        """Which examples of a task some strategy objects to: the reason by the example's row.

        Args:
            task: Whose examples they are.
            examples: Encoded examples that are to enter a memory or, generated, training.
            source: The strategy that asks.
            beside: Examples of the task that it has already, if any.
        """
        found: dict[int, str] = {}
        for strategy in with_hook(self.strategies, "objections"):
            left = [row for row in range(len(examples)) if row not in found]
            against = strategy.objections(self, task, examples.select(left), beside, source)
            found |= {left[row]: reason for row, reason in against.items()}
        return found

    def admitted(self, task: EncodedTask, examples: Dataset, source: str) -> Dataset:
        """The examples of a task that no strategy objects to; see `objections`."""
        against = self.objections(task, examples, source)
        if not against:
            return examples
        return examples.select([row for row in range(len(examples)) if row not in against])

    def mean_loss(self, batch: Batch) -> Tensor:
        """Runs the model; the loss per target, as the loop computes it for one batch.

        Of several processes each has a share of the batch, and the losses add up to the mean.
        """
        with self.accelerator.autocast():
            outputs = self.objective.forward(self.model, batch)
        return self.objective.total(outputs, batch) / self.total(batch.num_targets)

    def gradients(self, batch: Batch) -> list[Tensor]:
        """Gradients of the mean loss on another batch.

        Args:
            batch: Any batch, of several processes each one's share of it; the loop's own graph and
                every `.grad` stay as they are.

        Returns:
            One float32 tensor per entry of `trainable`, in its order; zeros where unused, and
            all zeros if any overflowed in fp16.
        """
        # a PEFT method may let only some of them train at a time
        training = {name: p for name, p in self.trainable.items() if p.requires_grad}
        scaler = self.accelerator.scaler
        # fp16 gradients are scaled for the same reason that the loop's are: not to underflow
        scale = scaler.get_scale() if scaler is not None else 1.0
        loss = self.mean_loss(batch)
        found = torch.autograd.grad(loss * scale, list(training.values()), allow_unused=True)
        by_name = dict(zip(training, found, strict=True))
        gradients = [
            torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() / scale
            for p, g in zip(self.trainable.values(), map(by_name.get, self.trainable), strict=True)
        ]
        gradients = self.sum_gradients(gradients)
        if scaler is None:
            return gradients
        # the scaler looks at the loop's gradients only: one that overflowed here would be taken
        # for a direction, and make every weight a NaN
        finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        return [torch.where(finite, g, torch.zeros_like(g)) for g in gradients]

    def filled_gradients(self) -> list[Tensor]:
        """`.grad` of every entry of `trainable`, in its order; one that has none gets zeros.

        Zeros of a parameter that is not to train in this step are not its `.grad`: what is made of
        them leads nowhere.
        """
        return [self._filled_gradient(parameter) for parameter in self.trainable.values()]

    @staticmethod
    def _filled_gradient(parameter: nn.Parameter) -> Tensor:
        if parameter.grad is not None:
            return parameter.grad
        zeros = torch.zeros_like(parameter)
        if parameter.requires_grad:
            parameter.grad = zeros
        return zeros

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Without dropout, for importance and the like; the mode before is restored."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


def allowed_labels(stream: EncodedStream, current: int) -> Tensor:
    """Which labels compete in training, for an example of each task.

    Args:
        stream: The encoded stream.
        current: Index of the task being trained.

    Returns:
        bool [tasks, labels]. In the class-incremental scenario every example, a replayed one too,
        competes against all labels seen so far; in the task-incremental one against its task's.
    """
    raw = stream.stream
    allowed = torch.zeros(len(stream.tasks), len(raw.label_names), dtype=torch.bool)
    for task in stream.tasks:
        deciding = current if raw.scenario == "class" else task.index
        allowed[task.index, raw.training_candidates(deciding)] = True
    return allowed
