"""Dark experience replay: the model goes on saying of old examples what it said of them once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clpeft.config import above, at_least
from clpeft.models.objective import IGNORED
from clpeft.registry import STRATEGIES
from clpeft.strategies import readings
from clpeft.strategies.base import Evidence
from clpeft.strategies.rehearsal import Mixing, MixingConfig
from clpeft.streams.batch import Batch, concatenate, set_aside

if TYPE_CHECKING:
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@dataclass
class DERConfig(MixingConfig):
    """Settings of DER."""

    alpha: float = above(0)  # weight of the distance to the stored logits
    top_k: int = at_least(1)  # logits that are kept of each answer token of a language model


def kept_logits(logits: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each target, and which they are.

    Args:
        logits: [B, L, K].
        labels: [B, L], -100 where there is no target; the labels themselves play no part.
        count: How many of the K are kept, at most.

    Returns:
        The logits in float32 and their indices in int32, [B, W, count] each: the k-th target of an
        example has the k-th place, wherever in L it stands. W is the largest number of targets
        that an example has; after an example's last one come zeros.
    """
    targets = labels != IGNORED
    width = int(targets.sum(dim=1).max())
    order = targets.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    values, ids = logits.topk(min(count, logits.shape[-1]), dim=-1)
    places = order[..., None].expand(-1, -1, values.shape[-1])
    empty = ~targets.gather(1, order)[..., None]
    return (
        values.gather(1, places).masked_fill(empty, 0.0).float(),
        ids.gather(1, places).masked_fill(empty, 0).int(),
    )


def distances(logits: Tensor, labels: Tensor, kept: Tensor, ids: Tensor) -> Tensor:
    """How far each example's logits are from those that were kept: [B] in float32.

    The mean of (h − z)² over the indices kept, and over the example's targets.

    Args:
        logits: h, [B, L, K].
        labels: [B, L], -100 where there is no target.
        kept: z as `kept_logits` gave it, [B, W, count]; W may be larger than any example needs.
        ids: Their indices, likewise.
    """
    targets = labels != IGNORED
    # the column of the k-th target looks up the k-th place
    places = (targets.cumsum(dim=1) - 1).clamp(min=0)[..., None].expand(-1, -1, kept.shape[-1])
    found = logits.gather(-1, ids.long().gather(1, places)).float()
    squares = (found - kept.gather(1, places)).square().mean(dim=-1)
    return squares.masked_fill(~targets, 0.0).sum(dim=1) / targets.sum(dim=1).clamp(min=1)


@STRATEGIES.register("der", config=DERConfig)
class DER(Mixing):
    """loss += α · mean over drawn examples of ‖h(x′) − z′‖² / n, z′ the n logits when stored.

    α is that of the paper's code, whose `mse_loss` is a mean over examples and over logits, too.
    A classification head is held at all its logits, also those of labels that do not compete or
    that came later, as in the paper. Of a language model they are the `top_k` largest logits of
    each answer token (the mean is over them, then over the answer's tokens, then over examples, so
    that an example counts alike however long its answer is). They are compared as they are, not
    about their mean: a softmax does not change if all logits move alike, but it does if only the
    kept ones do. The others are held by nothing of their own.

    z′ is read once, after the example's task, without dropout. The paper stores what the model
    said when an example passed by during training, into a memory that is read from the first step
    on; here as in all strategies a memory gets a task's examples when the task is over, so that
    what is held is the model as the task left it. Nothing is added during the first task.

    Source: Buzzega et al. 2020, Dark Experience for General Continual Learning, equation 5.
    """

    config: DERConfig
    name = "der"
    evidence: ClassVar = {"loss/der": Evidence.PENALTY}

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        count = self._due(batch)
        if not count:
            return batch
        return concatenate([batch, *self._recalled(run, count)], run.collator.pad_token_id)

    def _recalled(self, run: Run, count: int) -> list[Batch]:
        """What follows the new examples: this process's share of each draw, set aside."""
        memory, rows = self._memory, self._memory.sample(count).numpy()
        own = torch.from_numpy(run.share_of(rows))
        notes = {name: note[own].to(run.device) for name, note in memory.notes.items()}
        return [set_aside(run.shared_batch(memory.columns, rows), self.name, notes)]

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        part = batch.parts.get(self.name)
        if part is None:
            return {}
        logits, labels = _answers(run, outputs, batch, part.rows)
        total = distances(logits, labels, part.notes["logits"], part.notes["ids"]).sum()
        return {self.name: self.config.alpha * run.per_example(total, self.name)}

    def _remembered(self, run: Run, task: EncodedTask, rows: Tensor) -> None:
        """Reads the logits of the examples that are new in the memory; others keep theirs."""
        if self._memory.examples is None or not len(rows):
            return

        def kept(batch: Batch) -> Tensor:
            outputs = run.objective.forward(run.model, batch)
            logits, labels = _answers(run, outputs, batch, slice(None))
            count = self.config.top_k if batch.labels.dim() == 2 else logits.shape[-1]
            # doubles hold both, exactly
            return torch.stack([x.double() for x in kept_logits(logits, labels, count)], dim=-1)

        found = readings.read(run, self._memory.examples.select(rows.tolist()), kept)
        new = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        for name, values in (("logits", new[..., 0].float()), ("ids", new[..., 1].int())):
            nothing = values.new_zeros(len(self._memory), 0, values.shape[2])
            known = self._memory.notes.get(name, nothing)
            width = max(known.shape[1], values.shape[1])
            filled = widened(known, width).index_copy(0, rows, widened(values, width))
            self._memory.notes[name] = filled


def widened(notes: Tensor, width: int) -> Tensor:
    """Notes [N, W, k] with zeros after each row's own, so that W becomes `width`."""
    return torch.nn.functional.pad(notes, (0, 0, 0, width - notes.shape[1]))


def _answers(run: Run, outputs: Any, batch: Batch, rows: slice) -> tuple[Tensor, Tensor]:
    """Logits [B, L, K] and labels [B, L]; a head's are those of an answer of one token."""
    logits, labels = run.objective.unmasked(outputs, batch, rows)
    return (logits, labels) if labels.dim() == 2 else (logits[:, None], labels[:, None])


@dataclass
class DERPPConfig(DERConfig):
    """Settings of DER++."""

    beta: float = above(0)  # weight of the loss on the second draw's labels


@STRATEGIES.register("derpp", config=DERPPConfig)
class DERPP(DER):
    """loss += α · mean ‖h(x′) − z′‖² / n + β · CE(x″, y″), x′ and x″ drawn independently.

    The first term is DER's. The second is the task loss of the second draw, a mean over its own
    targets; old examples compete against the labels that the scenario lets compete.

    Source: Buzzega et al. 2020, Dark Experience for General Continual Learning, equation 6.
    """

    config: DERPPConfig
    name = "derpp"
    evidence: ClassVar = {
        "loss/derpp": Evidence.PENALTY,
        "loss/derpp_labels": Evidence.TERM,
    }
    labels_name: ClassVar[str] = "derpp_labels"
    conflicts: ClassVar[dict[str, str]] = {
        "der": "derpp is der with one term more, and its alpha is that of der"
    }

    def _recalled(self, run: Run, count: int) -> list[Batch]:
        recalled = super()._recalled(run, count)
        return [*recalled, set_aside(self._memory.draw(run, count), self.labels_name)]

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        terms = super().loss_terms(run, batch, outputs)
        if self.labels_name in batch.parts:
            total = run.per_example_loss(batch, outputs, self.labels_name).sum()
            terms[self.labels_name] = self.config.beta * run.per_target(total, self.labels_name)
        return terms
