"""One experiment: a checked config becomes objects, the objects train, and results come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from omegaconf import DictConfig

from clpeft.config import Config, result_settings, run_name
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
from clpeft.serving import record_serving
from clpeft.stopping import StopRequests
from clpeft.streams.base import build_stream
from clpeft.streams.tokenize import encode_stream
from clpeft.tracking.base import Observer, Observers
from clpeft.tracking.build import build_observers, describe
from clpeft.tracking.history import HistoryObserver
from clpeft.training.accelerator import make_accelerator
from clpeft.training.checkpoint import Checkpoints, restore
from clpeft.training.cost import Cost
from clpeft.training.loop import Loop
from clpeft.training.results import collect
from clpeft.training.run import Run, allowed_labels


def run_experiment(
    config: Config, composed: DictConfig, directory: Path, stop: StopRequests
) -> dict[str, Any]:
    """Trains a model through a stream under a strategy, from the start or from a checkpoint.

    Args:
        config: The settings, checked.
        composed: The same as composed, for names and digests.
        directory: The run directory.
        stop: Whether the process was asked to stop.

    Returns:
        What results.json holds.
    """
    run = build_run(config, directory)
    settings = result_settings(composed) | {"the base model's weights": run.base}
    checkpoints = Checkpoints(directory, config.training.checkpoint, settings)
    if run.accelerator.is_main_process:
        checkpoints.tidy()
    run.accelerator.wait_for_everyone()  # the main process may be clearing the directory
    saved = checkpoints.newest(lambda name: run.gathered(name)[0])
    watching: list[Observer] = []
    if run.accelerator.is_main_process:
        history = HistoryObserver(directory, resume_at=saved["history"] if saved else 0)
        checkpoints.history_position = history.position
        watching = [history, *build_observers(config.tracking, directory)]
    observers = Observers(watching)
    loop = make_loop(run, observers, checkpoints, stop)
    exit_code, results = 1, None
    try:
        if run.accelerator.is_main_process:
            record_serving(run, run_name(composed), loop.evaluator.task_id_given)
        for strategy in run.acting:
            strategy.setup(run)
        if saved is not None:
            restore(loop, saved)
        observers.on_run_start(describe(loop, composed, saved is not None))
        loop.train()
        results = collect(loop, composed)
        exit_code = 0
    except BaseException as error:
        observers.on_error(error)
        raise
    finally:
        observers.close(exit_code, results)
    return results


def make_loop(run: Run, observer: Observer, checkpoints: Checkpoints, stop: StopRequests) -> Loop:
    """The loop of a run; its strategies are yet to be set up."""
    given = any(strategy.needs_task_id_at_eval for strategy in run.strategies)
    evaluator = Evaluator(run, task_id_given=given or run.config.stream.scenario == "task")
    return Loop(run, evaluator, observer, checkpoints, Cost(), stop)


def build_run(config: Config, directory: Path) -> Run:
    """Stream, tokenizer, model, adapter, strategies: each needs what stands before it."""
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
    labels, whole = len(stream.label_names), config.peft.trained_whole
    model, new = load_model(config.model, source, tokenizer, labels, config.quantization, whole)
    with accelerator.main_process_first():
        base = base_digest(config.model, model, source, cache_dir)
    model = apply_peft(model, config.peft, config.model.task_type, new)
    take_over(model, source, config.peft)
    if config.training.gradient_checkpointing:
        recompute_activations(model)
    check_positions(model, encoded.longest)
    check_forward(config.model, model, labels, encoded.longest)
    model.to(accelerator.device)
    allowed = allowed_labels(encoded, 0).to(accelerator.device)
    objective = make_objective(config.model, model, tokenizer, allowed)
    strategies = [STRATEGIES[name].target(values) for name, values in config.strategies.items()]
    companion = config.peft.companion and config.peft.companion(config.peft)
    return Run(
        config,
        directory,
        accelerator,
        model,
        tokenizer,
        encoded,
        objective,
        strategies,
        base,
        source,
        companion,
    )
