"""One step of the loop, and several processes, for runs small enough to be worked out on paper."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from clpeft.strategies.base import Strategy, with_hook
from clpeft.streams.batch import Batch
from clpeft.training.loop import Loop
from clpeft.training.run import Run

T = TypeVar("T")


def backward(
    run: Run, strategies: Sequence[Strategy], batches: Sequence[Batch]
) -> tuple[list[Tensor], dict[str, float]]:
    """The loop's own forward and backward passes of one step.

    Args:
        run: Whose model; its gradients are empty afterwards.
        strategies: What may change the micro-batches and add terms.
        batches: The micro-batches as the loader gives them.

    Returns:
        The gradient of every trainable parameter, and the losses that are logged.
    """
    run.accelerator.no_sync = lambda model: nullcontext()  # type: ignore[method-assign]
    for strategy in with_hook(strategies, "transform_batch"):
        batches = [strategy.transform_batch(run, batch) for batch in batches]
    loop: Any = SimpleNamespace(
        run=run, gradient_makers=[], terms=with_hook(strategies, "loss_terms")
    )
    logs = Loop._backward(loop, list(batches))
    gradients = [gradient.clone() for gradient in run.filled_gradients()]
    run.model.zero_grad()
    return gradients, {name: float(value) for name, value in logs.items()}


def as_processes(runs: Sequence[Run], work: Callable[[Run], T]) -> list[T]:
    """Lets the processes of one run work side by side, each in a thread.

    Args:
        runs: One per process, alike; they are told their ranks.
        work: What each does; where one exchanges something, it waits for all others.

    Returns:
        What came of it, by rank.
    """
    meeting = threading.Barrier(len(runs), timeout=60)
    brought: list[Any] = [None] * len(runs)

    def join(run: Run, rank: int) -> None:
        def gathered(value: Any) -> list[Any]:
            brought[rank] = value
            meeting.wait()
            found = list(brought)
            meeting.wait()  # nobody brings something new before all have seen this
            return found

        def summed(numbers: np.ndarray) -> np.ndarray:
            return sum(gathered(numbers.astype(np.float64)))

        def sum_gradients(gradients: list[Tensor]) -> list[Tensor]:
            return [sum(tensors) for tensors in zip(*gathered(gradients), strict=True)]

        run.accelerator.process_index = rank
        run.accelerator.num_processes = len(runs)
        vars(run).update(gathered=gathered, summed=summed, sum_gradients=sum_gradients)

    for rank, run in enumerate(runs):
        join(run, rank)

    def careful(run: Run) -> T:
        try:
            return work(run)
        except BaseException:
            meeting.abort()  # else the others wait for what never comes
            raise

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(careful, runs))
