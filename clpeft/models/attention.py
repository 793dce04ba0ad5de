"""How far a model's attention looks back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from clpeft.models.objective import beneath_adapter

if TYPE_CHECKING:
    from torch import nn

# how configurations call the number of tokens that a layer with local attention looks back over
SPANS = ("sliding_window", "window_size", "attention_chunk_size")


def attention_span(model: nn.Module) -> float:
    """How many tokens every layer looks back over; infinite where attention is not local."""
    described = beneath_adapter(model).config.get_text_config().to_dict()
    return min((described[name] for name in SPANS if described.get(name)), default=math.inf)
