"""Joint training: one training on everything, usually called multi-task learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Strategy, StrategyConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@STRATEGIES.register("joint", config=StrategyConfig)
class Joint(Strategy):
    """Trains once, on the data of all tasks together, when the last one arrives.

    The rows of the matrix between the untrained model and the last are empty, so that of the
    metrics only those of the final row are defined.
    """

    supports_multi_process = True
    is_reference = True
    is_bound = True

    def train_examples(self, run: Run, task: EncodedTask, examples: Dataset) -> Dataset:
        from datasets import concatenate_datasets

        if task.index + 1 < len(run.stream.tasks):
            return examples.select(range(0))
        return concatenate_datasets([other.train for other in run.stream.tasks])
