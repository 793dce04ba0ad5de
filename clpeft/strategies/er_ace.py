"""ER-ACE: new examples compete among the new classes only, replayed ones among all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from clpeft.config import Config, ConfigError
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence
from clpeft.strategies.replay import Replay, ReplayConfig

if TYPE_CHECKING:
    from clpeft.streams.batch import Batch
    from clpeft.streams.tokenize import EncodedTask
    from clpeft.training.run import Run


@dataclass
class ERACEConfig(ReplayConfig):
    """Settings of ER-ACE."""


def asymmetric_candidates(new: Tensor, labels: Tensor) -> Tensor:
    """Which labels compete for each example: bool [B, K].

    Args:
        new: Whether it is an example of the task being learned, bool [B].
        labels: Which labels are that task's, bool [K]: they alone compete for its examples, and
            for all others every label does.
    """
    return labels | ~new[:, None]


@STRATEGIES.register("er_ace", config=ERACEConfig)
class ERACE(Replay):
    """Replay with L_ce(new; C_curr) + weight · L_ce(replayed; C_old ∪ C_curr).

    A new example's cross-entropy is over the classes of its own task, so that it does not push down
    the scores of earlier classes, and what was learned of those is not moved all at once; the
    memory's examples decide between old and new. With `mixing=separate` (as in the paper) the two
    are means of their own, with `ratio` one mean over all.

    The paper's C_curr are the classes in the incoming batch, because it knows of no tasks. Here it
    is the classes of the current task: what is in a batch would hang on its size, on micro-batches
    and on how processes share it.

    Source: Caccia et al. 2022, New Insights on Reducing Abrupt Representation Change in Online
        Continual Learning.
    """

    config: ERACEConfig
    name = "er_ace"
    evidence: ClassVar = {"er_ace/examples": Evidence.MEMORY}
    task_types: ClassVar[frozenset[str]] = frozenset({"sequence_classification"})
    task_types_reason = (
        "a language model scores tokens, which the answers of old and new classes share, so that "
        "no class can be left out of the competition"
    )

    def check(self, config: Config) -> None:
        if config.stream.scenario != "class":
            raise ConfigError(
                f"The strategy '{self.name}' would be plain replay with stream.scenario="
                f"{config.stream.scenario}, where a new example competes with labels of its own "
                f"task only; use strategy=replay, or stream.scenario=class."
            )

    def before_task(self, run: Run, task: EncodedTask) -> None:
        stream = run.stream.stream
        own = torch.zeros(len(stream.label_names), dtype=torch.bool)
        own[stream.global_labels(task.index)] = True
        self._own = own.to(run.device)

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        mixed = super().transform_batch(run, batch)
        assert run.task is not None
        candidates = asymmetric_candidates(mixed.task_ids == run.task.index, self._own)
        if mixed.candidates is not None:
            candidates &= mixed.candidates
        return mixed.altered(candidates=candidates)
