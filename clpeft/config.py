"""The root schema, its field declarations, and the names and digests of a config."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf


class ConfigError(ValueError):
    """A mistake in what the user asked for, told in one sentence."""


class RunError(RuntimeError):
    """What a run cannot go on for, told in one sentence."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The options spelled most like `name`, after a sentence; all of them if none is near."""
    known = sorted(options)
    return alike(name, known) or (f" Known: {', '.join(known)}." if known else "")


def alike(name: str, options: Iterable[str]) -> str:
    """The options spelled most like `name`, as a question after a sentence; empty without any."""
    near = difflib.get_close_matches(name, sorted(options), n=3, cutoff=0.5)
    return " Did you mean " + " or ".join(f"'{option}'" for option in near) + "?" if near else ""


def one_of(*options: str) -> Any:
    """A dataclass field that must hold one of some words."""
    return field(default=MISSING, metadata={"options": options})


def at_least(minimum: float, **default: Any) -> Any:
    """A dataclass field that must hold a number no smaller than `minimum`."""
    return field(**{"default": MISSING, **default}, metadata={"minimum": minimum})


def above(limit: float, **default: Any) -> Any:
    """A dataclass field that must hold a number larger than `limit`."""
    return field(**{"default": MISSING, **default}, metadata={"above": limit})


def between(minimum: float, maximum: float, **default: Any) -> Any:
    """A dataclass field that must hold a number from `minimum` to `maximum`."""
    limits = {"minimum": minimum, "maximum": maximum}
    return field(**{"default": MISSING, **default}, metadata=limits)


@dataclass
class WarmupConfig:
    """The short language-model training that gives a generated model something to adapt."""

    steps: int = at_least(0)
    batch_size: int = at_least(1)
    length: int = at_least(8)
    lr: float = at_least(0)
    vocabulary: int = at_least(300)
    # of the model's first weights and of the warm-up; independent of the run's seed, so that all
    # seeds of a study adapt the same base
    seed: int = 0


@dataclass
class ModelConfig:
    """A base model: from the Hub, from a folder, or built from its architecture."""

    name: str = MISSING
    task_type: str = one_of("sequence_classification", "causal_lm", "seq2seq_lm")
    hub_id: str | None = None  # a name on the Hugging Face Hub
    revision: str | None = None
    path: str | None = None  # a local folder; goes before the Hub
    architecture: dict[str, Any] | None = None  # a transformers configuration, built from nothing
    warmup: WarmupConfig | None = None
    dtype: str = field(
        default="float32", metadata={"options": ("float32", "bfloat16", "float16", "auto")}
    )
    attention: str | None = None  # transformers' attn_implementation
    trust_remote_code: bool = False
    adapter_lr: float = at_least(0)  # a learning rate that suits adapters on this model


@dataclass
class OptimizerConfig:
    """The optimizer, made anew for every task."""

    name: str = one_of("adamw", "adam", "sgd", "adamw_8bit", "paged_adamw_8bit")
    lr: float = at_least(0)
    weight_decay: float = at_least(0, default=0.0)
    betas: list[float] = field(
        default_factory=lambda: [0.9, 0.999], metadata={"minimum": 0, "maximum": 0.9999999}
    )
    eps: float = at_least(0, default=1e-8)
    momentum: float = at_least(0, default=0.0)


@dataclass
class SchedulerConfig:
    """The course of the learning rate over one task's steps."""

    name: str = one_of("constant", "linear", "cosine")
    warmup_ratio: float = between(0, 1, default=0.0)  # share of a task's steps


@dataclass
class CheckpointConfig:
    """What is kept to continue a run that was stopped; at task boundaries in any case."""

    enabled: bool = True
    every_steps: int | None = at_least(1, default=None)  # optimizer steps, within tasks too
    every_minutes: float | None = above(0, default=None)  # of wall time, likewise
    keep: int = at_least(1, default=2)  # the newest N


@dataclass
class TrainingConfig:
    """How long and in what portions each task is trained."""

    batch_size: int = at_least(1)  # examples per micro-batch, over all processes
    epochs: int = at_least(1)
    max_steps: int | None = at_least(
        1, default=None
    )  # optimizer steps per task; goes before epochs
    gradient_accumulation: int = at_least(1)  # micro-batches per optimizer step
    max_grad_norm: float | None = above(0, default=None)  # null: no clipping
    precision: str = one_of("no", "bf16", "fp16")
    gradient_checkpointing: bool = MISSING
    compile: bool = MISSING  # the model's forward pass, by torch.compile
    on_nan: str = one_of("stop", "skip")  # a loss or gradient that is not finite
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class EvaluationConfig:
    """When and how tasks are scored."""

    batch_size: int = at_least(1)
    mode: str = one_of("rank", "generate")
    split: str = one_of("test", "validation")
    untrained: bool = True  # row 0 of the matrix
    ahead: bool = True  # the next task, before it is trained: forward transfer
    max_new_tokens: int = at_least(1)  # evaluation.mode=generate, where no answer is longer


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str = one_of("auto", "online", "offline", "disabled")
    project: str = "clpeft"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class TrackingConfig:
    """Who watches a run; never changes a result."""

    # optimizer steps; beside them five steps of every task, evenly spread, are always logged
    log_every: int = at_least(1)
    console: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False


@dataclass
class PathsConfig:
    """Where things lie; never changes a result."""

    output_dir: str = MISSING
    data_dir: str | None = None
    cache_dir: str = MISSING


@dataclass
class Config:
    """One run. The parts typed Any take their schema from the chosen file of their group."""

    model: ModelConfig = field(default_factory=ModelConfig)
    peft: Any = MISSING
    strategies: dict[str, Any] = field(default_factory=dict)
    quantization: Any = MISSING
    stream: Any = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = between(0, 2**32 - 1, default=0)  # what numpy takes
    force: bool = False


# The parts of a config that can change a result, and those that describe what is being compared.
RESULT_KEYS = (
    "model",
    "peft",
    "strategies",
    "quantization",
    "stream",
    "optimizer",
    "scheduler",
    "training",
    "evaluation",
)
SETTING_KEYS = ("model", "peft", "quantization", "stream", "evaluation")


def digest(config: DictConfig, keys: Iterable[str]) -> str:
    """A name for the content of some parts of a config.

    Args:
        config: A composed config.
        keys: Its top-level keys that count. The order of keys inside them counts too, because
            `strategy=[ewc,replay]` and `strategy=[replay,ewc]` are two runs.

    Returns:
        Eight hexadecimal digits.
    """
    content = _content(config, keys)
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:8]


def _content(config: DictConfig, keys: Iterable[str]) -> dict[str, Any]:
    """Some parts of a config, plain, without what cannot change a result."""
    content: dict[str, Any] = {}
    for key in keys:
        # part by part: the whole holds the run directory's name, which is made from this digest
        node = OmegaConf.select(config, key)
        plain = OmegaConf.is_config(node)
        content[key] = OmegaConf.to_container(node, resolve=True) if plain else node
    if "training" in content:
        # how often a run is saved cannot change what it computes
        content["training"] = {k: v for k, v in content["training"].items() if k != "checkpoint"}
    return content


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as `{"optimizer.lr": "0.001", ...}`, values as a command line has them."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def result_settings(config: DictConfig) -> dict[str, str]:
    """The part of a composed config that can change a run's result, flat."""
    return flatten(_content(config, [*RESULT_KEYS, "seed"]))


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """What two flat configs do not share, as `optimizer.lr is 0.1 there and 0.2 here`.

    Args:
        one: "There".
        other: "Here".
    """
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    return ", ".join(
        f"{key} is {one.get(key, 'not set')} there and {other.get(key, 'not set')} here"
        for key in keys
    )


def run_name(config: DictConfig) -> str:
    """A readable name that two different configs never share: `<strategies>-s<seed>-<digest>`."""
    strategies = "+".join(config.strategies)
    return f"{strategies}-s{config.seed}-{digest(config, [*RESULT_KEYS, 'seed'])}"


def _run_name_of_root(*, _root_: DictConfig) -> str:
    return f"{_root_.stream.name}/{run_name(_root_)}"


def _times(number: float, *factors: float) -> str:
    """A sweep over multiples of a number: `1e-4,2e-4` for 1e-4 times 1 and 2."""
    return ",".join(f"{number * factor:.6g}" for factor in factors)


# on import, so that a launcher's worker process, which composes its run anew, knows it too
OmegaConf.register_new_resolver("clpeft.run_name", _run_name_of_root, replace=True)
OmegaConf.register_new_resolver("clpeft.times", _times, replace=True)
