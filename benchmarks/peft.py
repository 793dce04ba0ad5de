"""What every PEFT method trains, takes and scores: prints the table of benchmarks/peft.md.

Run it with `make bench-peft`, a row by `python -m benchmarks.peft --rows ia3`. Each method, with
the values of its YAML, takes turns with LoRA on the same model after every step, in one process and
on one thread. Peak memory and scores come from runs in processes of their own.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.apart import trained, trained_apart
from benchmarks.composed import config_of
from benchmarks.lanes import BATCH, Lane, side_by_side
from benchmarks.printing import interval, machine, out, spread
from clpeft.catalogue import catalogue
from clpeft.config import RunError
from clpeft.mistakes import explain

FINETUNE = "strategy=finetune"
STEPS = 200
# learning rates are chosen per method, of these multiples of the model's own: what suits LoRA is
# far too little for a few prompts and too much for all weights
RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SEEDS = (0, 1, 2)
LLAMA, BERT = ("model=tiny_llama", "model=tiny_bert")
# what a method is told that its YAML leaves open
TYPED = {"any": ("peft.type=LOHA",)}
# how the base may be stored beside LoRA: what that costs and saves
STORED = {f"lora, {kind}": (LLAMA, "peft=lora", f"quantization={kind}") for kind in ("int8", "nf4")}
# what is for classifiers alone, and what it is to be compared with
CLASSIFIERS = {
    "tiny_bert: lora, against itself": (BERT, "peft=lora"),
    "tiny_bert: frozen": (BERT, "peft=frozen"),
}
# one task, scored once it is trained
ONE = ("stream.num_tasks=1", f"training.batch_size={BATCH}")


def rows(wanted: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The rows that a regular expression finds, and why other methods have none.

    Returns:
        Label to overrides, the model first, LoRA against itself before all others on a model; a
        sentence for each method that needs to be told more, or does not work with the model.
    """
    known = {"lora, against itself": (LLAMA, "peft=lora")}
    elsewhere = {override for overrides in CLASSIFIERS.values() for override in overrides}
    for name in (option.name for option in catalogue()["peft"]):
        if f"peft={name}" not in elsewhere:
            told = TYPED.get(name, ())
            label = ", ".join([name, *(override.partition("=")[2] for override in told)])
            known[label] = (LLAMA, f"peft={name}", *told)
    found, refused = {}, []
    for label, overrides in (known | STORED | CLASSIFIERS).items():
        if not re.search(wanted, label):
            continue
        try:
            config_of([FINETUNE, *overrides])
            found[label] = overrides
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            refused.append(f"{label}: {sentence}")
    return found, refused


def best_rate(overrides: list[str]) -> float:
    """The learning rate with the highest score on validation data; the smallest of equals."""
    own = config_of([FINETUNE, *overrides]).model.adapter_lr

    def score(rate: float) -> float:
        given = [FINETUNE, *ONE, *overrides, f"optimizer.lr={rate}", "evaluation.split=validation"]
        try:
            return trained(given)["score"]
        except RunError:  # it diverged
            return -1.0

    return max((own * factor for factor in RATES), key=score)


def table(found: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """The lines of the table, in Markdown, as they are measured."""
    yield "| | trains | adapter | frozen base | step | peak memory | learning rate | toy score |"
    yield "|---|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:

        def lane(*overrides: str) -> Lane:
            return Lane([FINETUNE, *overrides], Path(folder), STEPS)

        @cache
        def lora(model: str) -> Lane:
            return lane(model, "peft=lora")

        for label, overrides in found.items():
            steps = side_by_side(lora(overrides[0]), lane(*overrides))
            rate = best_rate([*overrides])
            given = [FINETUNE, *ONE, *overrides, f"optimizer.lr={rate}"]
            runs = [trained_apart([*given, f"seed={seed}"]) for seed in SEEDS]
            memory = statistics.median(taken(run) for run in runs) / 2**20
            first = runs[0]
            saved = first["adapter_bytes"]  # None: no adapter is written
            adapter = "–" if saved is None else f"{saved / 1024:.0f} KiB"
            yield (
                f"| {label} | {first['trained_percent']:.3g} % | "
                f"{adapter} | {first['base_bytes'] / 1024:.0f} KiB | "
                f"{interval(steps)} × | {memory:.0f} MiB | {rate:.2g} | "
                f"{spread([run['score'] for run in runs])} |"
            )


def taken(run: dict[str, Any]) -> int:
    """The peak of a run's memory in bytes, without that of Python and its libraries."""
    on_gpu = torch.cuda.is_available()
    return run["peak_memory_bytes"] - (0 if on_gpu else run["before_bytes"])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="a regular expression: rows that it finds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out(f"{machine()}\n")
    found, refused = rows(given.rows)
    for line in table(found):
        out(line)
    for sentence in refused:
        out(f"\nNo row: {sentence}")


if __name__ == "__main__":
    main()
