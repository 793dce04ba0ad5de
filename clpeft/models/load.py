"""Base models and their tokenizers, from the Hub, a folder, or built here."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clpeft.config import ConfigError, ModelConfig
from clpeft.models.adapted import check_adapter, check_plain, whole_source
from clpeft.models.generated import generated_base
from clpeft.models.objective import (
    CausalObjective,
    ClassificationObjective,
    Objective,
    Seq2SeqObjective,
    takes_logits_to_keep,
)
from clpeft.models.own import OwnModelConfig, build_own, own_tokenizer
from clpeft.models.quantize import (
    NOT_QUANTIZED,
    QuantizationConfig,
    kept_whole,
    number_of_weights,
    prepare,
)
from clpeft.models.virtual_tokens import virtual_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from clpeft.streams.base import Stream

log = logging.getLogger(__name__)

# what modules that hold a vector per position are called
POSITIONS = {"position_embeddings", "embed_positions", "wpe"}


def check_model(config: ModelConfig) -> None:
    """Checks what can be known of a model without loading it.

    Raises:
        ConfigError: If it has no source, or its folder is not one of a model.
    """
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"model.path={config.path} is not a folder; it must hold a model as "
                f"save_pretrained writes it (config.json, weights, tokenizer)."
            )
        if isinstance(config, OwnModelConfig):
            return
        if (folder / "status.json").is_file():
            raise ConfigError(
                f"model.path={config.path} is the directory of a run; take an adapter of it, "
                f"{config.path}/adapters/<k>_<task>, or what `clpeft export` writes of it."
            )
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ConfigError(
                f"model.path={config.path} holds neither config.json nor adapter_config.json, so "
                f"it is not a model's folder as save_pretrained writes it."
            )
        check_adapter(str(folder))
    elif isinstance(config, OwnModelConfig):
        return
    elif config.hub_id is None and config.architecture is None:
        raise ConfigError(
            f"model={config.name} says nowhere what to load; set model.path to a folder, "
            f"model.hub_id to a name on the Hub, or model.architecture to build one."
        )


def model_source(config: ModelConfig, stream: Stream, cache_dir: Path) -> str:
    """Where a model is loaded from: a folder or a name on the Hub."""
    if config.path is not None:
        return str(Path(config.path).expanduser())
    if isinstance(config, OwnModelConfig):
        return config.builder
    if config.architecture is not None:
        return str(generated_base(config, stream, cache_dir))
    assert config.hub_id is not None
    return config.hub_id


def load_tokenizer(
    config: ModelConfig, source: str, stream: Stream | None = None
) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer, with a padding token.

    Args:
        config: The model's settings.
        source: A folder or a name on the Hub.
        stream: The text that one is trained on, if it is a model's own that has none.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if isinstance(config, OwnModelConfig):
        assert stream is not None
        tokenizer = own_tokenizer(config, stream)
    else:
        if not (Path(source) / "tokenizer_config.json").is_file():
            source = whole_source(source)
        tokenizer = _loaded(AutoTokenizer, source, config)
    if tokenizer.pad_token is None:
        # padding is masked everywhere, so that any token will do; the usual one is end-of-text
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    config: ModelConfig,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    labels: int,
    quantization: QuantizationConfig = NOT_QUANTIZED,
    whole: Sequence[str] = (),
) -> tuple[torch.nn.Module, list[str]]:
    """Loads or builds a base model.

    Args:
        config: The model's settings.
        source: A folder or a name on the Hub; of an adapter's folder, the base it stands on is
            loaded.
        tokenizer: Its tokenizer.
        labels: Size of the stream's label space, for a classification head.
        quantization: How the base is stored.
        whole: Names of its modules that train whole, and so are not quantized.

    Returns:
        The model, and the paths of its modules that the source has no weights for. A classifier
        has such besides its head where the source is a language model, as a BERT's pooler is.

    Raises:
        ConfigError: If it cannot be loaded, or is stored quantized already.
    """
    if isinstance(config, OwnModelConfig):
        return build_own(config, tokenizer, labels)
    source = whole_source(source)
    _check_is_plain(source, config)
    options: dict[str, Any] = {"dtype": _dtype(config.dtype), "output_loading_info": True}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    auto = _auto(config.task_type)
    if config.task_type == "sequence_classification":
        options |= {"num_labels": labels, "ignore_mismatched_sizes": True}
    if quantization.method != "none":
        # what it is made of, without its weights: which modules are new is known only then
        skeleton, found = _loaded(auto, source, config, **options, device_map="meta")
        kept = kept_whole(skeleton, _new_modules(found), whole)
        options["quantization_config"] = quantization.told(skeleton, kept)
    model, found = _loaded(auto, source, config, **options)
    check_plain(model, found["unexpected_keys"], source)
    model.config.pad_token_id = tokenizer.pad_token_id
    if quantization.method != "none":
        model = prepare(model)
    return model, _new_modules(found)


def skeleton_of(config: ModelConfig, source: str) -> PreTrainedModel:
    """What a base model of transformers is made of, without its weights.

    Args:
        config: The model's settings.
        source: A folder or a name on the Hub.

    Raises:
        ConfigError: If there is no such model.
    """
    return _loaded(_auto(config.task_type), whole_source(source), config, device_map="meta")


def _auto(task_type: str) -> Any:
    """The class of transformers that loads models for a kind of task."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    return {
        "causal_lm": AutoModelForCausalLM,
        "seq2seq_lm": AutoModelForSeq2SeqLM,
        "sequence_classification": AutoModelForSequenceClassification,
    }[task_type]


def make_objective(
    config: ModelConfig,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    allowed: torch.Tensor,
) -> Objective:
    """The forward pass and loss that go with a model.

    Args:
        config: The model's settings.
        model: The loaded model.
        tokenizer: Its tokenizer.
        allowed: Labels that compete, for a classification head: bool [tasks, labels].
    """
    if config.task_type == "sequence_classification":
        return ClassificationObjective(allowed)
    if config.task_type == "causal_lm":
        return CausalObjective(takes_logits_to_keep(model))
    start = model.config.decoder_start_token_id  # type: ignore[union-attr]
    return Seq2SeqObjective(start, tokenizer.pad_token_id)  # type: ignore[arg-type]


def check_positions(model: torch.nn.Module, longest: int) -> None:
    """Checks that a model which learned a vector per position has one for every token.

    Args:
        model: The model, adapted or not.
        longest: Tokens of the longest example.

    Raises:
        ConfigError: If it has too few.
    """
    limit, virtual = positions(model), virtual_tokens(model)
    if longest > limit:
        taken = f", {virtual} of which virtual tokens take" if virtual else ""
        fewer = ", or peft.num_virtual_tokens lower" if virtual else ""
        raise ConfigError(
            f"The longest example has {longest} tokens, but the model knows {limit + virtual} "
            f"positions{taken}; set stream.max_length={max(limit, 1)} or less{fewer}."
        )


def positions(model: torch.nn.Module) -> float:
    """How many tokens of a text a model has a learned position for, beside its virtual tokens.

    Without limit where it learns no positions.
    """
    limit = math.inf
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and path.split(".")[-1] in POSITIONS:
            # OPT and BART begin to count at an offset, RoBERTa behind the padding's id
            behind = 0 if module.padding_idx is None else module.padding_idx + 1
            offset = vars(module).get("offset", behind)
            limit = min(limit, module.num_embeddings - offset)
    return limit - virtual_tokens(model)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """How many numbers a model holds and how many of them train: (total, trainable)."""
    parameters = list(model.parameters())
    return (
        sum(number_of_weights(p) for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )


def _new_modules(found: dict[str, Any]) -> list[str]:
    """Paths of the modules that a source has no weights for, from what loading it told."""
    return sorted({name.rpartition(".")[0] for name in found["missing_keys"]})


def _check_is_plain(source: str, config: ModelConfig) -> None:
    """Checks that a model's source is not quantized.

    Raises:
        ConfigError: If it is: what of it is quantized, and how, would not be what the run's
            settings say.
    """
    from transformers import PretrainedConfig

    found, _ = PretrainedConfig.get_config_dict(source, revision=config.revision or "main")
    if "quantization_config" in found:
        raise ConfigError(
            f"The model at {source} is stored quantized already; take one with plain weights, and "
            f"quantization=nf4 or int8."
        )


def _dtype(name: str) -> torch.dtype | str:
    if name == "auto":
        return name
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]


def _loaded(auto: Any, source: str, config: ModelConfig, **options: Any) -> Any:
    try:
        return auto.from_pretrained(
            source,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        where = f"model.path={source}" if config.path else f"the Hub name '{source}'"
        raise ConfigError(
            f"{auto.__name__} could not load model={config.name} from {where} "
            f"({str(error).splitlines()[0]}); point model.path at a folder that holds it."
        ) from error
