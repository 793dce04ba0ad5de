"""What a model writes behind prompts, whatever its adapter has it read before them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clpeft.models.attention import attention_span
from clpeft.models.objective import beneath_adapter
from clpeft.models.virtual_tokens import before_text, places, reads_prefix, virtual_tokens, widened

if TYPE_CHECKING:
    from transformers import GenerationConfig


def continuations(model: Any, ids: Tensor, mask: Tensor, settings: GenerationConfig) -> Tensor:
    """What a model writes behind prompts.

    Behind a soft prompt PEFT's own `generate` counts the padding that stands between it and the
    text, so that what is written would hang on the batch.

    Args:
        model: A decoder or an encoder-decoder, adapted or not.
        ids: Token ids [B, L], of a decoder padded on the left.
        mask: Which of them are no padding [B, L].
        settings: How it writes, with `max_new_tokens` and `pad_token_id`.

    Returns:
        The tokens written [B, N], those after an end filled up with padding.
    """
    if model.config.is_encoder_decoder:
        # rows begin with the token that decoding starts with
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, 1:]
    count = virtual_tokens(model)
    if not count or not model.active_peft_config.is_prompt_learning:
        rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return rows[:, ids.shape[1] :]
    if reads_prefix(model):
        return _behind_prefix(model, ids, mask, settings)
    prompts, texts = model.get_prompt(len(ids)), model.get_input_embeddings()(ids)
    return model.get_base_model().generate(
        inputs_embeds=before_text(prompts, texts, places(mask, count)),
        attention_mask=widened(mask, count),
        generation_config=settings,
    )


def _behind_prefix(model: Any, ids: Tensor, mask: Tensor, settings: GenerationConfig) -> Tensor:
    """Padding stands between the prefix and a text, and must make them no further apart.

    It does where distance is not told by position ids, and uses up the span of local attention:
    texts of one length are then written at a time, without any.
    """
    lengths = mask.sum(dim=1)
    longest = virtual_tokens(model) + ids.shape[1] + settings.max_new_tokens
    told = "position_ids" in inspect.signature(beneath_adapter(model).forward).parameters
    if bool((lengths == lengths[0]).all()) or (told and longest <= attention_span(model)):
        ids, mask = ids[:, -int(lengths.max()) :], mask[:, -int(lengths.max()) :]
        rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return rows[:, ids.shape[1] :]
    written: dict[int, Tensor] = {}
    for length in lengths.unique():
        alike = (lengths == length).nonzero().flatten()
        rows = _behind_prefix(model, ids[alike], mask[alike], settings)
        written |= dict(zip(alike.tolist(), rows, strict=True))
    ordered = [written[row] for row in range(len(ids))]
    return pad_sequence(ordered, batch_first=True, padding_value=settings.pad_token_id)
