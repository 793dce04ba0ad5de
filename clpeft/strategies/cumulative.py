"""Cumulative training: task t trains on the data of all tasks up to t."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Strategy, StrategyConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@STRATEGIES.register("cumulative", config=StrategyConfig)
class Cumulative(Strategy):
    """Keeps all data of all tasks: what a method could reach if memory cost nothing.

    A task's epochs go over the enlarged set, so its steps grow with the tasks, unless
    `training.max_steps` limits them.
    """

    supports_multi_process = True
    is_reference = True
    is_bound = True

    def train_examples(self, run: Run, task: EncodedTask, examples: Dataset) -> Dataset:
        from datasets import concatenate_datasets

        earlier = [other.train for other in run.stream.tasks[: task.index]]
        return concatenate_datasets([*earlier, examples])
