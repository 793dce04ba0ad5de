"""What can be chosen: the options of every config group, as the heads of their files tell it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.abc import Traversable
from importlib.metadata import entry_points

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# the groups that a third party can add to, and the entry points it does so with; as in
# clpeft.registry, which would import torch
ENTRY_POINTS = {
    "strategy": "clpeft.strategies",
    "peft": "clpeft.peft_methods",
    "stream": "clpeft.streams",
    "model": "clpeft.models",
}
# in the order in which config.yaml names them; others follow by name
ORDER = (
    "model",
    "peft",
    "strategy",
    "quantization",
    "stream",
    "optimizer",
    "scheduler",
    "training",
    "evaluation",
    "tracking",
    "paths",
    "experiment",
    "debug",
)
SEVERAL = "(several compose: strategy=[ewc,replay])"


@dataclass(frozen=True)
class Option:
    """One choice of a config group."""

    name: str
    description: str
    paper: str
    use: str  # a command line


def catalogue() -> dict[str, list[Option]]:
    """Every config group with its options, ours and third parties'.

    Returns:
        Group → options by name. Nothing is imported to find them: a third party's option is known
        by the name and the module of its entry point.
    """
    groups = dict(_groups(resources.files("clpeft.conf"), ""))
    for group, name in ENTRY_POINTS.items():
        known = {option.name for option in groups.get(group, [])}
        for point in entry_points(group=name):
            if point.name not in known:
                described = f"From another package: {point.value}"
                groups.setdefault(group, []).append(Option(point.name, described, "", ""))
    last = len(ORDER)
    order = {name: i for i, name in enumerate(ORDER)}
    return {
        group: sorted(groups[group], key=lambda option: option.name)
        for group in sorted(groups, key=lambda group: (order.get(group, last), group))
        if groups[group]
    }


def parse_header(text: str) -> dict[str, str]:
    """Reads the comment that opens a YAML file.

    Args:
        text: The file. Its first lines are `# <what it is>`, `# Paper: ...` and `# Use: ...`, in
            any order of the last two; a line without such a beginning goes on with the one before.
            `# @package ...`, which is Hydra's, is passed over.

    Returns:
        `description`, `paper` and `use`; empty where the comment does not say.
    """
    found = {"description": "", "paper": "", "use": ""}
    key = "description"
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        said = line.lstrip("#").strip()
        if said.startswith("@"):
            continue
        for name in ("paper", "use"):
            if said.lower().startswith(f"{name}:"):
                key, said = name, said[len(name) + 1 :].strip()
        found[key] = f"{found[key]} {said}".strip()
    return found


def show(group: str | None = None, console: Console | None = None) -> int:
    """`clpeft list [GROUP]`: prints what can be chosen.

    Args:
        group: One config group; all of them by default.
        console: Where to; the standard output by default. Tables on a terminal, otherwise one line
            per option, its parts separated by tabs.

    Returns:
        The exit code: 1 for a group that does not exist, told in one sentence.
    """
    groups = catalogue()
    if group is not None and group not in groups:
        # only here, because it imports OmegaConf
        from clpeft.config import nearest

        told = f"clpeft: There is no config group '{group}'.{nearest(group, groups)}"
        Console(stderr=True).print(told, markup=False, soft_wrap=True)
        return 1
    chosen = groups if group is None else {group: groups[group]}
    console = console or Console()
    if not console.is_terminal:
        _print_lines(chosen, console)
        return 0
    for name, options in chosen.items():
        console.print(_table(name, options, with_use=group is not None))
        console.print()
    if group is None:
        console.print("Choose with GROUP=OPTION; `clpeft list GROUP` also shows how to use each.")
    return 0


def _groups(folder: Traversable, name: str) -> Iterator[tuple[str, list[Option]]]:
    """The groups in and below a folder of configs, as Hydra names them: by their path."""
    options = []
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _groups(item, f"{name}/{item.name}" if name else item.name)
        elif name and item.name.endswith(".yaml"):
            head = parse_header(item.read_text(encoding="utf-8"))
            options.append(Option(item.name.removesuffix(".yaml"), **head))
    if options:
        yield name, options


def _table(group: str, options: list[Option], *, with_use: bool) -> Table:
    several = f" {SEVERAL}" if group == "strategy" else ""
    table = Table(title=escape(f"{group}{several}"), title_justify="left", title_style="bold")
    table.box = box.SIMPLE_HEAD
    table.show_edge = False
    table.add_column("option", style="cyan", no_wrap=True)
    table.add_column("what it is", overflow="fold", ratio=3)
    with_paper = any(option.paper for option in options) and not with_use
    if with_paper:
        table.add_column("paper", style="dim", overflow="fold", ratio=2)
    for option in options:
        told = escape(option.description)
        if with_use:
            told += f"\n[dim]{escape(option.paper)}[/]" if option.paper else ""
            told += f"\n[green]{escape(option.use)}[/]" if option.use else ""
        cells = [escape(option.name), told]
        table.add_row(*cells, *([escape(option.paper)] if with_paper else []))
    return table


def _print_lines(groups: dict[str, list[Option]], console: Console) -> None:
    for group, options in groups.items():
        for option in options:
            parts = [f"{group}={option.name}", option.description, option.paper, option.use]
            # rich itself would turn the tabs into spaces
            console.file.write("\t".join(parts) + "\n")
