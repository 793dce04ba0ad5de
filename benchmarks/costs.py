"""What every strategy costs against `finetune`: prints the tables of benchmarks/costs.md.

Run it with `python -m benchmarks.costs`; the environment variable MINILM names a folder with
all-MiniLM-L6-v2, without which only the small Llama is measured. Two strategies take turns after
every step, in one process and on one thread, which a machine with other work disturbs least. Peak
memory and what is kept come from runs in processes of their own.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import fisher, growth
from benchmarks.apart import trained_apart
from benchmarks.composed import config_of
from benchmarks.lanes import BATCH, Entry, Lane, side_by_side
from benchmarks.printing import interval, machine, out
from clpeft.registry import STRATEGIES

STEPS = {"tiny_llama": 400, "minilm": 120}
# of the run whose memory is looked at: what is kept after two tasks and after three
SMALL = (
    "stream.num_tasks=3",
    "stream.train_size=640",
    "stream.validation_size=16",
    "stream.test_size=16",
    f"training.batch_size={BATCH}",
)
PARTS = ("steps", "fisher", "growth")

# the strategies as their YAMLs have them, and those settings that a cost hangs on
ENTRIES = (
    Entry("finetune, against itself", ("strategy=finetune",)),
    Entry("ewc", ("strategy=ewc",), 1.05),
    Entry("online_ewc", ("strategy=online_ewc",), 1.05),
    Entry("si", ("strategy=si",), 1.05),
    Entry("mas", ("strategy=mas",), 1.05),
    Entry("l2", ("strategy=l2",), 1.05),
    Entry("rwalk", ("strategy=rwalk",)),
    Entry("lwf, cached teacher", ("strategy=lwf", "strategies.lwf.teacher=cached"), 1.15),
    Entry("lwf, live teacher", ("strategy=lwf", "strategies.lwf.teacher=live"), 1.5),
    Entry("replay, ratio 0.5", ("strategy=replay", "strategies.replay.ratio=0.5"), 1.5 * 1.05),
    Entry("replay, ratio 1", ("strategy=replay", "strategies.replay.ratio=1"), 2 * 1.05),
    Entry(
        "replay, ratio 1, separate",
        ("strategy=replay", "strategies.replay.ratio=1", "strategies.replay.mixing=separate"),
        2 * 1.05,
    ),
    Entry(
        "prioritized_replay, ratio 1",
        ("strategy=prioritized_replay", "strategies.prioritized_replay.ratio=1"),
        2 * 1.05,
    ),
    Entry("quality_control with replay", ("strategy=[quality_control,replay]",), 2 * 1.05),
    Entry("generative_replay", ("strategy=generative_replay",)),
    Entry("der", ("strategy=der",)),
    Entry("derpp", ("strategy=derpp",)),
    Entry("er_ace", ("strategy=er_ace",), settings=("stream.scenario=class",)),
    Entry(
        f"agem, reference of {BATCH}",
        ("strategy=agem", f"strategies.agem.reference_size={BATCH}"),
        2.15,
    ),
    Entry(f"gem, reference of {BATCH}", ("strategy=gem", f"strategies.gem.reference_size={BATCH}")),
    Entry("gdumb", ("strategy=gdumb",)),
    Entry("olora", ("strategy=olora",)),
)


def entries(model: str, wanted: str) -> list[Entry]:
    """The rows that a model can have, of those that a regular expression finds."""
    task_type = config_of([f"model={model}"]).model.task_type
    chosen = [entry for entry in ENTRIES if re.search(wanted, entry.label)]
    return [entry for entry in chosen if task_type in task_types(entry)]


def task_types(entry: Entry) -> frozenset[str]:
    """The kinds of model that all strategies of a row are for."""
    names = entry.overrides[0].removeprefix("strategy=").strip("[]").split(",")
    return frozenset.intersection(*(STRATEGIES[name].target.task_types for name in names))


def model_overrides(model: str) -> list[str]:
    """What chooses a model of the tables."""
    where = [f"model.path={os.environ['MINILM']}"] if model == "minilm" else []
    return [f"model={model}", *where]


def table(model: str, wanted: str) -> Iterator[str]:
    """The lines of one model's table, in Markdown, as they are measured."""
    yield "| | step | asked at most | around a task | kept | of what trains | peak memory |"
    yield "|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:

        @cache
        def finetune(settings: tuple[str, ...]) -> tuple[Lane, dict[str, Any]]:
            overrides = [*model_overrides(model), *settings, "strategy=finetune"]
            return Lane(overrides, Path(folder), STEPS[model]), trained_apart([*overrides, *SMALL])

        for entry in entries(model, wanted):
            plain, apart = finetune(entry.settings)
            overrides = [*model_overrides(model), *entry.settings, *entry.overrides]
            steps = side_by_side(plain, Lane(overrides, Path(folder), STEPS[model]))
            cost = trained_apart([*overrides, *SMALL])
            limit = "–" if entry.limit is None else f"{entry.limit:.3g} ×"
            # both of one process, and then in steps of finetune
            around = cost["strategy_seconds"] / cost["train_seconds"] * statistics.median(steps)
            second, third = (cost["state_bytes"][task] / 1024 for task in (1, 2))
            peak = cost["peak_memory_bytes"] / apart["peak_memory_bytes"]
            yield (
                f"| {entry.label} | {interval(steps)} × | {limit} | {around:.2f} × | "
                f"{second:.0f}, {third:.0f} KiB | {third * 1024 / cost['trained_bytes']:.1f} × | "
                f"{peak:.2f} × |"
            )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one of the parts instead of all")
    parser.add_argument("--model", choices=STEPS, help="one of the models instead of all")
    parser.add_argument("--rows", default="", help="a regular expression: rows that it finds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out(machine())
    at_hand = ["tiny_llama", *(["minilm"] if os.environ.get("MINILM") else [])]
    models = [model for model in at_hand if given.model in (None, model)]
    parts: list[tuple[str, str, Iterable[str]]] = [
        ("steps", f"{model}, LoRA, batches of {BATCH}, against finetune", table(model, given.rows))
        for model in models
    ]
    title = "Fisher information of single examples, against a forward and backward pass"
    parts.append(("fisher", title, fisher.table(models, model_overrides)))
    parts.append(("growth", "Fifty tasks", growth.table(entries("tiny_llama", given.rows))))
    for part, heading, lines in parts:
        if given.only in (None, part):
            out(f"\n## {heading}\n")
            for line in lines:
                out(line)


if __name__ == "__main__":
    main()
