"""Gradient checkpointing under every PEFT method: the same gradients, from fewer activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.training.run import Run
from tests.running import build_it, compose_only
from tests.settings import PEFT_SETTINGS

Overrides = Callable[..., list[str]]

# without nvcc there is no CUDA extension of BOFT's; it is not needed for one butterfly factor
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
]


def gradients(run: Run) -> tuple[list[Tensor], int]:
    """Of a batch, and how many numbers its layers kept for the backward pass."""
    kept, inside = 0, False

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * inside
        return tensor

    layers = [m for m in run.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers
    for layer in layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    batch = run.loader(run.stream.tasks[0].train).batch(0)
    torch.manual_seed(0)
    run.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run.mean_loss(batch)
    found = torch.autograd.grad(loss, list(run.trainable.values()), allow_unused=True)
    return [g for g in found if g is not None], kept


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", sorted(PEFT_SETTINGS))
def test_gradients_are_the_same(
    tiny: Overrides, tmp_path: Path, name: str, quantization: str
) -> None:
    model = PEFT_SETTINGS[name].models[0]
    settings: Any = settle(compose_only(tiny("finetune", model=model, peft=name))).peft
    if quantization != "none" and not settings.supports_quantized:
        return  # refused whether activations are recomputed or not: tests of combinations
    overrides = tiny("finetune", f"quantization={quantization}", model=model, peft=name)
    checkpointed = [*overrides, "training.gradient_checkpointing=true"]
    if not settings.supports_gradient_checkpointing:
        with pytest.raises(ConfigError, match=settings.gradient_checkpointing_reason):
            settle(compose_only(checkpointed))
        return
    plain, kept = gradients(build_it(overrides, tmp_path))
    found, kept_less = gradients(build_it(checkpointed, tmp_path))

    assert plain
    assert len(found) == len(plain)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one, other)
    if name == "frozen":
        assert kept == 0  # nothing goes back below its head
    else:
        assert 0 < kept_less < kept / 5


def test_nothing_goes_on_below_the_lowest_adapter(tiny: Overrides, tmp_path: Path) -> None:
    """Frozen embeddings need no gradient: what comes back to them would be computed for nothing."""
    run = build_it(tiny("finetune", "training.gradient_checkpointing=true"), tmp_path)
    seen: list[bool] = []
    embeddings = run.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda m, i, output: seen.append(output.requires_grad))
    gradients(run)

    assert seen == [False]
