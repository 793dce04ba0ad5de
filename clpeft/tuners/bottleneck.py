"""Bottleneck adapters as a PEFT method: small networks behind layers that stay as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clpeft.config import ConfigError
from clpeft.tuners.one_adapter import one_adapter
from clpeft.tuners.types import new_peft_type

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}

BOTTLENECK = new_peft_type("BOTTLENECK")


@dataclass
class BottleneckConfig(PeftConfig):
    """What adapter_config.json holds of a bottleneck adapter.

    Attributes:
        target_modules: Names of the modules whose output is adapted; a path that ends in one.
        modules_to_save: Names of modules that train whole and are saved beside the adapter.
        width: Of the bottleneck, in units; goes before `reduction_factor`.
        reduction_factor: By how much the bottleneck is narrower than what it adapts.
        activation: One of `ACTIVATIONS`.
        dropout: Of what the adapter adds.
        scaling: What that is multiplied by.
    """

    target_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    width: int | None = None
    reduction_factor: float = 16.0
    activation: str = "gelu"
    dropout: float = 0.0
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A frozen layer with adapters f(h) = s · dropout(W_up σ(W_down h + b_down) + b_up).

    W_up and b_up are 0 before training. The active adapters act one after another.

    Args:
        base_layer: A linear layer h = W x + b, whose output becomes h + f(h); or a norm, which is
            given a sum z and gives norm(z + f(norm(z))).
        adapter_name: The first adapter's name.
        config: Its settings.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("activation", "dropout", "scaling")

    # what it has of PEFT, which knows no types
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Any
    _cast_input_dtype: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.activation = nn.ModuleDict()
        self.dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self._size = output_size(base_layer)
        self._behind_norm = not isinstance(base_layer, nn.Linear | Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Adds an adapter."""
        width = config.width or max(1, int(self._size / config.reduction_factor))
        up = nn.Linear(width, self._size)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = nn.Linear(self._size, width)
        self.bottleneck_up[adapter_name] = up
        self.activation[adapter_name] = ACTIVATIONS[config.activation]()
        self.dropout[adapter_name] = nn.Dropout(config.dropout)
        self.scaling[adapter_name] = config.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name not in self.bottleneck_down:
                continue
            added = self._added(name, result)
            if self._behind_norm:
                x = x + added.to(x.dtype)
                result = self.base_layer(x, *args, **kwargs)
            else:
                result = result + added.to(result.dtype)
        return result

    def _added(self, name: str, read: Tensor) -> Tensor:
        """f(h) of one adapter, in its own precision."""
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        read = self._cast_input_dtype(read, up.weight.dtype)
        return self.scaling[name] * self.dropout[name](up(self.activation[name](down(read))))


def output_size(layer: Any) -> int:
    """How many numbers a linear layer or a norm gives for each token.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nf
    if type(layer).__name__.endswith("Norm"):
        return layer.weight.numel()
    raise ConfigError(
        f"peft.target names a {type(layer).__name__}, but a bottleneck adapter goes behind linear "
        f"layers and norms; name the output projections of attention or of the feed-forward."
    )


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return one_adapter("A bottleneck adapter", kwargs)

    @staticmethod
    def _prepare_adapter_config(
        peft_config: BottleneckConfig, model_config: dict[str, Any]
    ) -> BottleneckConfig:
        if peft_config.target_modules is None:
            raise ConfigError(
                "BottleneckConfig.target_modules is not set; name the modules whose output is to "
                "be adapted."
            )
        return peft_config

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ConfigError(
            "A bottleneck adapter cannot be merged into the base model: there is a nonlinearity in "
            "it, and a weight is linear; keep the adapter beside the model."
        )


register_peft_method(
    name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel, prefix="bottleneck_"
)
