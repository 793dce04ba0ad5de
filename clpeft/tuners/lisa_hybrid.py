"""A soft prompt and LoRA as one PEFT method: both train, and lie in one adapter folder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PromptEmbedding, PromptTuningInit, TaskType
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from clpeft.models.virtual_tokens import before_text, places, widened
from clpeft.tuners.one_adapter import one_adapter
from clpeft.tuners.types import new_peft_type

LISA_HYBRID = new_peft_type("LISA_HYBRID")


@dataclass
class LisaHybridConfig(LoraConfig):
    """What adapter_config.json holds of a soft prompt and LoRA.

    The prompt's settings are called as those of PEFT's prompt tuning, whose module it is.

    Attributes:
        num_virtual_tokens: Embeddings in the prompt.
        prompt_tuning_init: What they begin as.
        prompt_tuning_init_text: The text whose embeddings they begin as, if any.
        tokenizer_name_or_path: What cuts that text into tokens.
        tokenizer_kwargs: How that is loaded.
        token_dim: Numbers in an embedding; seen from the model.
        num_transformer_submodules: How many parts of the model have a prompt of their own.
    """

    num_virtual_tokens: int = 20
    prompt_tuning_init: str = PromptTuningInit.SAMPLE_VOCAB
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    token_dim: int | None = None
    num_transformer_submodules: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LISA_HYBRID


class LisaHybridModel(LoraModel):
    """LoRA's tuner, and a soft prompt that the model reads with each text.

    It stands right before the text; right behind its first token where that is what a
    classification head reads, as in BERT. The prompt is put in where token ids become embeddings,
    and what becomes of it is taken out again behind the last layer, so that the model is called as
    without it and answers in the same shapes. Of an encoder and a decoder the encoder reads it, and
    the decoder sees what becomes of it.
    """

    def _pre_injection_hook(self, model: Any, config: LisaHybridConfig, name: str) -> None:
        self.soft_prompt = nn.ModuleDict()
        self._reads_prompt = True
        self._order: Tensor | None = None  # `places` in the call under way, if it reads the prompt
        if model.config.is_encoder_decoder:
            reader, decoder = model.get_encoder(), model.get_decoder()
            hooks = [decoder.register_forward_pre_hook(self._uncover, with_kwargs=True)]
        else:
            reader = _reader(model)
            hooks = [reader.register_forward_hook(self._take_out)]
        # heads of decoders, which read the last token, are called score
        last = model.config.is_encoder_decoder or "score" in dict(model.named_children())
        self._first_is_read = config.task_type == TaskType.SEQ_CLS and not last
        self._hooks = [*hooks, reader.register_forward_pre_hook(self._put_in, with_kwargs=True)]

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config, embeddings = self.peft_config[adapter_name], model.get_input_embeddings()
        config.token_dim = embeddings.embedding_dim
        prompt = PromptEmbedding(config, embeddings).embedding
        if not prompt.weight.is_meta:
            prompt.to(embeddings.weight.device)
        trains = adapter_name in self.active_adapters and not config.inference_mode
        self.soft_prompt[adapter_name] = prompt.requires_grad_(trains)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, prompt in self.soft_prompt.items():
            prompt.requires_grad_(name in self.active_adapters and not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.soft_prompt[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.soft_prompt[adapter_name]

    def unload(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        return super().unload()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("Soft prompts of several adapters have no weighted sum.")

    def _check_merge_allowed(self) -> None:
        raise ValueError("A soft prompt cannot be merged into a model's weights.")

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return one_adapter("A soft prompt with LoRA", kwargs)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._reads_prompt = enabled

    @property
    def _width(self) -> int:
        """How many virtual tokens the active adapters have together: V."""
        return sum(self.peft_config[name].num_virtual_tokens for name in self.active_adapters)

    def _prompts(self, rows: int) -> Tensor:
        """The embeddings of the active adapters' prompts, one after another: [rows, V, D]."""
        prompts: list[Any] = [self.soft_prompt[name] for name in self.active_adapters]
        # looked up for every example, so that each has gradients of its own
        every = [torch.arange(p.num_embeddings, device=p.weight.device) for p in prompts]
        found = [p(ids.expand(rows, -1)) for p, ids in zip(prompts, every, strict=True)]
        return torch.cat(found, dim=1)

    def _put_in(
        self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Before the module that makes embeddings of token ids."""
        self._order = None
        if not self._reads_prompt:
            return None
        given = _by_name(reader, args) | kwargs
        cache = given.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            return (), self._behind_prompt(given)
        return (), self._with_prompt(reader, given)

    def _with_prompt(self, reader: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """What the reader is given, with the prompt right before the text."""
        ids, text = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        if text is None:
            text = reader.get_input_embeddings()(ids)  # type: ignore[operator]
        mask = given.get("attention_mask")
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        order = places(mask, self._width)
        if self._first_is_read:  # and the text has no padding before it
            order[:, : self._width + 1] = order[:, : self._width + 1].roll(1, dims=1)
        self._order, mask = order, widened(mask, self._width)
        changed = {
            "inputs_embeds": before_text(self._prompts(len(text)), text, order),
            "attention_mask": mask,
        }
        if given.get("position_ids") is not None:
            changed["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        if given.get("token_type_ids") is not None:
            kinds = given["token_type_ids"]
            none = kinds.new_zeros(len(kinds), self._width)
            changed["token_type_ids"] = before_text(none, kinds, order)
        return given | changed

    def _behind_prompt(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the reader is given of a text that it has read the beginning of, prompt and all."""
        changed = {}
        if given.get("attention_mask") is not None:
            changed["attention_mask"] = widened(given["attention_mask"], self._width)
        if given.get("position_ids") is not None:
            changed["position_ids"] = given["position_ids"] + self._width
        return given | changed

    def _take_out(self, reader: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind the last layer."""
        if self._order is None:
            return
        text = self._order.argsort(dim=1)[:, self._width :]
        rows = torch.arange(len(text), device=text.device)[:, None]
        output.last_hidden_state = output.last_hidden_state[rows, text]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(states[rows, text] for states in output.hidden_states)

    def _uncover(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Before a decoder, which is given the encoder's states but the text's mask."""
        given = _by_name(decoder, args) | kwargs
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is None or mask is None:
            return None
        return (), given | {
            "encoder_attention_mask": widened(mask, states.shape[1] - mask.shape[1])
        }


def _reader(model: nn.Module) -> nn.Module:
    """The innermost of a model's models that makes embeddings of token ids.

    Outer ones are not always called: OPT's language model calls the decoder within its model.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    holders = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and embeddings in list(module.modules())
    ]
    return holders[-1]


def _by_name(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments given by their place, by their names."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False))


register_peft_method(
    name="lisa_hybrid", config_cls=LisaHybridConfig, model_cls=LisaHybridModel, prefix="lora_"
)
