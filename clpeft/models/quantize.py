"""Base models that are stored in 8 or 4 bits, and how one is got ready to carry an adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from clpeft.config import at_least, one_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BLOCK = 64  # weights that share a scale in 4 bits
# what a state dict has beside tensors of the model: how they are to be read
DESCRIPTIONS = ("weight_format", "quant_state.bitsandbytes__nf4")


@dataclass
class QuantizationConfig:
    """How the frozen base is stored."""

    method: str = MISSING

    def told(self, skeleton: PreTrainedModel, kept: Sequence[str]) -> Any:
        """What `from_pretrained` takes as `quantization_config`.

        Args:
            skeleton: The model, its weights not needed.
            kept: Paths of modules that stay in floating point.
        """
        raise AssertionError("only asked where there is one")


@dataclass
class Int8Config(QuantizationConfig):
    """LLM.int8() (Dettmers et al. 2022): 8 bits per weight and a scale per row."""

    threshold: float = at_least(0)  # inputs beyond it are multiplied in 16 bits; 0: none are

    def told(self, skeleton: PreTrainedModel, kept: Sequence[str]) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=self.threshold,
            llm_int8_skip_modules=list(kept),
        )


@dataclass
class NF4Config(QuantizationConfig):
    """4-bit NormalFloat (Dettmers et al. 2023, QLoRA): 16 levels, a scale per 64 weights."""

    double_quantization: bool = MISSING  # the scales in 8 bits too
    compute_dtype: str = one_of("float32", "bfloat16", "float16")  # of products with the base

    def told(self, skeleton: PreTrainedModel, kept: Sequence[str]) -> Any:
        from transformers import BitsAndBytesConfig

        kept = [*kept, *_misread(skeleton, kept)]
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=self.compute_dtype,
            llm_int8_skip_modules=list(kept),
        )


QUANTIZATIONS: dict[str, type[QuantizationConfig]] = {
    "none": QuantizationConfig,
    "int8": Int8Config,
    "nf4": NF4Config,
}


NOT_QUANTIZED = QuantizationConfig("none")


def quiet_bitsandbytes() -> None:
    """Leaves it its errors.

    It says of each product that its inputs are rounded to 16 bits, and as it is imported which of
    its kernels a machine has no package for.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def kept_whole(skeleton: PreTrainedModel, new: Sequence[str], named: Sequence[str]) -> list[str]:
    """What of a model stays in floating point: heads, new modules, and those that train whole.

    Args:
        skeleton: The model, its weights not needed.
        new: Paths of modules that the source has no weights for.
        named: Names of modules that the user has train whole.
    """
    backbone, head = skeleton.base_model, skeleton.get_output_embeddings()
    heads = [path for path, module in skeleton.named_modules() if module is head]
    if backbone is not skeleton:
        heads += [name for name, child in skeleton.named_children() if child is not backbone]
    return sorted({*heads, *new, *named})


def _misread(skeleton: PreTrainedModel, kept: Sequence[str]) -> list[str]:
    """Paths of further linear layers, which bitsandbytes would get wrong in 4 bits on a CPU.

    With AVX-512 it takes a row's first weight for the first of a block. Where blocks of 64
    go on from one row into the next, weights are given the scales of others (seen in 0.50.2, with
    rows of 16 to 176 weights, errors of 60 to 100 %).
    """
    import torch
    from torch import nn

    if torch.accelerator.is_available():
        return []
    found = [
        path
        for path, module in skeleton.named_modules()
        if path not in kept
        and (
            (type(module) is nn.Linear and module.in_features % BLOCK)
            or (type(module).__name__ == "Conv1D" and module.weight.shape[0] % BLOCK)
        )
    ]
    if found:
        log.warning(
            "%d linear layers stay in floating point: bitsandbytes misreads on a CPU what has "
            "other than a multiple of %d inputs (%s, ...)",
            *(len(found), BLOCK, found[0]),
        )
    return found


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Gets a quantized model ready to train an adapter on.

    All of it is frozen, and what is not quantized (norms, embeddings, heads) computes in float32,
    where 16 bits would be too few to add up small changes in.
    """
    from peft import prepare_model_for_kbit_training

    # with checkpointing that is not reentrant, which a run turns on itself, nothing more is needed
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for layer in _four_bit_layers(model):
        # On a CPU with AVX512-BF16 the first evaluation would pack the weights anew, for a product
        # that has no gradient: later training would go on without the base's part of it.
        layer.support_avx512bf16_for_cpu = False
        if layer.bias is not None:
            # as the first forward pass would, which would change the base while it trains
            layer.bias.data = layer.bias.data.to(layer.compute_dtype)
    return model


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A quantized model in floating point, with the weights that rounding has left of its own."""
    dtype = model.config.dtype
    return model.dequantize().to(dtype)


def _four_bit_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if type(module).__name__ == "Linear4bit")


def number_of_weights(parameter: Any) -> int:
    """How many weights a parameter stands for: of one in 4 bits two to each entry."""
    if type(parameter).__name__ == "Params4bit":
        return parameter.quant_state.shape.numel()
    return parameter.numel()


def base_bytes(model: nn.Module) -> int:
    """What the base's frozen weights take, with the scales and levels that a quantized one needs.

    Args:
        model: With an adapter or without. What an adapter brings is not counted, be it frozen.
    """
    from peft import PeftModel

    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    wrappers = tuple(_wrappers(base))
    frozen = {
        tensor.data_ptr(): tensor.nbytes
        for name, tensor in base.state_dict().items()
        if not name.endswith(DESCRIPTIONS)
        and all(name.startswith(inside) or not name.startswith(of) for of, inside in wrappers)
    }
    return sum(size for place, size in frozen.items() if place not in trained)


def _wrappers(base: nn.Module) -> Iterator[tuple[str, str]]:
    """How the names of an adapter's modules begin, and those of what is the base's in each."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield f"{name}.", f"{name}.base_layer."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield f"{name}.", f"{name}.original_module."
