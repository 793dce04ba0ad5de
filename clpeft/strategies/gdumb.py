"""GDumb: keeps a balanced memory, and learns anew from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from clpeft.config import RunError
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence
from clpeft.strategies.rehearsal import EarlyRehearsal, RehearsalConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run

_HOLDING = (
    "the one starts the weights afresh for every task, and the other holds them where earlier "
    "tasks left them"
)
_REPLAYING = (
    "the one trains on its memory of all tasks alone, and the other would add earlier tasks to "
    "that once more"
)
_GUARDING = (
    "the one trains on its memory of all tasks alone, and the other guards the loss of earlier "
    "tasks, which are in that memory already"
)


@dataclass
class GDumbConfig(RehearsalConfig):
    """Settings of GDumb."""


@STRATEGIES.register("gdumb", config=GDumbConfig)
class GDumb(EarlyRehearsal):
    """A greedy sampler and a dumb learner: nothing is learned but what the memory holds.

    As a task arrives the trainable parameters are set back to their first values, its examples
    enter the memory, and the model is trained on the memory, for the epochs of any task. What it
    reaches shows how much of other strategies' scores their memory alone would give.

    The first values are kept beside the model, in the CPU's memory: with `peft=full`, a second
    copy of it. No checkpoint holds them, since the run's seed makes them again. `herding` and
    `uncertainty` ask the model as it begins the task: at these values.

    Source: Prabhu et al. 2020, GDumb: A Simple Approach that Questions Our Progress in Continual
        Learning; the memory's balance as in `class_balanced`.
    """

    config: GDumbConfig
    name = "gdumb"
    evidence: ClassVar = {"gdumb/earlier_examples": Evidence.TERM}
    owns_adapters = True
    conflicts: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("ewc", "l2", "mas", "online_ewc", "rwalk", "si"), _HOLDING),
        **dict.fromkeys(("agem", "gem"), _GUARDING),
        **dict.fromkeys(
            ("der", "derpp", "er_ace", "generative_replay", "prioritized_replay", "replay"),
            _REPLAYING,
        ),
    }

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._first = [p.detach().to("cpu", copy=True) for p in run.trainable.values()]
        self._earlier = 0  # examples of earlier tasks among those trained on

    def before_task(self, run: Run, task: EncodedTask) -> None:
        with torch.no_grad():
            for parameter, value in zip(run.trainable.values(), self._first, strict=True):
                parameter.copy_(value)

    def train_examples(self, run: Run, task: EncodedTask, examples: Dataset) -> Dataset:
        super().train_examples(run, task, examples)
        kept = self._memory.examples
        if kept is None:
            raise RunError(
                f"gdumb has nothing to train on: no example of '{task.name}' entered its memory. "
                f"Loosen strategies.quality_control."
            )
        self._earlier = len(self._memory) - len(self._memory.rows_of_task(task.index))
        return kept

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes none; logs how much of what is trained on is earlier tasks'."""
        return {f"{self.name}/earlier_examples": self._earlier}
