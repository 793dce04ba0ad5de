"""Base models built here from their configuration, so that nothing needs a download.

A tokenizer is trained on the stream's own training text and on text that belongs to no task, and
the model is warmed up on the latter: without that an adapter has no features to adapt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clpeft.config import ConfigError, ModelConfig
from clpeft.models.warmup import warm_up

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from clpeft.streams.base import Stream

log = logging.getLogger(__name__)

FORMAT = 3  # raised when the way a base is built changes, so that cached ones are not mistaken


def generated_base(config: ModelConfig, stream: Stream, cache_dir: Path) -> Path:
    """The folder of a generated base model for a stream; built the first time.

    Args:
        config: A model with an `architecture`.
        stream: Where the tokenizer's and the warm-up's text comes from.
        cache_dir: Built bases are kept below it, by a fingerprint of all that they depend on.

    Returns:
        A folder that transformers' Auto classes load.
    """
    assert config.architecture is not None
    assert config.warmup is not None
    training = sorted(set(stream.training_text()))
    neutral = stream.neutral_text(config.warmup.seed)
    recipe = [FORMAT, config.architecture, vars(config.warmup), training, neutral]
    fingerprint = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    folder = cache_dir / "bases" / f"{config.name}-{fingerprint}"
    if folder.is_dir():
        return folder
    log.info("building %s and warming it up for %d steps", config.name, config.warmup.steps)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        # its own random state: the run's draws are the same whether the base was cached or not
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.warmup.seed)
            tokenizer = train_tokenizer(training + neutral, config.warmup.vocabulary)
            model = _from_architecture(config.architecture, tokenizer)
            warm_up(model, tokenizer, neutral, config.warmup)
        tokenizer.save_pretrained(aside)
        model.save_pretrained(aside)
        try:
            os.rename(aside, folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer (Sennrich et al. 2016) with the usual special tokens.

    Args:
        texts: What it is trained on.
        vocabulary: Its size at most, in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _from_architecture(
    architecture: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    settings = dict(architecture)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"model.architecture does not describe a model of transformers: {error}."
        ) from error
    config.vocab_size = len(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    kind = type(config)
    # an encoder is also in the causal mapping (as a decoder that it could be), so it goes first
    for mapping, auto in (
        (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
        (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    ):
        if kind in mapping:
            return auto.from_config(config)
    raise ConfigError(
        f"model.architecture.model_type={config.model_type} is no language model that can be "
        f"warmed up; choose an encoder, a decoder or an encoder-decoder."
    )
