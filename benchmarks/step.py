"""Our optimizer step against a bare PyTorch loop over the same batches."""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.composed import config_of, loop_of
from benchmarks.lanes import Clock, repeated
from clpeft.streams.batch import Batch

ROUNDS = 15
STEPS = 40


def measure() -> dict[str, list[float]]:
    """Median step times in seconds, one per round and way of doing it; the ways take turns.

    `bare` is the loop that anybody would write; `frugal` the same without logits of the prompt,
    which is what clpeft computes too.
    """
    config = config_of(
        [
            "strategy=finetune",
            "training.batch_size=16",
            "training.checkpoint.enabled=false",
            f"training.max_steps={STEPS}",
        ]
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        loop = loop_of(config, Path(directory), clock)
    run = loop.run
    task = run.stream.tasks[0]
    run.begin(task)
    # examples of one length, so that every step does the same work
    common = statistics.mode(len(ids) for ids in task.train["input_ids"])
    examples = repeated(task.train, common, config.training.batch_size * STEPS)
    batches = list(run.loader(examples))
    times: dict[str, list[float]] = {"ours": [], "bare": [], "frugal": []}
    for _ in range(ROUNDS):
        loop.skipped = 1
        clock.seconds = []
        loop.train_task(task, examples)
        times["ours"].append(statistics.median(clock.seconds[1:]))
        for name in ("bare", "frugal"):
            steps = bare_steps(run.model, run.trainable, batches, name == "frugal")
            times[name].append(statistics.median(steps))
    return times


def bare_steps(
    model: Any, trainable: dict[str, Any], batches: list[Batch], frugal: bool
) -> list[float]:
    """Seconds of each step of a plain loop over batches made beforehand."""
    parameters = list(trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    model.train()
    ends = [time.perf_counter()]
    for batch in batches:
        inputs, labels = dict(batch.inputs), batch.labels
        if frugal:
            kept = batch.target_width + 1
            inputs["logits_to_keep"], labels = kept, labels[:, -kept:]
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(ends)]
