"""Gradient checkpointing: activations inside layers are computed again rather than kept."""

from __future__ import annotations

from torch import nn

from clpeft.models.objective import beneath_adapter


def recompute_activations(model: nn.Module) -> None:
    """Has a model keep the inputs of its layers alone, for the backward pass (Chen et al. 2016).

    Args:
        model: Adapted or not.
    """
    base = beneath_adapter(model)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers has the embeddings' output ask for gradients, which reentrant checkpoints need;
    # here the backward pass would go on below the lowest adapter for nothing
    base.disable_input_require_grads()
    # what it would turn off itself, with a warning that breaks a compiled forward pass in two
    base.config.use_cache = False
