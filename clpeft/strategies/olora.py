"""O-LoRA: every task learns in a LoRA subspace orthogonal to those of earlier tasks."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clpeft.config import Config, ConfigError, at_least, one_of
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence, Strategy, StrategyConfig

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run

ADAPTER = "default"


@dataclass
class OLoRAConfig(StrategyConfig):
    """Settings of O-LoRA."""

    lambda1: float = at_least(0)  # weight of the orthogonality term
    lambda2: float = at_least(0)  # weight of the norms of the new A and B
    reduction: str = one_of("sum", "mean")  # of |A_prev A_new^T|; mean does not grow with r·modules
    # whether earlier adapters become part of the base, for a constant forward cost; null: unless
    # the base is quantized
    merge_previous: bool | None = None


def orthogonality(previous: Tensor, new: Tensor) -> Tensor:
    """Σ_modules Σ_jk |A_prev A_newᵀ|_jk.

    Args:
        previous: Rows that earlier tasks used, [modules, k·r, d_in].
        new: Rows of the task being learned, [modules, r, d_in].

    Returns:
        A scalar; 0 where every new row is orthogonal to every earlier one.

    Source: Wang et al. 2023, Orthogonal Subspace Learning for Language Model Continual Learning,
        equation 7 (absolute values as in its code).
    """
    return torch.bmm(previous, new.transpose(1, 2)).abs().sum()


@STRATEGIES.register("olora", config=OLoRAConfig)
class OLoRA(Strategy):
    """A new LoRA per task; earlier ones are frozen but stay active.

    loss += λ1 Σ |A_prev A_newᵀ| + λ2 Σ (‖A_new‖_F + ‖B_new‖_F). Inference needs no task identity.
    With `merge_previous` the earlier updates s·B·A are added to the base weights, otherwise they
    are computed beside them; A_prev is kept either way, for the term. A task head, where there is
    one, is shared by all tasks and not protected.

    Source: Wang et al. 2023, Orthogonal Subspace Learning for Language Model Continual Learning.
    """

    config: OLoRAConfig
    supports_multi_process = True
    owns_adapters = True
    peft_types = frozenset({"lora"})
    evidence: ClassVar = {"loss/orthogonality": Evidence.PENALTY}

    def check(self, config: Config) -> None:
        if config.peft.use_dora:
            raise ConfigError(
                "peft.use_dora=true does not work with strategy=olora, which freezes and merges "
                "updates of the form s·B·A; set peft.use_dora=false."
            )
        if config.peft.bias != "none":
            raise ConfigError(
                f"peft.bias={config.peft.bias} does not work with strategy=olora: biases would be "
                f"shared by all tasks' adapters; set peft.bias=none."
            )
        patterns = {
            "rank_pattern": config.peft.rank_pattern,
            "alpha_pattern": config.peft.alpha_pattern,
        }
        for name, pattern in patterns.items():
            if pattern is not None:
                raise ConfigError(
                    f"peft.{name} does not work with strategy=olora, which writes the updates of "
                    f"all tasks as one LoRA of one rank and scaling; set peft.{name}=null."
                )
        if config.peft.init_lora_weights != "default":
            raise ConfigError(
                f"peft.init_lora_weights={config.peft.init_lora_weights} does not work with "
                f"strategy=olora, which starts each task's A and B as LoRA's paper does; set "
                f"peft.init_lora_weights=default."
            )
        if self.config.merge_previous and config.quantization.method != "none":
            raise ConfigError(
                f"strategies.olora.merge_previous=true adds to the base's weights, which "
                f"quantization={config.quantization.method} would round anew at every task; set "
                f"strategies.olora.merge_previous=null, which computes updates beside such a base."
            )

    def setup(self, run: Run) -> None:
        self._previous_a: dict[str, Tensor] = {}  # by module path, [k·r, d_in]
        self._previous_b: dict[str, Tensor] = {}  # [d_out, k·r]
        self._active_rows = 0  # rows of the above that act apart from the adapter itself
        self._layers = _lora_layers(run)
        self._stacks: list[tuple[list[Any], Tensor]] = []
        merges = self.config.merge_previous
        self._merges = run.config.quantization.method == "none" if merges is None else merges
        if not self._merges:
            for path, layer in self._layers.items():
                layer.register_forward_hook(self._adding_previous(path, layer))

    def before_task(self, run: Run, task: EncodedTask) -> None:
        if not self._previous_a:
            return
        self._activate(next(iter(self._previous_a.values())).shape[0])
        for layer in self._layers.values():
            layer.reset_lora_parameters(ADAPTER, True)

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        terms = {}
        if self._stacks:
            total = torch.zeros((), device=run.device)
            count = 0
            for weights, previous in self._stacks:
                new = torch.stack(weights)
                total = total + orthogonality(previous, new)
                count += previous.shape[0] * previous.shape[1] * new.shape[1]
            if self.config.reduction == "mean":
                total = total / count
            terms["orthogonality"] = self.config.lambda1 * total
        if self.config.lambda2:
            norms = [
                weight.norm()
                for layer in self._layers.values()
                for weight in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
            ]
            terms["olora_norm"] = self.config.lambda2 * torch.stack(norms).sum()
        return terms

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes none; logs ‖ΔW_new‖_F, so that an update squeezed to nothing shows."""
        if not run.logging:
            return {}
        with torch.no_grad():
            squares = [
                layer.get_delta_weight(ADAPTER).norm() ** 2 for layer in self._layers.values()
            ]
        return {"olora/update_norm": torch.stack(squares).sum().sqrt()}

    def after_task(self, run: Run, task: EncodedTask) -> None:
        for path, layer in self._layers.items():
            a = layer.lora_A[ADAPTER].weight.detach().clone()
            b = layer.lora_B[ADAPTER].weight.detach().clone()
            if path in self._previous_a:
                a = torch.cat([self._previous_a[path], a])
                b = torch.cat([self._previous_b[path], b], dim=1)
            self._previous_a[path] = a
            self._previous_b[path] = b

    def save_adapter(self, run: Run, task: EncodedTask, directory: Path) -> bool:
        """Writes the sum of all updates so far as one LoRA of rank k·r, for the plain base."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        model: Any = run.model
        config = copy.deepcopy(model.peft_config[ADAPTER])
        rank = next(iter(self._previous_a.values())).shape[0]
        scaling = next(iter(self._layers.values())).scaling[ADAPTER]
        config.r = rank
        config.lora_alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
        config.inference_mode = True
        weights = get_peft_model_state_dict(model, adapter_name=ADAPTER)
        for path in self._layers:
            for letter, previous in (("A", self._previous_a), ("B", self._previous_b)):
                key = f"{path}.lora_{letter}.weight"
                assert key in weights, f"{key} is not among the adapter's weights"
                weights[key] = previous[path]
        directory.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(directory)
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "previous_a": self._previous_a,
            "previous_b": self._previous_b,
            "active_rows": self._active_rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(iter(self._layers.values())).lora_A[ADAPTER].weight.device
        self._previous_a = {path: a.to(device) for path, a in state["previous_a"].items()}
        self._previous_b = {path: b.to(device) for path, b in state["previous_b"].items()}
        if state["active_rows"]:
            self._activate(state["active_rows"])

    def _activate(self, rows: int) -> None:
        """Lets the updates of earlier tasks act beside the adapter, up to a number of rows of A."""
        if self._merges:
            for path, layer in self._layers.items():
                # on resume several tasks at once, in the same order of additions
                r = layer.r[ADAPTER]
                for start in range(self._active_rows, rows, r):
                    _merge(
                        layer,
                        self._previous_a[path][start : start + r],
                        self._previous_b[path][:, start : start + r],
                    )
        self._active_rows = rows
        self._stacks = self._grouped()

    def _grouped(self) -> list[tuple[list[Any], Tensor]]:
        """New A weights with the earlier rows of their modules, stacked by shape."""
        groups: dict[torch.Size, list[str]] = defaultdict(list)
        for path in self._layers:
            groups[self._previous_a[path].shape].append(path)
        return [
            (
                [self._layers[path].lora_A[ADAPTER].weight for path in paths],
                torch.stack([self._previous_a[path] for path in paths]),
            )
            for paths in groups.values()
        ]

    def _adding_previous(self, path: str, layer: LoraLayer) -> Any:
        def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = self._active_rows
            if not rows:
                return output
            a, b = self._previous_a[path][:rows], self._previous_b[path][:, :rows]
            update = (inputs[0].to(a.dtype) @ a.T) @ b.T
            return output + layer.scaling[ADAPTER] * update.to(output.dtype)

        return add


def _lora_layers(run: Run) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {
        path: module
        for path, module in run.model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }


@torch.no_grad()
def _merge(layer: Any, a: Tensor, b: Tensor) -> None:
    """Adds s·B·A to the frozen weight beneath an adapter."""
    update = layer.scaling[ADAPTER] * (b @ a)
    weight = layer.get_base_layer().weight
    weight += (update.T if layer.fan_in_fan_out else update).to(weight.dtype)
