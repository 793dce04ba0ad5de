"""`make bench`: prints the tables of benchmarks/speed.md."""

from __future__ import annotations

import os

from benchmarks import step, trainer
from benchmarks.printing import machine, out, spread


def main() -> None:
    """Measures and prints."""
    out(f"{machine()}\n")
    times = step.measure()
    out("One optimizer step, tiny_llama, batches of 16 of one length; medians of rounds (range)\n")
    out("| | milliseconds | clpeft takes |\n|---|---|---|")
    for name, words in (
        ("bare", "bare PyTorch loop"),
        ("frugal", "the same without logits of the prompt"),
    ):
        ratios = [a / b for a, b in zip(times["ours"], times[name], strict=True)]
        out(f"| {words} | {spread([t * 1e3 for t in times[name]])} | {spread(ratios, 3)} × |")
    out(f"| clpeft | {spread([t * 1e3 for t in times['ours']])} | |\n")
    data_dir = os.environ.get("CLPEFT_DATA")
    if not data_dir:
        out("The comparison with Trainer needs real data: set CLPEFT_DATA.")
        return
    rows = trainer.measure(data_dir)
    out("A standard_cl run, order 1, tiny_llama, 640 examples a task, training and matrix; medians")
    out("of repeats (range), seconds\n")
    out("| | training | evaluation | total | faster | final average score |")
    out("|---|---|---|---|---|---|")
    for name, runs in rows.items():
        cells = [spread([r[key] for r in runs], 1) for key in ("training", "evaluation", "total")]
        pairs = zip(rows["Trainer"], runs, strict=True)
        faster = spread([theirs["total"] / ours["total"] for theirs, ours in pairs])
        score = spread([r["score"] for r in runs], 3)
        out(f"| {name} | {' | '.join(cells)} | {faster} | {score} |")


if __name__ == "__main__":
    main()
