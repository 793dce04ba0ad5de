"""ER-ACE: new examples compete among the new classes only, replayed ones among all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from clpeft.config import Config, ConfigError
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence
from clpeft.strategies.rehearsal import EarlyRehearsal
from clpeft.strategies.replay import Replay, ReplayConfig

if TYPE_CHECKING:
    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
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
class ERACE(EarlyRehearsal, Replay):
    """Replay with L_ce(new; C_curr) + weight · L_ce(replayed; C_old ∪ C_curr).

    A new example's cross-entropy is over the classes of its own task: it does not push down the
    scores of earlier classes, and what was learned of those is not moved all at once. To tell old
    from new is left to the memory, which therefore holds examples of the current task too, from its
    beginning on; without them nothing would ever speak for a new class against an old one. With
    `mixing=separate` (as in the paper) the two are means of their own, with `ratio` one mean over
    all. In the first task there are no earlier classes, and nothing is replayed.

    The paper's C_curr are the classes in the incoming batch, because it knows of no tasks, and its
    memory is filled batch by batch. Here they are the classes of the current task: what is in a
    batch would hang on its size, on micro-batches and on how processes share it.

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
        super().check(config)
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
        self._task = task.index

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        # what another strategy replays is of earlier tasks
        candidates = asymmetric_candidates(batch.task_ids == self._task, self._own)
        if batch.candidates is not None:
            candidates &= batch.candidates
        return super().transform_batch(run, batch.altered(candidates=candidates))

    def _due(self, batch: Batch) -> int:
        return super()._due(batch) if self._task else 0
