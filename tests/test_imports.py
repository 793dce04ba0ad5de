"""Imports point one way: from the command line to the loop, and from there to the settings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import clpeft

ROOT = Path(clpeft.__file__).parent
# each may import what stands in its own row and below
LAYERS = (
    {"doctor", "reports"},
    {"training"},
    {"strategies", "evaluation", "tracking"},
    {"models", "peft_methods", "tuners", "streams"},
)
# what a PEFT method does to training has the hooks that a strategy has
UPWARDS = {("clpeft.peft_methods", "clpeft.strategies.base")}
FILES = {
    ".".join(["clpeft", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for path in ROOT.rglob("*.py")
}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of clpeft that code imports, within functions too, but for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        yield from imported(node)


GRAPH = {name: set(imported(ast.parse(path.read_text()))) for name, path in FILES.items()}


def package(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_modules_import_one_another_in_no_circle() -> None:
    assert GRAPH["clpeft.experiment"] >= {"clpeft.training.build", "clpeft.config"}
    TopologicalSorter(GRAPH).prepare()  # raises CycleError with the circle


def test_packages_import_what_stands_below_them() -> None:
    place = {f"clpeft.{name}": row for row, names in enumerate(LAYERS) for name in names}
    edges = {
        (package(module), other)
        for module, others in GRAPH.items()
        for other in others
        if {package(module), package(other)} <= place.keys() and package(module) != package(other)
    }

    assert {(one, other) for one, other in edges if place[one] > place[package(other)]} == UPWARDS
    TopologicalSorter(
        {name: {package(other) for one, other in edges if one == name} for name in place}
    ).prepare()
