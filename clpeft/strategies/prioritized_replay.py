"""Prioritized replay: what the model gets wrong is replayed more often, and weighted for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clpeft.config import Config, ConfigError, above, at_least, between
from clpeft.models.objective import IGNORED
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence
from clpeft.strategies.replay import Replay, ReplayConfig

if TYPE_CHECKING:
    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run

PRIORITY = "priority"  # the note beside each of the memory's examples


@dataclass
class PrioritizedReplayConfig(ReplayConfig):
    """Settings of prioritized replay."""

    alpha: float = at_least(0)  # how much priorities count in the draw; 0: all examples alike
    beta: float = between(0, 1)  # how much of that the weights take back as a task begins
    beta_end: float = between(0, 1)  # and as it ends; in between the number rises evenly
    epsilon: float = above(0)  # in nats; what is added to a loss, so that nothing is never drawn


def draw_probabilities(priorities: Tensor, alpha: float) -> Tensor:
    """P(i) = p_i^α / Σ_k p_k^α.

    Args:
        priorities: [N]; 0 where an example was not replayed yet, which then has the highest of all.
        alpha: 0 draws all alike.
    """
    highest = priorities.max()
    powers = torch.where(priorities > 0, priorities, highest if highest > 0 else 1.0) ** alpha
    return powers / powers.sum()


def importance_weights(chances: Tensor, drawn: Tensor, beta: float) -> Tensor:
    """(N · P(i))^−β of the examples drawn: what each counts, since it was drawn so often.

    Args:
        chances: P of all examples, [N].
        drawn: Which were drawn, [n].
        beta: 1 takes all of the draw's preference back, 0 nothing.

    Returns:
        [n]; to be divided by their maximum.
    """
    return (len(chances) * chances[drawn]) ** -beta


@dataclass
class Draw:
    """What was drawn for one micro-batch.

    Attributes:
        rows: Of the memory, for all processes together: [n].
        weights: Of these rows, not yet divided by their maximum: [n] on the CPU.
        place: Where this process's share of them stands in the micro-batch.
        carried: The weights of the share as the micro-batch carries them: a view.
    """

    rows: Tensor
    weights: Tensor
    place: slice
    carried: Tensor


@STRATEGIES.register("prioritized_replay", config=PrioritizedReplayConfig)
class PrioritizedReplay(Replay):
    """Replay that draws by P(i) ∝ p_i^α and weights losses by w_i = (N·P(i))^−β / max w.

    p_i is the loss of the memory's example i when it was last replayed, plus ε: the mean over its
    answer's tokens, because by their sum long answers would be drawn for their length, and from
    the training's own forward pass. Until it is replayed an example has the highest priority of
    all, as in the paper: by its loss at the end of its own task, where that is smallest, it might
    not be drawn before it is long forgotten.

    Draws are without replacement: one after another by P among those left. The maximum is over all
    that is drawn for an optimizer step, which depends neither on micro-batches nor on processes. β
    rises evenly from `beta` to `beta_end` in the course of each task. The weights multiply the
    losses of the examples, in the one mean over all targets (`mixing=ratio`) or in the term's
    (`separate`), and these means count all targets alike: weights only ever make replay weaker.

    Source: Schaul et al. 2016, Prioritized Experience Replay, section 3 (proportional variant).
    """

    config: PrioritizedReplayConfig
    name = "prioritized_replay"
    evidence: ClassVar = {"prioritized_replay/examples": Evidence.MEMORY}

    def check(self, config: Config) -> None:
        super().check(config)
        beta, end = self.config.beta, self.config.beta_end
        if end < beta:
            raise ConfigError(
                f"strategies.{self.name}.beta_end={end} is less than strategies.{self.name}."
                f"beta={beta}, but the weights have to take back more of the draw's preference as "
                f"a task ends, not less; set beta_end to {beta} or more."
            )

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._step = -1  # the step that the next three belong to
        self._draws: list[Draw | None] = []  # of its micro-batches, in their order
        self._losses: list[Tensor | None] = []  # of what was drawn, where the model has read it
        self._largest = 0.0  # of its weights
        # rows and losses of the step before, on the device: looking at them waits for it
        self._unread: list[tuple[Tensor, Tensor]] = []

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        if run.step != self._step:
            self._update_priorities()
            self._step, self._draws, self._losses, self._largest = run.step, [], [], 0.0
        count = self._due(batch)
        if not count:
            self._draws.append(None)
            return batch
        chances = draw_probabilities(self._memory.notes[PRIORITY], self.config.alpha)
        rows = self._memory.sample(count, chances=chances)
        beta = self.config.beta + (self.config.beta_end - self.config.beta) * run.progress
        weights = importance_weights(chances, rows, beta)
        drawn = run.shared_batch(self._memory.columns, rows.numpy())
        own = torch.from_numpy(run.share_of(weights.numpy())).float().to(run.device)
        mixed = self._mixed(run, batch, drawn.altered(weights=own))
        assert mixed.weights is not None
        place = slice(len(batch), len(mixed))
        self._carry(Draw(rows, weights, place, mixed.weights[place]))
        return mixed

    def _carry(self, draw: Draw) -> None:
        """Divides the weights of all that was drawn for the step so far by their maximum."""
        largest = max(self._largest, float(draw.weights.max()))
        draw.carried.div_(largest)
        for earlier in self._draws:
            if earlier is not None:
                earlier.carried.mul_(self._largest / largest)
        self._draws.append(draw)
        self._largest = largest

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        # micro-batches are read in the order in which they were drawn for
        draw = self._draws[len(self._losses)]
        losses = None if draw is None else self._mean_losses(run, batch, outputs, draw)
        self._losses.append(losses)
        return super().loss_terms(run, batch, outputs)

    @torch.no_grad()
    def _mean_losses(self, run: Run, batch: Batch, outputs: Any, draw: Draw) -> Tensor:
        """The loss per target of each example drawn, 0 where it is another process's: [n]."""
        losses = run.objective.per_example(outputs, batch, draw.place)
        targets = (batch.labels[draw.place] != IGNORED).reshape(len(losses), -1).sum(dim=1)
        found = losses.new_zeros(len(draw.rows))
        share = found[run.rank :: run.world_size]  # none where there was none left
        share += (losses / targets)[: len(share)]
        return found

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes none; passes on what was found, and logs what is replayed and how it counts."""
        draws = [draw for draw in self._draws if draw is not None]
        if not draws:
            return super().transform_gradients(run)
        found = run.sum_gradients([losses for losses in self._losses if losses is not None])
        self._unread = [(draw.rows, losses) for draw, losses in zip(draws, found, strict=True)]
        weight = float(torch.cat([draw.weights for draw in draws]).mean()) / self._largest
        return {**super().transform_gradients(run), f"{self.name}/weight": weight}

    def _update_priorities(self) -> None:
        for rows, losses in self._unread:
            new = losses.double().cpu() + self.config.epsilon
            usable = new.isfinite()  # in fp16 a loss may overflow, and the step is left out
            self._memory.notes[PRIORITY][rows[usable]] = new[usable]
        self._unread = []

    def after_task(self, run: Run, task: EncodedTask) -> None:
        self._update_priorities()
        super().after_task(run, task)

    def _remembered(self, run: Run, task: EncodedTask, rows: Tensor) -> None:
        # afterwards the memory itself gives 0 to what is new
        zeros = torch.zeros(len(self._memory), dtype=torch.float64)
        self._memory.notes.setdefault(PRIORITY, zeros)

    def state_dict(self) -> dict[str, Any]:
        self._update_priorities()
        return super().state_dict()
