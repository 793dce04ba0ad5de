"""The layers that a model is a stack of."""

from __future__ import annotations

from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The members of a model's outermost module lists, an encoder's before a decoder's.

    Embeddings, heads and the norm behind the last layer are none of them.
    """
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [layer for child in model.children() for layer in layers_of(child)]
