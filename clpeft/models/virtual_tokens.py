"""Tokens of its own that an adapter has the model read before each text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def virtual_tokens(model: nn.Module) -> int:
    """How many tokens of its own a model reads before each text: a soft prompt's or a prefix's."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return 0
    return model.active_peft_config.to_dict().get("num_virtual_tokens") or 0


def reads_prefix(model: nn.Module) -> bool:
    """Whether a model reads learned keys and values (prefix tuning) before its tokens' own."""
    from peft import PeftModel, PeftType

    return isinstance(model, PeftModel) and model.peft_type == PeftType.PREFIX_TUNING


def places(mask: Tensor, count: int) -> Tensor:
    """The order in which virtual tokens stand right before each text, behind its padding.

    Args:
        mask: Which tokens are no padding [B, L], on whichever side that is.
        count: V, how many virtual tokens there are.

    Returns:
        Indices [B, V + L] into the virtual tokens followed by the text's.
    """
    padding = mask.cumsum(dim=1) == 0
    groups = F.pad(torch.where(padding, 0, 2), (count, 0), value=1)
    return groups.argsort(dim=1, stable=True)


def before_text(states: Tensor, text: Tensor, order: Tensor) -> Tensor:
    """What belongs to the virtual tokens [B, V, ...] and to the text [B, L, ...] as one.

    Args:
        states: Of the virtual tokens.
        text: Of the text's tokens.
        order: Of `places`.

    Returns:
        [B, V + L, ...].
    """
    together = torch.cat([states.to(text.dtype), text], dim=1)
    return together[torch.arange(len(order), device=order.device)[:, None], order]


def widened(mask: Tensor, count: int) -> Tensor:
    """A mask of padding [B, L] with so many tokens right before each text: [B, L + count]."""
    return before_text(mask.new_ones(len(mask), count), mask, places(mask, count))


def find_last_token(model: PeftModel) -> None:
    """Has a decoder's classification head read the text's last token behind a soft prompt, too.

    It looks for padding among token ids, of which PEFT makes embeddings to put its prompt before
    them; without ids it takes the last position, which is padding for all but the longest text of
    a batch.
    """
    base = model.get_base_model()
    counts = "score" in dict(base.named_children())  # the ids, up to the last that is no padding
    if not (counts and model.active_peft_config.is_prompt_learning):
        return
    last: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        last.clear()
        mask = given.get("attention_mask")
        if mask is not None and given.get("inputs_embeds") is not None:
            positions = torch.arange(mask.shape[1], device=mask.device)
            last.append((mask.bool() * positions).argmax(dim=1))

    def pick(head: nn.Module, given: tuple[Tensor]) -> tuple[Tensor] | None:
        (states,) = given
        if not last or states.shape[1] == 1:  # which is the one, if another hook has picked it
            return None
        return (states[torch.arange(len(states), device=states.device), last[0]][:, None],)

    base.register_forward_pre_hook(note, with_kwargs=True)
    base.score.register_forward_pre_hook(pick)
