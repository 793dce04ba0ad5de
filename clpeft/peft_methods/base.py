"""What every PEFT method's settings have, and how a method is applied to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from clpeft.models.virtual_tokens import find_last_token
from clpeft.registry import PEFT_METHODS
from clpeft.strategies.base import Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

PEFT_TASK_TYPES = {
    "sequence_classification": "SEQ_CLS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
}


@dataclass
class PeftMethodConfig:
    """Settings that every PEFT method has, and what it declares of itself.

    Attributes:
        companion: What the method does to training itself, as AdaLoRA reallocates ranks: hooks
            that are called after the strategies' own. It is made with these settings.
    """

    method: str = MISSING

    # What the method can do; checked when a run is composed, before a model is loaded.
    task_types: ClassVar[frozenset[str]] = frozenset(PEFT_TASK_TYPES)
    task_types_reason: ClassVar[str | None] = None  # why only those, as the end of a sentence
    supports_quantized: ClassVar[bool] = True
    quantized_reason: ClassVar[str] = "needs dense base weights"  # why not
    supports_gradient_checkpointing: ClassVar[bool] = True
    gradient_checkpointing_reason: ClassVar[str] = ""  # why not
    supports_own_models: ClassVar[bool] = True  # that are no models of transformers
    # Whether PEFT runs one batch for several of its adapters (`adapter_names`), each row as that
    # adapter alone would answer it.
    supports_mixed_batches: ClassVar[bool] = False
    companion: ClassVar[type[Strategy] | None] = None
    # Strategies it cannot be combined with: name -> the reason, as the end of a sentence.
    conflicts: ClassVar[Mapping[str, str]] = {}
    # What PEFT calls its adapter, in lower case; None: as it is called here.
    peft_type: ClassVar[str | None] = None
    # Fields of PEFT's config that say how training goes: an adapter that a run starts from may
    # have others.
    of_training: ClassVar[frozenset[str]] = frozenset()

    @property
    def kind(self) -> str:
        """The method's name, for messages, results and what strategies declare."""
        return self.method

    def trains_on(self, quantization: str) -> bool:
        """Whether it trains on a base that is stored so.

        Args:
            quantization: As `quantization.method`, other than none.
        """
        return self.supports_quantized

    @property
    def trained_whole(self) -> list[str]:
        """Names of the base's modules that train whole; they are not quantized."""
        return []

    @property
    def trains_biases(self) -> bool:
        """Whether biases of the base train."""
        return False

    def check(self) -> None:
        """Refuses impossible settings in one sentence, before a model is loaded.

        Raises:
            ConfigError: If they are impossible.
        """

    def to_go_on(self, saved: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        """What an adapter that a run starts from gives to the one that the run trains.

        Args:
            saved: Name to weight, as the adapter's file has them.
            new: Likewise, those that the run's adapter was made with.

        Returns:
            The weights that the run starts with.
        """
        return saved


def peft_task(model: nn.Module, task_type: str) -> str | None:
    """PEFT's name of a task; None for a model that is not of transformers.

    What PEFT adds to a model by its task, such as `generate`, leans on what those have.
    """
    from transformers import PreTrainedModel

    return PEFT_TASK_TYPES[task_type] if isinstance(model, PreTrainedModel) else None


def apply_peft(model: nn.Module, config: Any, task_type: str, new: Sequence[str]) -> nn.Module:
    """Puts the adapter on a model; leaves trainable just what the method trains.

    Args:
        model: A base model.
        config: Settings of the chosen method.
        task_type: sequence_classification, causal_lm or seq2seq_lm.
        new: Paths of modules that the model's source had no weights for. They train whole and are
            saved with the adapter, which would otherwise stand on weights that nobody else has.

    Returns:
        The model to train.

    Raises:
        ConfigError: If nothing in the model can be adapted.
    """
    from peft import PeftModel

    model = PEFT_METHODS[config.method].target(model, config, task_type, new)
    if isinstance(model, PeftModel):
        find_last_token(model)
    return model


def method_of(peft_type: str) -> str:
    """What the method is called here that PEFT's type of adapter belongs to, in lower case."""
    if peft_type in PEFT_METHODS:
        return peft_type
    named = {entry.config.peft_type: entry.name for entry in PEFT_METHODS}  # type: ignore[attr-defined]
    return named.get(peft_type, peft_type)
