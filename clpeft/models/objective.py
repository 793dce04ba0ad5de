"""What a model is trained to do and how wrong it is, per task type."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clpeft.models.virtual_tokens import reads_prefix
from clpeft.streams.batch import IGNORED

if TYPE_CHECKING:
    from torch import nn

    from clpeft.streams.batch import Batch


def beneath_adapter(model: nn.Module) -> Any:
    """The transformers model itself, whether PEFT wraps it or not."""
    return model.get_base_model() if "get_base_model" in dir(model) else model  # type: ignore[operator]


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether a model can be asked for the logits of the last positions only."""
    return "logits_to_keep" in inspect.signature(beneath_adapter(model).forward).parameters


def shift_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """What a decoder reads while it is taught to write `labels`.

    Args:
        labels: Target token ids [B, L], -100 where there is none.
        start: The id that decoding starts with.
        pad: The id that stands in for -100.

    Returns:
        Token ids [B, L]: `start`, then the labels without their last column.
    """
    shifted = torch.roll(labels, 1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, pad)


class Objective(ABC):
    """Forward pass and loss of one task type.

    Losses are sums of negative log-likelihoods; the loop divides them by the number of targets of
    a whole optimizer step, so that accumulation over micro-batches of unequal length is exact.
    """

    def forward(self, model: Callable[..., Any], batch: Batch) -> Any:
        """Runs the model on a batch; returns its output, whose `logits` the losses read."""
        return model(**batch.inputs)

    def per_example(self, outputs: Any, batch: Batch, rows: Tensor | slice = slice(None)) -> Tensor:
        """Negative log-likelihood of each example, summed over its targets: [B], in nats.

        Args:
            outputs: Of the model.
            batch: What it read.
            rows: Which examples are asked for; all of them if not given.
        """
        logits, labels = (found[rows] for found in self.predicted(outputs, batch))
        flat = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        # said in full, for there may be no row
        return flat.view(len(labels), labels.shape[1:].numel()).sum(dim=1)

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        """The task loss of a batch: a scalar, in nats.

        It is the negative log-likelihood summed over the targets of the examples that are in no
        part, each example's multiplied by its weight.
        """
        if batch.weights is not None:
            rows = batch.own_rows
            return (self.per_example(outputs, batch, rows) * batch.weights[rows]).sum()
        logits, labels = self.predicted(outputs, batch)
        if batch.parts:
            logits, labels = logits[batch.own_rows], labels[batch.own_rows]
        return F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def unmasked(
        self, outputs: Any, batch: Batch, rows: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """As `predicted`, of some rows, but with the logits of labels that do not compete too."""
        logits, labels = self.predicted(outputs, batch)
        return logits[rows], labels[rows]

    def for_labels(self, allowed: Tensor) -> Objective:
        """The objective of a task in which these labels compete; a head is masked to them.

        Args:
            allowed: bool [tasks, labels].
        """
        return self

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model makes of each input, before it answers: [B, D] in float32.

        The mean of the last layer's hidden states over the input's own tokens; of an encoder and a
        decoder, the encoder's.
        """
        states, own = self._hidden(model, batch), self._inputs(batch)
        # a model may have read prompts of its own before the text
        states = states[:, -own.shape[1] :].float() * own[..., None]
        return states.sum(dim=1) / own.sum(dim=1, keepdim=True)

    def _hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """The last layer's hidden states, [B, L, D]."""
        return model(**batch.inputs, output_hidden_states=True).hidden_states[-1]

    def _inputs(self, batch: Batch) -> Tensor:
        """Which tokens are the input's own: bool [B, L]."""
        return batch.inputs["attention_mask"].bool()

    @abstractmethod
    def predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels as the loss sees them: [..., K] in float32, and [...] with -100."""


class ClassificationObjective(Objective):
    """A head over the stream's whole label space, masked to the labels that compete.

    Args:
        allowed: Which labels compete for an example of each task: bool [tasks, labels].
    """

    def __init__(self, allowed: Tensor) -> None:
        self.allowed = allowed
        self.masks = not bool(allowed.all())

    def for_labels(self, allowed: Tensor) -> Objective:
        return ClassificationObjective(allowed)

    def _hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        if not reads_prefix(model):
            return super()._hidden(model, batch)
        # behind a prefix PEFT pools what stands second in the outputs: hidden states, if asked for
        states: list[Tensor] = []
        reader = beneath_adapter(model).base_model
        hook = reader.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
        try:
            model(**batch.inputs)
        finally:
            hook.remove()
        return states[0]

    def unmasked(
        self, outputs: Any, batch: Batch, rows: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        return outputs.logits[rows].float(), batch.labels[rows]

    def predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = outputs.logits.float()
        competing = self.allowed[batch.task_ids] if self.masks else None
        if batch.candidates is not None:
            competing = batch.candidates if competing is None else competing & batch.candidates
        if competing is not None:
            logits = logits.masked_fill(~competing, float("-inf"))
        return logits, batch.labels


class CausalObjective(Objective):
    """Next-token prediction over the answer only.

    Args:
        keeps_logits: Whether the model takes `logits_to_keep`; the vocabulary's logits of the
            prompt, most of a step's memory and much of its time, are then never computed.
    """

    def __init__(self, keeps_logits: bool = False) -> None:
        self.keeps_logits = keeps_logits

    def forward(self, model: Callable[..., Any], batch: Batch) -> Any:
        if not self.keeps_logits:
            return model(**batch.inputs)
        # one more than the targets' columns: position t predicts token t+1
        return model(**batch.inputs, logits_to_keep=batch.target_width + 1)

    def _hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        # logits are not asked for; one position's are the fewest there are
        fewest = {"logits_to_keep": 1} if self.keeps_logits else {}
        return model(**batch.inputs, output_hidden_states=True, **fewest).hidden_states[-1]

    def _inputs(self, batch: Batch) -> Tensor:
        return super()._inputs(batch) & (batch.labels == IGNORED)

    def predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        # the last position predicts nothing
        labels = F.pad(batch.labels, (0, 1), value=IGNORED)[:, 1:]
        logits = outputs.logits.float()
        # of one length from the right: a model may keep fewer logits, or have read prompts of
        # its own before the text
        kept = min(logits.shape[1], labels.shape[1])
        return logits[:, -kept:], labels[:, -kept:].contiguous()


class Seq2SeqObjective(Objective):
    """An encoder reads the prompt, a decoder writes the answer.

    Args:
        start: The id that decoding starts with.
        pad: The padding id.
    """

    def __init__(self, start: int, pad: int) -> None:
        self.start = start
        self.pad = pad

    def forward(self, model: Callable[..., Any], batch: Batch) -> Any:
        decoder_input_ids = shift_right(batch.labels, self.start, self.pad)
        return model(**batch.inputs, decoder_input_ids=decoder_input_ids)

    def _hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.forward(model, batch).encoder_last_hidden_state

    def predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return outputs.logits.float(), batch.labels
