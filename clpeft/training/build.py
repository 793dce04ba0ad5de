"""The objects of a run, from its settings: each needs what is built before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import set_seed

from clpeft.config import Config
from clpeft.evaluation.evaluator import Evaluator
from clpeft.models.load import (
    check_positions,
    load_model,
    load_tokenizer,
    make_objective,
    model_source,
)
from clpeft.models.own import check_answers, check_forward
from clpeft.models.recomputation import recompute_activations
from clpeft.models.weights import base_digest
from clpeft.peft_methods.base import apply_peft
from clpeft.peft_methods.carried import take_over
from clpeft.registry import STRATEGIES
from clpeft.stopping import StopRequests
from clpeft.streams.build import build_stream
from clpeft.streams.encoded import EncodedStream, encode_stream
from clpeft.tracking.base import Observer
from clpeft.training.accelerator import make_accelerator
from clpeft.training.checkpoint import Checkpoints
from clpeft.training.cost import Cost
from clpeft.training.loop import Loop
from clpeft.training.run import Run, allowed_labels

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def build_run(config: Config, directory: Path) -> Run:
    """Stream, tokenizer, model, adapter and strategies of a run.

    Args:
        config: Its settings, checked.
        directory: The run directory.

    Raises:
        ConfigError: If the settings do not fit what is loaded, or it cannot be loaded.
    """
    accelerator = make_accelerator(config.training.precision)
    cache_dir = Path(config.paths.cache_dir).expanduser()
    stream = build_stream(config.stream, data_dir=config.paths.data_dir)
    check_answers(config, stream)
    with accelerator.main_process_first():  # which fills the caches for the others
        source = model_source(config.model, stream, cache_dir)
        tokenizer = load_tokenizer(config.model, source, stream)
        encoded = encode_stream(stream, tokenizer, config.model.task_type, cache_dir=str(cache_dir))
    # from here on the run's own draws: a new head, the adapter's first weights, dropout
    set_seed(config.seed)
    model, base = _adapted(config, source, tokenizer, encoded, accelerator)
    allowed = allowed_labels(encoded, 0).to(accelerator.device)
    return Run(
        config,
        directory,
        accelerator,
        model,
        tokenizer,
        encoded,
        make_objective(config.model, model, tokenizer, allowed),
        [STRATEGIES[name].target(values) for name, values in config.strategies.items()],
        base,
        source,
        config.peft.companion and config.peft.companion(config.peft),
    )


def _adapted(
    config: Config,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedStream,
    accelerator: Accelerator,
) -> tuple[nn.Module, str]:
    """The model with its adapter, on its device, and what its base's weights are known by."""
    labels, whole = len(encoded.stream.label_names), config.peft.trained_whole
    model, new = load_model(config.model, source, tokenizer, labels, config.quantization, whole)
    with accelerator.main_process_first():
        cache_dir = Path(config.paths.cache_dir).expanduser()
        base = base_digest(config.model, model, source, cache_dir)
    model = apply_peft(model, config.peft, config.model.task_type, new)
    take_over(model, source, config.peft)
    if config.training.gradient_checkpointing:
        recompute_activations(model)
    check_positions(model, encoded.longest)
    check_forward(config.model, model, labels, encoded.longest)
    return model.to(accelerator.device), base


def make_loop(run: Run, observer: Observer, checkpoints: Checkpoints, stop: StopRequests) -> Loop:
    """The loop of a run; its strategies are yet to be set up."""
    given = any(strategy.needs_task_id_at_eval for strategy in run.strategies)
    evaluator = Evaluator(run, task_id_given=given or run.config.stream.scenario == "task")
    return Loop(run, evaluator, observer, checkpoints, Cost(), stop)
