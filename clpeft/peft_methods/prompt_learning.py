"""What PEFT's methods that learn prompts have in common: prompts, P-tuning, prefixes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from clpeft.config import ConfigError
from clpeft.models.load import check_positions
from clpeft.peft_methods.wrap import HEADS

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.config import PromptLearningConfig
    from transformers import PreTrainedModel


def learn_prompt(
    model: PreTrainedModel, config: PromptLearningConfig, name: str, new: Sequence[str]
) -> PeftModel:
    """Freezes a model and has it read virtual tokens.

    Args:
        model: The base model.
        config: PEFT's settings of the method, without the model's sizes.
        name: The method's, for messages.
        new: Paths of the model's modules that train whole.

    Raises:
        ConfigError: If the model has no way to read them.
    """
    from peft import PeftType, get_peft_model

    config.modules_to_save = [path for path in new if not HEADS & set(path.split("."))] or None
    if config.peft_type == PeftType.PREFIX_TUNING:
        config.num_layers, config.num_attention_heads, config.token_dim = kept_sizes(model)
        if model.config.is_encoder_decoder:
            # PEFT hands each layer two pairs of keys and values, of which it drops the second; but
            # it makes one per layer, so that layers would have those of others
            config.num_layers *= 2
    else:
        config.num_layers = model.config.num_hidden_layers
        config.num_attention_heads = model.config.num_attention_heads
        config.token_dim = model.get_input_embeddings().embedding_dim
        # PEFT would make a second prompt for a decoder, and leave it unused
        config.num_transformer_submodules = 1
    adapted = get_peft_model(model, config)
    check_positions(adapted, 1)
    check_reads(adapted, name)
    return adapted


def trial(model: Any) -> dict[str, torch.Tensor]:
    """The shortest input that every kind of model reads; of BART, a classifier must see an end."""
    end = model.config.eos_token_id
    ids = torch.tensor([[end if isinstance(end, int) else 0]], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def kept_sizes(model: Any) -> tuple[int, int, int]:
    """What a model keeps of a token it has read: layers, heads, and numbers over all heads.

    The decoder's, of an encoder and a decoder. It is seen from what is kept of a trial: queries
    may share heads, and sizes have many names. An encoder, which keeps nothing, is asked for them.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        sizes = model.config
        return sizes.num_hidden_layers, sizes.num_attention_heads, sizes.hidden_size
    kept = model(**trial(model), use_cache=True).past_key_values
    own = kept.self_attention_cache if model.config.is_encoder_decoder else kept
    _, heads, _, width = own.layers[0].keys.shape
    return len(own.layers), heads, heads * width


@torch.no_grad()
def check_reads(adapted: PeftModel, name: str) -> None:
    """Checks that a model's architecture takes what a method puts before the text.

    Raises:
        ConfigError: If it does not.
    """
    try:
        adapted(**trial(adapted))
    except Exception as error:  # whatever it is that its layers stumble over
        raise ConfigError(
            f"peft={name} does not work with {type(adapted.get_base_model()).__name__}"
            f" ({str(error).splitlines()[0].rstrip('.')}); choose another PEFT method, such as"
            f" peft=lora."
        ) from error
