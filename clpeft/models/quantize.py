"""Base models that are stored in 8 or 4 bits, and how one is got ready to carry an adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from clpeft.config import ConfigError, at_least, one_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BLOCK = 64  # weights that share a scale in 4 bits
# what a state dict has beside tensors of the model: how they are to be read
DESCRIPTIONS = ("weight_format", "quant_state.bitsandbytes__nf4")


@dataclass
class QuantizationConfig:
    """How the frozen base is stored."""

    method: str = MISSING

    package: ClassVar[str] = "bitsandbytes"  # which it needs

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


@dataclass
class TorchAOInt8Config(QuantizationConfig):
    """8 bits per weight and a scale per row, inputs in floating point (torchao)."""

    package: ClassVar[str] = "torchao"

    def told(self, skeleton: PreTrainedModel, kept: Sequence[str]) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(
            Int8WeightOnlyConfig(), modules_to_not_convert=_paths_beside(skeleton, kept)
        )


QUANTIZATIONS: dict[str, type[QuantizationConfig]] = {
    "none": QuantizationConfig,
    "int8": Int8Config,
    "nf4": NF4Config,
    "torchao_int8": TorchAOInt8Config,
}


NOT_QUANTIZED = QuantizationConfig("none")


def quiet_quantization() -> None:
    """Leaves the packages that quantize their errors.

    bitsandbytes says of each product that its inputs are rounded to 16 bits, and as it is imported
    which of its kernels a machine has no package for. torchao, which PEFT imports wherever it is
    installed, says which of its kernels are for another machine, and makes PyTorch say that it
    registers types as it need not any more.
    """
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


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


def _paths_beside(skeleton: PreTrainedModel, kept: Sequence[str]) -> list[str]:
    """Paths of the linear layers that torchao is to leave in floating point.

    transformers compares what it is told to keep with the paths of weights, which end otherwise
    than those of modules: names that modules only end in would go unheard.

    Args:
        skeleton: The model, its weights not needed.
        kept: Names or paths of modules.

    Raises:
        ConfigError: If no layer is left that torchao can quantize.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kept = [*kept, *(skeleton._keep_in_fp32_modules or ())]
    within = re.compile(rf"(.*\.)?({'|'.join(map(re.escape, kept))})(\..*)?")
    layers = [path for path, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    beside = [path for path in layers if within.fullmatch(path)]
    transposed = [p for p, module in skeleton.named_modules() if isinstance(module, Conv1D)]
    if len(beside) == len(layers):
        raise ConfigError(
            f"quantization=torchao_int8 finds no linear layer in {type(skeleton).__name__} that it "
            f"could store in 8 bits; use quantization=int8 or none."
        )
    if transposed:
        log.warning(
            "%d layers stay in floating point: torchao does not quantize transposed ones (%s, ...)",
            *(len(transposed), transposed[0]),
        )
    return beside


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
    if _torchao_layers(model):
        _in_float32(model)
    return model


def _in_float32(model: nn.Module) -> None:
    """Has a model of torchao's compute in float32, as PEFT has those of bitsandbytes."""
    import torch

    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16) and not _is_torchao(parameter):
            parameter.data = parameter.data.float()
    for layer in _torchao_layers(model):
        old = layer.weight
        # the same bytes, which from now on stand for float32
        new = type(old)(old.qdata, old.scale, old.block_size, torch.float32, old.zero_point)
        layer.weight = torch.nn.Parameter(new, requires_grad=False)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A quantized model in floating point, with the weights that rounding has left of its own."""
    from torch import nn

    dtype, layers = model.config.dtype, _torchao_layers(model)
    if not layers:
        return model.dequantize().to(dtype)
    for layer in layers:  # which transformers cannot do for torchao's
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    model.hf_quantizer.remove_quantization_config(model)
    return model.to(dtype)


def _four_bit_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if type(module).__name__ == "Linear4bit")


def _torchao_layers(model: nn.Module) -> list[Any]:
    from torch import nn

    return [m for m in model.modules() if isinstance(m, nn.Linear) and _is_torchao(m.weight)]


def _is_torchao(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "Int8Tensor"


def not_broadcast(model: nn.Module) -> list[str]:
    """Names of the parameters that DDP is not to send from the first process to the others.

    It cannot send torchao's. They are the same bytes everywhere, and frozen.
    """
    return [name for name, parameter in model.named_parameters() if _is_torchao(parameter)]


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
        part.data_ptr(): part.nbytes
        for name, tensor in base.state_dict().items()
        if not name.endswith(DESCRIPTIONS)
        and all(name.startswith(inside) or not name.startswith(of) for of, inside in wrappers)
        for part in _parts(tensor)
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


def _parts(tensor: Any) -> list[Tensor]:
    """What a tensor is stored as: torchao's are weights, scales and zero points."""
    if not _is_torchao(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
