"""What a model wrote under generative replay, as tables: `python -m benchmarks.generated_examples`.

Reads the files that a run leaves in its directory; trains nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from clpeft.streams.toy import DESKS, FACTORS, OFFICES, office_rule

Line = dict[str, Any]


def main(directory: Path, count: int = 10) -> None:
    """Prints how much of what was written was kept, and some examples of each task.

    Args:
        directory: Of a run with strategy=generative_replay.
        count: Examples of each task.
    """
    results = json.loads((directory / "results.json").read_text())
    files = sorted((directory / "generated").glob("*.jsonl"), key=_place)
    toy = results["stream"] == "toy"
    print(_table(_summaries(files, toy)))
    last = files[-1]
    print(f"\nBefore `{_task(last)}`, {count} of each task, kept and dropped:\n")
    for name, lines in _by_task(last).items():
        rows = [["answer", f"input, for `{name}`", "kept"]]
        for line in shown(lines, count):
            text = " / ".join(line["inputs"]) if line["inputs"] else line["text"]
            rows.append([line["answer"] or "", _plain(text), line["why"] or "yes"])
        print(f"{_table(rows)}\n")


def shown(lines: list[Line], count: int) -> list[Line]:
    """So many examples: the first that were kept, and of what was dropped the first of each reason.

    Where that leaves room, or there are few reasons, half are kept and half dropped ones at most.
    """
    reasons = {line["why"]: line for line in reversed(lines) if line["why"] is not None}
    first = list(reasons.values())
    dropped = first + [line for line in lines if line["why"] is not None and line not in first]
    dropped = dropped[: count // 2]
    kept = [line for line in lines if line["why"] is None]
    return [*kept[: count - len(dropped)], *dropped]


def right(line: Line) -> bool:
    """Whether the toy stream's rule sends a letter to the desk that was written with it."""
    rule = office_rule(OFFICES.index(line["task"]))
    words = set(line["inputs"][0].split())
    kinds = [kind for kind, named in enumerate(FACTORS[rule.factor].values()) if words & {*named}]
    return len(kinds) == 1 and DESKS[rule.desks[kinds[0]]] == line["answer"]


def _summaries(files: list[Path], toy: bool) -> list[list[str]]:
    rows = [["before", "of", "written", "kept", "copies", "not kept", *["right"] * toy]]
    for path in files:
        for name, lines in _by_task(path).items():
            kept = [line for line in lines if line["why"] is None]
            reasons = Counter(line["why"] for line in lines if line["why"] is not None)
            dropped = ", ".join(f"{number} {why}" for why, number in reasons.most_common())
            counts = [len(lines), len(kept), sum(line["is_copy"] for line in kept)]
            row = [f"`{_task(path)}`", f"`{name}`", *map(str, counts), dropped]
            if toy:
                row.append(f"{sum(map(right, kept))}")
            rows.append(row)
    return rows


def _by_task(path: Path) -> dict[str, list[Line]]:
    """What was written, by the task that it is of."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        name: [line for line in lines if line["task"] == name]
        for name in dict.fromkeys(line["task"] for line in lines)
    }


def _place(path: Path) -> int:
    return int(path.stem.partition("_")[0])


def _task(path: Path) -> str:
    return path.stem.partition("_")[2]


def _plain(text: str) -> str:
    return text.replace("\n", " ⏎ ").replace("|", "\\|")


def _table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table; the first is its heading."""
    first, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [first, ["---"] * len(first), *others])


if __name__ == "__main__":
    typer.run(main)
