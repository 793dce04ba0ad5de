"""The benchmark stream: published data sets and orders, read from the user's data folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clpeft.config import ConfigError, nearest
from clpeft.registry import STREAMS
from clpeft.streams.base import StreamConfig
from clpeft.streams.folder import FolderStream


@dataclass
class BenchmarkConfig(StreamConfig):
    """Published tasks in a published order."""

    tasks_dir: str = MISSING  # the sub-folder of paths.data_dir whose sub-folders are tasks
    orders: dict[str, list[str]] = field(default_factory=dict)  # the published orders, by name
    # how tasks with `output` are scored, where their labels.json does not say
    metric: str = field(default="rougeL", metadata={"options": ("rougeL", "exact_match")})


@STREAMS.register("benchmark", config=BenchmarkConfig)
class BenchmarkStream(FolderStream):
    """Reads `<paths.data_dir>/<tasks_dir>/<task>`, laid out as a folder stream's tasks are."""

    config: BenchmarkConfig  # type: ignore[assignment]

    def root(self) -> Path:
        """The folder whose sub-folders are tasks.

        Raises:
            ConfigError: If it does not exist.
        """
        expected = (
            f"<data_dir>/{self.config.tasks_dir}/<task>/{{train,validation,test}}.parquet with a "
            "labels.json beside them"
        )
        if not self.data_dir:
            raise ConfigError(
                f"The stream '{self.config.name}' reads public data from a folder that you name: "
                "set paths.data_dir=<folder> or the environment variable CLPEFT_DATA to one that "
                f"holds {expected}."
            )
        root = Path(self.data_dir).expanduser() / self.config.tasks_dir
        if not root.is_dir():
            raise ConfigError(
                f"The stream '{self.config.name}' needs the folder {root}, which does not exist; "
                "set paths.data_dir (or the environment variable CLPEFT_DATA) to a folder that "
                f"holds {expected}."
            )
        return root

    def task_names(self) -> list[str]:
        """The tasks listed, or those of the order chosen."""
        root = self.root()
        names = self.config.tasks
        if names is None:
            names = self._order()
        for name in names:
            self._check_files(root, name)
        return list(names)

    def _order(self) -> list[str]:
        order = self.config.order
        if order in self.config.orders:
            return self.config.orders[order]
        known = ", ".join(self.config.orders) or "none"
        if order is None:
            raise ConfigError(
                f"The stream '{self.config.name}' needs stream.order (one of {known}) or "
                "stream.tasks."
            )
        raise ConfigError(
            f"The stream '{self.config.name}' has no order '{order}'; its orders are {known}."
            + (nearest(order, self.config.orders) if len(self.config.orders) > 5 else "")
        )
