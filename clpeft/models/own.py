"""Models of your own: any module that a registered function builds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from omegaconf import MISSING

from clpeft.config import Config, ConfigError, ModelConfig, at_least
from clpeft.models.targets import ANSWERING
from clpeft.registry import MODELS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from clpeft.streams.base import Stream

# what a module need not have, and how it is told that it does: in `can` of its settings
ABILITIES = {
    "generate": "transformers' generate()",
    "hidden_states": "hidden_states in the output where output_hidden_states=True",
    "checkpoint": "transformers' gradient_checkpointing_enable()",
}


@dataclass
class OwnModelConfig(ModelConfig):
    """Settings that every model of your own has; yours go into a subclass.

    They are given to the function that builds it, with the tokenizer and the size of the stream's
    label space. Its `forward(input_ids, attention_mask)` gives an object with `logits`:
    [batch, labels] of a classifier, [batch, length, vocabulary] of a language model.
    """

    builder: str = MISSING  # the name it is registered under; model=<name> sets it
    # paths of the modules that answer: never adapted, and of a classifier trained whole
    head: list[str] = field(default_factory=list)
    # a folder or a name on the Hub; null: one is trained on the stream's text
    tokenizer: str | None = None
    vocabulary: int = at_least(300, default=2000)  # of a tokenizer that is trained
    # of the weights that the function draws; independent of the run's seed, so that all seeds of
    # a study adapt the same base
    weights_seed: int = 0
    adapter_lr: float = at_least(0, default=1e-3)

    # Which of ABILITIES the module has; checked when a run is composed, before it is built.
    can: ClassVar[frozenset[str]] = frozenset()


def require(config: Config, ability: str, what: str) -> None:
    """Refuses what a model of one's own does not declare that it can do.

    Args:
        config: A run's settings.
        ability: One of `ABILITIES`.
        what: What needs it, as the beginning of a sentence.

    Raises:
        ConfigError: If the model is one's own and does not declare it.
    """
    model = config.model
    if isinstance(model, OwnModelConfig) and ability not in model.can:
        raise ConfigError(
            f"{what} needs {ABILITIES[ability]}, which model={model.builder} does not declare; if "
            f"the module has that, name '{ability}' in {type(model).__name__}.can."
        )


def check_own(config: Config) -> None:
    """Refuses what cannot work with a model of one's own, before it is built.

    Raises:
        ConfigError: If something cannot.
    """
    model = config.model
    if not isinstance(model, OwnModelConfig):
        return
    told = f"model={model.builder} is a model of your own"
    if model.task_type == "seq2seq_lm":
        raise ConfigError(
            f"{told}, which may be a causal_lm or a sequence_classification, not a seq2seq_lm; set "
            f"model.task_type to one of them."
        )
    if model.task_type == "sequence_classification" and not model.head:
        raise ConfigError(
            f"{told} that classifies but names no head; set model.head to the paths of the modules "
            f"that give its logits, such as model.head=[classifier]."
        )
    if config.quantization.method != "none":
        raise ConfigError(
            f"{told}, which quantization={config.quantization.method} cannot be applied to; use "
            f"quantization=none."
        )
    if not config.peft.supports_own_models:
        raise ConfigError(
            f"{told}, which peft={config.peft.kind} does not work with: it needs a model of "
            f"transformers."
        )
    if config.training.gradient_checkpointing:
        require(config, "checkpoint", "training.gradient_checkpointing=true")
    if config.evaluation.mode == "generate":
        require(config, "generate", "evaluation.mode=generate")
    for name, settings in config.strategies.items():
        if vars(settings).get("selection") == "herding":
            require(config, "hidden_states", f"strategies.{name}.selection=herding")


def check_answers(config: Config, stream: Stream) -> None:
    """Refuses tasks whose answers are free text, which a model has to generate.

    Raises:
        ConfigError: If the model is one's own and does not declare that it generates.
    """
    for task in stream.tasks:
        if not task.labels:
            require(config, "generate", f"The task '{task.name}', whose answers are free text,")


def own_tokenizer(config: OwnModelConfig, stream: Stream) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of one's own, which gives input_ids and attention_mask.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    from clpeft.models.generated import train_tokenizer

    if config.tokenizer is None:
        texts = sorted({*stream.training_text(), *stream.neutral_text(config.weights_seed)})
        return train_tokenizer(texts, config.vocabulary)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(
            f"model.tokenizer={config.tokenizer} could not be loaded ({first}); set it to a folder "
            f"that holds a tokenizer, or to null."
        ) from error
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def build_own(
    config: OwnModelConfig, tokenizer: PreTrainedTokenizerBase, labels: int
) -> tuple[nn.Module, list[str]]:
    """Builds a model of one's own.

    Args:
        config: Its settings.
        tokenizer: Its tokenizer.
        labels: Size of the stream's label space.

    Returns:
        The model, and the paths of its modules that have no weights yet: a classifier's head.

    Raises:
        ConfigError: If what the function gives is no module, or has no such head.
    """
    import torch
    from torch import nn

    # its own random state: the same base for all seeds of a study, and the run's draws unchanged
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.weights_seed)
        model = MODELS[config.builder].target(config, tokenizer, labels)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"The function of model={config.builder} gave a {type(model).__name__} and no "
            f"torch.nn.Module."
        )
    if config.dtype != "auto":
        model.to(getattr(torch, config.dtype))
    _check_head(model, config)
    setattr(model, ANSWERING, tuple(config.head))
    # in evaluation torch's own encoder layers would read their weights past any adapter
    torch.backends.mha.set_fastpath_enabled(False)
    return model, list(config.head) if config.task_type == "sequence_classification" else []


def _check_head(model: nn.Module, config: OwnModelConfig) -> None:
    paths = [path for path, _ in model.named_modules() if path]
    for head in config.head:
        if head not in paths:
            raise ConfigError(
                f"model.head names '{head}', which is no module of model={config.builder}; it has "
                f"{', '.join(name for name, _ in model.named_children())}."
            )
        # PEFT finds what trains whole by how its path ends
        also = [path for path in paths if path != head and path.endswith(head)]
        if also:
            raise ConfigError(
                f"model.head names '{head}', which PEFT cannot tell from {also[0]}, because that "
                f"ends alike; rename one of them."
            )


def check_forward(config: ModelConfig, model: nn.Module, labels: int, longest: int) -> None:
    """Checks that a model of one's own reads and answers as clpeft asks it to.

    Args:
        config: The model's settings.
        model: The model, adapted or not.
        labels: Size of the stream's label space.
        longest: Tokens of the longest example.

    Raises:
        ConfigError: If it does not.
    """
    import torch

    if not isinstance(config, OwnModelConfig):
        return
    ids, training = torch.zeros(1, longest, dtype=torch.long), model.training
    try:
        with torch.inference_mode():
            answer = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(
            f"model={config.builder} cannot read {longest} tokens, as the longest example has "
            f"({type(error).__name__}: {first}); it is called as forward(input_ids=..., "
            f"attention_mask=...), and stream.max_length cuts examples."
        ) from error
    finally:
        model.train(training)
    classifies = config.task_type == "sequence_classification"
    wanted = [1, labels] if classifies else [1, longest]
    shape = list(answer.logits.shape) if "logits" in dir(answer) else []
    if shape[:2] != wanted or len(shape) != (2 if classifies else 3):
        found = f"whose logits are {shape}" if shape else "without logits"
        right = str(wanted) if classifies else f"[1, {longest}, vocabulary]"
        raise ConfigError(
            f"model={config.builder} answers an example of {longest} tokens with a "
            f"{type(answer).__name__} {found}; as a {config.task_type} it must give an object "
            f"whose logits are {right}."
        )
