"""Full fine-tuning by turns: embeddings, head and a random few layers train at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from clpeft.config import ConfigError, at_least
from clpeft.models.layers import layers_of
from clpeft.peft_methods.base import PeftMethodConfig
from clpeft.registry import PEFT_METHODS
from clpeft.strategies.base import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


def drawn_layers(layers: int, active: int, generator: torch.Generator) -> list[int]:
    """So many different layers, every choice as likely as any other."""
    return torch.randperm(layers, generator=generator)[:active].tolist()


class LayersInTurn(Strategy):
    """Every K optimizer steps a fresh draw of γ layers trains; the others are frozen.

    While steps are made, a layer that is off has no gradient, is not decayed and has no state in
    the optimizer: what it had is dropped when it goes off, and it begins anew when its turn comes
    again. Between tasks all layers are on, so that what strategies look at then (importances) is
    the whole model. The period is known from the run's steps, and its draw from that and the seed:
    there is nothing that a checkpoint or another process would have to be told.

    Source: Pan et al. 2024, LISA: Layerwise Importance Sampling for Memory-Efficient Large
        Language Model Fine-Tuning, algorithm 1.
    """

    config: LisaLayerwiseSettings
    supports_multi_process = True

    def setup(self, run: Run) -> None:
        self._layers = [list(layer.parameters()) for layer in layers_of(run.model)]
        self._period: int | None = None
        self._off: list[nn.Parameter] = []
        if run.world_size > 1:
            from accelerate import DistributedDataParallelKwargs

            # else DDP waits for the gradients of layers that are off
            run.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Changes no batch; it is what comes first in a step."""
        period = run.step // self.config.every
        if period != self._period:
            self._turn(run, period)
            self._period = period
        return batch

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Drops what a strategy may have given to layers that are off; logs how much is on."""
        for parameter in self._off:
            parameter.grad = None
        if not run.logging:
            return {}
        total = sum(parameter.numel() for parameter in run.trainable.values())
        off = sum(parameter.numel() for parameter in self._off)
        return {"lisa_layerwise/active_share": 1 - off / total}

    def after_task(self, run: Run, task: EncodedTask) -> None:
        self._switch(on=range(len(self._layers)))
        self._period = None

    def _turn(self, run: Run, period: int) -> None:
        """Switches to the layers of a period."""
        generator = run.generator_for(f"lisa_layerwise/{period}")
        self._switch(on=drawn_layers(len(self._layers), self.config.active_layers, generator))
        for parameter in self._off:
            run.optimizer.state.pop(parameter, None)

    def _switch(self, on: Sequence[int]) -> None:
        chosen = {id(parameter) for index in on for parameter in self._layers[index]}
        parameters = [parameter for layer in self._layers for parameter in layer]
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in chosen)
        self._off = [parameter for parameter in parameters if not parameter.requires_grad]


@dataclass
class LisaLayerwiseSettings(PeftMethodConfig):
    """Settings of layerwise importance sampling."""

    supports_quantized: ClassVar[bool] = False
    quantized_reason: ClassVar[str] = "trains the base's own weights in floating point"
    companion: ClassVar[type[Strategy] | None] = LayersInTurn
    conflicts: ClassVar[Mapping[str, str]] = {
        "rwalk": "its running Fisher needs every weight's gradient at every step, and layers that "
        "are off have none"
    }

    active_layers: int = at_least(1)  # that train at a time
    every: int = at_least(1)  # optimizer steps between two draws


@PEFT_METHODS.register("lisa_layerwise", config=LisaLayerwiseSettings)
def apply_lisa_layerwise(
    model: PreTrainedModel, config: LisaLayerwiseSettings, task_type: str, new: Sequence[str]
) -> PreTrainedModel:
    """Leaves the model as it is, with every parameter trainable; `LayersInTurn` says when.

    Raises:
        ConfigError: If it has no layers, or fewer than are to train at a time.
    """
    layers = len(layers_of(model))
    if not layers:
        raise ConfigError(
            f"peft=lisa_layerwise finds no layers in {type(model).__name__}, which has no "
            f"nn.ModuleList; use peft=full."
        )
    if layers < config.active_layers:
        raise ConfigError(
            f"peft.active_layers={config.active_layers} is too large: {type(model).__name__} has "
            f"{layers} layers; set it to {layers} or less, or train them all with peft=full."
        )
    return model.requires_grad_(True)
