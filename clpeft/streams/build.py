"""Streams from their settings: tasks found, read, checked and cut to size."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from clpeft.config import ConfigError, nearest
from clpeft.registry import STREAMS
from clpeft.streams.base import (
    SCENARIOS,
    SPLITS,
    LoadedTask,
    Stream,
    StreamBuilder,
    StreamConfig,
    Task,
    check_one_label_space,
)
from clpeft.streams.contents import Contents, check_disjoint, content_digests
from clpeft.streams.draw import sample_rows


def build_stream(config: StreamConfig, *, data_dir: str | None) -> Stream:
    """The stream that a config describes, loaded and checked.

    Args:
        config: The stream's settings, as a dataclass or as composed by Hydra.
        data_dir: The folder of public data (`paths.data_dir`), where the stream needs one.

    Returns:
        The stream, its splits disjoint and cut to the sizes asked for.

    Raises:
        ConfigError: If the data does not fit what the stream needs.
    """
    builder = _builder(config, data_dir)
    names = _checked_names(builder)
    tasks = []
    contents = Contents()
    for index, name in enumerate(names):
        loaded = builder.load(name)
        tasks.append(_finish(loaded, index, builder.config, contents))
    return Stream(builder.config, tuple(tasks), contents, builder.neutral_text)


def check_stream(config: StreamConfig, data_dir: str | None) -> None:
    """Finds mistakes that show without loading data: folders, task names, orders, labels.

    Args:
        config: The stream's settings, as a dataclass or as composed by Hydra.
        data_dir: The folder of public data, where the stream needs one.

    Raises:
        ConfigError: For the first mistake found.
    """
    builder = _builder(config, data_dir)
    names = _checked_names(builder)
    known = [(name, labels) for name in names if (labels := builder.labels_of(name)) is not None]
    if builder.config.scenario == "domain":
        check_one_label_space(builder.config.name, known)


def task_names(config: StreamConfig, data_dir: str | None) -> list[str]:
    """The tasks of a stream in their order; loads no data.

    Args:
        config: The stream's settings, as a dataclass or as composed by Hydra.
        data_dir: The folder of public data, where the stream needs one.

    Raises:
        ConfigError: If there are none, or one does not exist.
    """
    return _checked_names(_builder(config, data_dir))


def _builder(config: StreamConfig, data_dir: str | None) -> StreamBuilder:
    settings = OmegaConf.to_object(config) if isinstance(config, DictConfig) else config
    assert isinstance(settings, StreamConfig), "a stream's config is composed from its schema"
    if settings.kind not in STREAMS:
        kinds = [entry.name for entry in STREAMS]
        raise ConfigError(
            f"stream.kind is '{settings.kind}', which no stream registers."
            + nearest(settings.kind, kinds)
        )
    if settings.scenario not in SCENARIOS:
        raise ConfigError(
            f"stream.scenario is '{settings.scenario}'; it must be one of {', '.join(SCENARIOS)}."
        )
    return STREAMS[settings.kind].target(settings, data_dir)


def _checked_names(builder: StreamBuilder) -> list[str]:
    names = builder.task_names()
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"The stream '{builder.config.name}' lists the task '{twice[0]}' twice in "
            f"{builder.config.tasks or builder.config.order}; each task is learned once."
        )
    if not names:
        raise ConfigError(
            f"The stream '{builder.config.name}' has no tasks: stream.tasks is empty."
        )
    return names


def _finish(loaded: LoadedTask, index: int, config: StreamConfig, contents: Contents) -> Task:
    """Compares a task's splits, cuts them to size, and makes the task of them."""
    import datasets

    for split in SPLITS:
        if not len(loaded.splits[split]):
            raise ConfigError(f"The {split} split of task '{loaded.name}' has no rows.")
    digests = {split: content_digests(loaded.splits[split]) for split in SPLITS}
    first_column = "text" if loaded.labels else "input"
    texts = {split: loaded.splits[split][first_column] for split in SPLITS}
    check_disjoint(loaded.name, digests, texts, config.allow_overlap)
    sizes = (config.max_train, config.max_validation, config.max_test)
    finished = {}
    for position, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
        table = loaded.splits[split]
        contents.add_full_split(table, digests[split])
        if size is not None and size < len(table):
            labels = table["label"].to_numpy() if loaded.labels else None
            # the name, not the position, so that a task's sample is the same in every order
            seed = (config.seed, position, *loaded.name.encode())
            table = table.take(sample_rows(labels, size, len(table), seed))
        finished[split] = datasets.Dataset(
            table.combine_chunks(), split=split, fingerprint=contents.add_split(split, table)
        )
    return Task(
        name=loaded.name,
        index=index,
        train=finished["train"],
        validation=finished["validation"],
        test=finished["test"],
        metric=loaded.metric,
        labels=loaded.labels,
        answer_words=loaded.answer_words,
        instruction=loaded.instruction,
        input_template=loaded.input_template,
        chance=config.chance,
    )
