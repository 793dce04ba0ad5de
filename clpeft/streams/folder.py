"""The folder stream: your own data, one sub-folder per task, as CSV, JSON lines or Parquet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from clpeft.config import ConfigError, nearest
from clpeft.registry import STREAMS
from clpeft.streams.base import SPLITS, LoadedTask, StreamBuilder, StreamConfig
from clpeft.streams.files import ENDINGS, read_rows, split_file, split_off
from clpeft.streams.rows import classification, generation, kind_of, read_facts, texts_of
from clpeft.streams.toy import toy_neutral_text

# Texts handed to the warm-up of a generated base model.
NEUTRAL_TEXTS = 6000


@dataclass
class FolderConfig(StreamConfig):
    """Your own tasks, read from a folder."""

    path: str | None = None  # holds <task>/{train,validation,test}.{csv,jsonl,parquet}; required
    # how tasks with `output` are scored, where their labels.json does not say
    metric: str = field(default="rougeL", metadata={"options": ("rougeL", "exact_match")})


@STREAMS.register("folder", config=FolderConfig)
class FolderStream(StreamBuilder):
    """Reads `<path>/<task>/{train,validation,test}.{csv,jsonl,parquet}`.

    Rows have `text`, optionally `text_pair`, and `label` (classification), or `input`, `output`
    and optionally `instruction` and `references` (generation). An optional labels.json, beside
    the splits or for all tasks in `<path>`, holds `label_names`, `answer_words`, `instruction`,
    `input_template` and `metric`. A missing validation split is a tenth of the training rows,
    chosen by `stream.seed`.
    """

    config: FolderConfig

    def root(self) -> Path:
        """The folder whose sub-folders are tasks.

        Raises:
            ConfigError: If it does not exist.
        """
        expected = (
            "a folder that holds a sub-folder per task with train, validation and test as .csv, "
            ".jsonl or .parquet"
        )
        if self.config.path is None:
            raise ConfigError(
                f"The stream '{self.config.name}' needs stream.path=<folder>: {expected}."
            )
        root = Path(self.config.path).expanduser()
        if not root.is_dir():
            raise ConfigError(
                f"stream.path={self.config.path} is not a folder; it must be {expected}."
            )
        return root

    def task_names(self) -> list[str]:
        """The tasks listed, or all sub-folders by name."""
        root = self.root()
        self.refuse_order()
        names = self.config.tasks
        if names is None:
            names = task_folders(root)
            if not names:
                raise ConfigError(
                    f"No sub-folder of {root} holds a file train.csv, train.jsonl or "
                    "train.parquet, so there is no task to learn."
                )
        for name in names:
            self._check_files(root, name)
        return list(names)

    def labels_of(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """What labels.json says, where there is one that names labels."""
        facts = read_facts(self.root(), name)
        return (facts.label_names, facts.answer_words) if facts.label_names else None

    def load(self, name: str) -> LoadedTask:
        """One task's files, read and checked."""
        root = self.root()
        files = {split: split_file(root / name, split) for split in SPLITS}
        tables = {split: read_rows(path) for split, path in files.items() if path is not None}
        facts = read_facts(root, name)
        paths = {split: path for split, path in files.items() if path is not None}
        kind = kind_of(tables, paths)
        if kind == "classification":
            loaded = classification(name, tables, paths, facts)
        else:
            loaded = generation(name, tables, paths, facts, facts.metric or self.config.metric)
        if "validation" in loaded.splits:
            return loaded
        train, validation = split_off(loaded.splits["train"], paths["train"], self.config.seed)
        splits = {"train": train, "validation": validation, "test": loaded.splits["test"]}
        return LoadedTask(
            name=name,
            splits=splits,
            metric=loaded.metric,
            labels=loaded.labels,
            answer_words=loaded.answer_words,
            instruction=loaded.instruction,
            input_template=loaded.input_template,
        )

    def neutral_text(self, seed: int) -> list[str]:
        """Training texts of the folder's tasks that are not in the stream; else the toy's."""
        root = self.root()
        chosen = set(self.task_names())
        others = [name for name in task_folders(root) if name not in chosen]
        if not others:
            return toy_neutral_text(seed)
        generator = Random(f"{seed}/neutral")
        texts: list[str] = []
        for name in others:
            path = split_file(root / name, "train")
            assert path is not None, "a task folder has a train file"
            known = texts_of(read_rows(path), path)
            texts += generator.sample(known, min(len(known), NEUTRAL_TEXTS // len(others)))
        generator.shuffle(texts)
        return texts

    def _check_files(self, root: Path, name: str) -> None:
        if name not in {path.name for path in root.iterdir() if path.is_dir()}:
            raise ConfigError(
                f"The stream '{self.config.name}' has no task '{name}' in {root}."
                + nearest(name, task_folders(root))
            )
        for split in ("train", "test"):
            if split_file(root / name, split) is None:
                there = ", ".join(sorted(path.name for path in (root / name).iterdir()))
                raise ConfigError(
                    f"The task '{name}' has no {split}.csv, {split}.jsonl or {split}.parquet in "
                    f"{root / name}, which holds {there or 'nothing'}."
                )


def task_folders(root: Path) -> list[str]:
    """The names of the sub-folders that hold a training split, in alphabetical order."""
    return sorted(
        path.name
        for path in root.iterdir()
        if any((path / f"train{ending}").is_file() for ending in ENDINGS)
    )
