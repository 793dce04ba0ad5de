"""The Fisher information of single examples against a plain forward and backward pass."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.composed import config_of, loop_of
from benchmarks.lanes import BATCH, repeated
from benchmarks.printing import spread
from clpeft.strategies.fisher import fisher_diagonal
from clpeft.training.run import Run

EXAMPLES = 320
ROUNDS = 9


def table(models: list[str], model_overrides: Callable[[str], list[str]]) -> Iterator[str]:
    """Ratios by model, kind of adapter and kind of Fisher, in Markdown."""
    yield "| | empirical | sampled | exact |"
    yield "|---|---|---|---|"
    for model in models:
        for peft in ("lora", "full"):
            ratios = measure([*model_overrides(model), f"peft={peft}"])
            cells = [f"{spread(ratios[kind])} ×" if kind in ratios else "–" for kind in KINDS]
            yield f"| {model}, {peft} | {' | '.join(cells)} |"


KINDS = ("empirical", "sampled", "exact")


def measure(overrides: list[str]) -> dict[str, list[float]]:
    """Seconds of each kind over those of training's passes on the same examples, by round."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of([*overrides, "strategy=finetune", f"training.batch_size={BATCH}"])
        run = loop_of(config, Path(folder)).run
    task = run.stream.tasks[0]
    run.begin(task)
    lengths = [len(ids) for ids in task.train["input_ids"]]
    examples = repeated(task.train, max(set(lengths), key=lengths.count), EXAMPLES)
    classifier = config.model.task_type == "sequence_classification"
    kinds = KINDS if classifier else KINDS[:2]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(ROUNDS + 1):
        plain = timed(lambda: passes(run, examples))
        for kind in kinds:
            seconds = timed(lambda kind=kind: diagonal(run, examples, kind))
            if number:  # the first is for what happens at a first time
                found[kind].append(seconds / plain)
    return found


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def passes(run: Run, examples: object) -> None:
    """Forward and backward over all examples, in batches, as training does them."""
    for batch in run.loader(examples):  # type: ignore[arg-type]
        run.mean_loss(batch.to(run.device)).backward()
        run.model.zero_grad()


def diagonal(run: Run, examples: object, kind: str) -> None:
    """The Fisher's diagonal over all examples."""
    generator = torch.Generator().manual_seed(0)
    fisher_diagonal(run, examples, kind=kind, examples=EXAMPLES, generator=generator)  # type: ignore[arg-type]
