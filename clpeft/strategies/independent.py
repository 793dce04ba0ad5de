"""Independent training: a fresh adapter for every task, chosen by the task's identity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Strategy, StrategyConfig

if TYPE_CHECKING:
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@STRATEGIES.register("independent", config=StrategyConfig)
class Independent(Strategy):
    """One adapter (and head) per task, each from the same first weights; nothing is shared.

    It cannot forget, and needs to be told the task at evaluation: the upper bound on stability.
    Its diagonal gives the S_i of the metric `intransigence`.
    """

    supports_multi_process = True
    is_reference = True
    is_bound = True
    needs_task_id_at_eval = True
    owns_adapters = True

    def setup(self, run: Run) -> None:
        self._initial = _copies(run)
        self._adapters: dict[str, list[Tensor]] = {}

    def before_task(self, run: Run, task: EncodedTask) -> None:
        _put(run, self._initial)

    def after_task(self, run: Run, task: EncodedTask) -> None:
        self._adapters[str(task.index)] = _copies(run)

    def evaluating(self, run: Run, task: EncodedTask | None) -> AbstractContextManager[None]:
        assert task is not None, "independent adapters are chosen by the task's identity"
        return self._serving(run, self._adapters.get(str(task.index), self._initial))

    def state_dict(self) -> dict[str, Any]:
        return {"adapters": self._adapters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adapters = state["adapters"]

    @contextmanager
    def _serving(self, run: Run, values: list[Tensor]) -> Iterator[None]:
        current = _copies(run)
        _put(run, values)
        try:
            yield
        finally:
            _put(run, current)


def _copies(run: Run) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.trainable.values()]


@torch.no_grad()
def _put(run: Run, values: list[Tensor]) -> None:
    for parameter, value in zip(run.trainable.values(), values, strict=True):
        parameter.copy_(value)
