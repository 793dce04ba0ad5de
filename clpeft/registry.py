"""What can be chosen by name: strategies, PEFT methods, streams and models of one's own."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One choice: the class or function that implements it and the dataclass of its settings."""

    name: str
    target: Any
    config: type


class Registry:
    """Choices of one kind, filled by a decorator.

    Ours are found by importing every module of `package`; a third party's by the entry points of
    the same name (`clpeft.strategies`, `clpeft.peft_methods`, `clpeft.streams`, `clpeft.models`),
    each of which names a module to import.

    Args:
        kind: The config group that the choices belong to, as messages name it.
        package: The package whose modules hold our own choices.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Entry] = {}
        self._discovered = False

    def register(self, name: str, *, config: type) -> Callable[[T], T]:
        """Decorator that makes a class or function available under a name.

        Args:
            name: The name used on the command line.
            config: The dataclass of its settings.

        Raises:
            ValueError: If another choice has that name already.
        """

        def remember(target: T) -> T:
            known = self._entries.get(name)
            if known is not None and known.target is not target:
                raise ValueError(
                    f"The {self.kind} '{name}' is registered twice: by "
                    f"{known.target.__module__} and by {target.__module__}; rename one of them."
                )
            self._entries[name] = Entry(name, target, config)
            return target

        return remember

    def discover(self) -> None:
        """Imports every module that may register a choice; once."""
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.package):
            point.load()

    def __contains__(self, name: str) -> bool:
        self.discover()
        return name in self._entries

    def __getitem__(self, name: str) -> Entry:
        self.discover()
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry]:
        self.discover()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))


STRATEGIES = Registry("strategy", "clpeft.strategies")
PEFT_METHODS = Registry("peft", "clpeft.peft_methods")
STREAMS = Registry("stream", "clpeft.streams")
MODELS = Registry("model", "clpeft.models")
