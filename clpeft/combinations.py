"""Every strategy with every PEFT method, base and kind of model: what works, and what is refused.

`python -m clpeft.combinations` prints it as a table. Nothing here knows more than a composition
does: a cell is refused where the same command line would be.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from hydra import compose, initialize_config_module

from clpeft.catalogue import catalogue
from clpeft.checks import check_combination
from clpeft.composition import as_dataclasses, register_schemas
from clpeft.config import Config, ConfigError
from clpeft.registry import STRATEGIES

# a model of each kind, and the letter that stands for it in the table
MODELS = {
    "sequence_classification": ("tiny_bert", "c"),
    "causal_lm": ("tiny_llama", "g"),
    "seq2seq_lm": ("tiny_t5", "s"),
}
QUANTIZATIONS = ("none", "nf4")
OPEN = {"any"}  # says nothing until it is told what to be
# where a strategy may be at home: what it runs beside, and in which scenario
COMPANY = ((), ("replay",))
SCENARIOS = ("domain", "class")


@dataclass(frozen=True)
class Cell:
    """One combination."""

    strategy: str
    peft: str
    quantization: str
    task_type: str

    def __str__(self) -> str:
        return f"{self.strategy}-{self.peft}-{self.quantization}-{self.task_type}"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a combination: it is run, or refused at composition."""

    overrides: tuple[str, ...]  # of the command line that asks for it
    refusal: str | None  # the sentence; None where it is run


def cells() -> list[Cell]:
    """All combinations."""
    strategies = [entry.name for entry in STRATEGIES]
    methods = [option.name for option in catalogue()["peft"] if option.name not in OPEN]
    return [Cell(*parts) for parts in product(strategies, methods, QUANTIZATIONS, MODELS)]


def verdict(cell: Cell) -> Verdict:
    """Whether a combination is run or refused, by the checks that a composition makes.

    A strategy that does not run alone is given a partner, and one that needs a scenario that one.
    """
    first = None
    for scenario, partners in product(SCENARIOS, COMPANY):
        names = (cell.strategy, *(name for name in partners if name != cell.strategy))
        overrides = (
            f"strategy=[{','.join(names)}]",
            f"peft={cell.peft}",
            f"quantization={cell.quantization}",
            f"model={MODELS[cell.task_type][0]}",
            f"stream.scenario={scenario}",
        )
        config = replace(
            _composed(overrides[4]),
            strategies=_composed(overrides[0]).strategies,
            peft=_composed(overrides[1]).peft,
            quantization=_composed(overrides[2]).quantization,
            model=_composed(overrides[3]).model,
        )
        try:
            check_combination(config)
        except ConfigError as error:
            first = first or Verdict(overrides, str(error))
        else:
            return Verdict(overrides, None)
    assert first is not None
    return first


@cache
def _composed(override: str) -> Config:
    register_schemas()
    with initialize_config_module("clpeft.conf", version_base="1.3"):
        return as_dataclasses(compose("config", overrides=[override]))


def table() -> Iterator[str]:
    """The lines of a Markdown table of all combinations, and why those that are refused are."""
    methods = list(dict.fromkeys(cell.peft for cell in cells()))
    yield f"| strategy | {' | '.join(methods)} |"
    yield f"|---|{'---|' * len(methods)}"
    works: dict[tuple[str, str], str] = defaultdict(str)
    reasons: Counter[str] = Counter()
    for cell in cells():
        refusal = verdict(cell).refusal
        if refusal is not None:
            reasons[_without_names(refusal, cell)] += 1
            continue
        letter, place = MODELS[cell.task_type][1], (cell.strategy, cell.peft)
        known = works[place]
        dense = cell.quantization == "none"
        works[place] = known + letter if dense else known.replace(letter, letter.upper())
    for strategy in dict.fromkeys(cell.strategy for cell in cells()):
        marks = (works[strategy, method] or "–" for method in methods)
        yield f"| `{strategy}` | {' | '.join(marks)} |"
    yield ""
    refused = reasons.total()
    yield f"{len(cells())} combinations: {len(cells()) - refused} are run, {refused} are refused."
    yield ""
    for reason, times in sorted(reasons.items()):
        yield f"- {reason} ({times})"


def _without_names(sentence: str, cell: Cell) -> str:
    """A refusal with `...` in place of what varies from cell to cell."""
    varying = {"peft": r"\w+", "quantization": cell.quantization, "task_type": cell.task_type}
    for key, value in varying.items():
        sentence = re.sub(rf"{key}={value}(?= |;|,|:)", f"{key}=...", sentence, count=1)
    return sentence


if __name__ == "__main__":
    for line in table():
        print(line)
