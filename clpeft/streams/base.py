"""Task and Stream: what a model is trained on one after another, checked before it is used."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from clpeft.config import ConfigError, at_least, between, one_of
from clpeft.streams.contents import Contents, content_digest, digest_of, normalise
from clpeft.streams.prompts import PromptForm, prompt_form

if TYPE_CHECKING:
    import datasets
    import pyarrow

SPLITS = ("train", "validation", "test")
SCENARIOS = ("task", "class", "domain")


@dataclass
class StreamConfig:
    """What every stream can be told."""

    kind: str = MISSING  # the registered builder
    name: str = MISSING  # what reports call the stream
    scenario: str = one_of(*SCENARIOS)  # which labels compete: the task's, all seen so far, all
    order: str | None = None  # a published order of tasks, where the stream has them
    tasks: list[str] | None = None  # explicit tasks; goes before order
    # of generation, subsampling and splitting; independent of the run's seed, so that all seeds of
    # a study see the same data
    seed: int = 0
    max_train: int | None = at_least(1, default=None)  # examples per task, balanced over labels
    max_validation: int | None = at_least(1, default=None)
    max_test: int | None = at_least(1, default=None)
    max_length: int = at_least(8)  # tokens, prompt and answer together; only the input is cut
    names_task: bool = False  # whether the prompt begins with the task's name
    allow_overlap: bool = False  # splits that share content: a warning rather than an error
    chance: float | None = between(
        0, 1, default=None
    )  # declared chance level; null: the untrained model's score


@dataclass(frozen=True)
class Task:
    """One task, its splits checked.

    Classification rows have `text`, `text_pair` (where the task has pairs), `label` (its index in
    `labels`) and `example_id`; generation rows `input`, `output`, `references` and `example_id`.
    The example id is the row's number in the full split, before subsampling.
    """

    name: str
    index: int
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    metric: str  # accuracy, exact_match or rougeL
    labels: tuple[str, ...]  # () for generation
    answer_words: tuple[str, ...]  # what a language model answers, one per label
    instruction: str
    input_template: str
    chance: float | None

    def split(self, name: str) -> datasets.Dataset:
        """One of the three splits by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @property
    def has_pairs(self) -> bool:
        """Whether an example has two texts."""
        return "text_pair" in self.train.column_names


@dataclass(frozen=True)
class LoadedTask:
    """A task as its builder found it: full splits, not yet compared or cut."""

    name: str
    # classification: text, [text_pair], label, example_id; generation: input, output, references,
    # example_id
    splits: Mapping[str, pyarrow.Table]
    metric: str
    labels: tuple[str, ...] = ()
    answer_words: tuple[str, ...] = ()
    instruction: str = ""
    input_template: str = "{text}"


class StreamBuilder(ABC):
    """Where the tasks of one kind of stream come from.

    Args:
        config: The stream's settings.
        data_dir: The folder of public data that the user named, if any.
    """

    def __init__(self, config: Any, data_dir: str | None) -> None:
        self.config = config
        self.data_dir = data_dir

    @abstractmethod
    def task_names(self) -> list[str]:
        """The stream's tasks in their order; loads no data.

        Raises:
            ConfigError: If the folder, the order or a task does not exist.
        """

    @abstractmethod
    def load(self, name: str) -> LoadedTask:
        """One task's full splits."""

    def refuse_order(self) -> None:
        """For streams that no paper has put in an order.

        Raises:
            ConfigError: If `order` is set.
        """
        if self.config.order is not None:
            raise ConfigError(
                f"The stream '{self.config.name}' has no published orders, so stream.order="
                f"{self.config.order} means nothing there; list the tasks in stream.tasks."
            )

    @abstractmethod
    def neutral_text(self, seed: int) -> list[str]:
        """Texts that are no task's examples; a generated base learns its language from them."""

    def labels_of(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """A task's labels and answer words where they are known without loading data."""
        return None


class Stream:
    """Tasks in the order in which they are learned, and which of their labels compete when.

    Args:
        config: The stream's settings.
        tasks: The tasks, in order.
        contents: The digests of everything that the stream's splits hold.
        neutral_text: Makes texts that belong to no task from a seed.

    Raises:
        ConfigError: If the scenario is `domain` and the tasks' labels differ.
    """

    def __init__(
        self,
        config: StreamConfig,
        tasks: tuple[Task, ...],
        contents: Contents,
        neutral_text: Callable[[int], list[str]],
    ) -> None:
        self.config = config
        self.name = config.name
        self.scenario = config.scenario
        self.seed = config.seed
        self.tasks = tasks
        # of everything about a stream that can change a result; not of its name or of where its
        # files lie: the same data elsewhere is the same stream
        self.fingerprint = self._fingerprint(contents.digest)
        self._contents = contents
        self._neutral_text = neutral_text
        if self.scenario == "domain":
            check_one_label_space(
                self.name, [(task.name, (task.labels, task.answer_words)) for task in tasks]
            )
            self.label_names = tasks[0].labels
            self._first_ids = [0] * len(tasks)
        else:
            self.label_names = tuple(
                f"{task.name}/{label}" for task in tasks for label in task.labels
            )
            sizes = [len(task.labels) for task in tasks]
            self._first_ids = [sum(sizes[:index]) for index in range(len(sizes))]

    def fingerprint_of(self, split: str) -> str:
        """The digest of what a score on one split depends on: its examples, prompts and labels.

        Runs that share it were scored on the same thing, whatever they were trained on.

        Args:
            split: train, validation or test.
        """
        return self._fingerprint("".join(self._contents.splits[split]))

    def _fingerprint(self, splits: str) -> str:
        facts = {
            "scenario": self.config.scenario,
            "max_length": self.config.max_length,
            "names_task": self.config.names_task,
            "splits": splits,
            "tasks": [
                [
                    task.name,
                    task.metric,
                    task.labels,
                    task.answer_words,
                    task.instruction,
                    task.input_template,
                    task.chance,
                ]
                for task in self.tasks
            ],
        }
        return digest_of(json.dumps(facts))

    @property
    def answer_words(self) -> tuple[str, ...]:
        """What a language model answers for each global label."""
        if self.scenario == "domain":
            return self.tasks[0].answer_words
        return tuple(word for task in self.tasks for word in task.answer_words)

    def global_labels(self, task_index: int) -> list[int]:
        """The global id of each of a task's labels, by the label's index in the task."""
        first = self._first_ids[task_index]
        return list(range(first, first + len(self.tasks[task_index].labels)))

    def candidates(self, task_index: int, seen: int, task_id_given: bool) -> list[int]:
        """The labels that compete when a task is evaluated.

        Args:
            task_index: The task that is evaluated.
            seen: The number of tasks that were trained so far.
            task_id_given: Whether the model is told which task an example comes from.

        Returns:
            Global label ids, ascending; empty for a generation task.
        """
        if task_id_given or self.scenario != "class":
            return self.global_labels(task_index)
        # a task ahead of training competes with its own labels too: it could win no other way
        return self._labels_of_first(max(seen, task_index + 1))

    def training_candidates(self, task_index: int) -> list[int]:
        """The labels that compete in the loss while a task is trained: global ids, ascending."""
        if self.scenario != "class":
            return self.global_labels(task_index)
        return self._labels_of_first(task_index + 1)

    def _labels_of_first(self, count: int) -> list[int]:
        return [label for index in range(count) for label in self.global_labels(index)]

    def prompt(self, task: Task) -> PromptForm:
        """The fixed words around a task's input when a language model is asked.

        Where the answers of all tasks compete none are listed: a list would tell the task.
        """
        return prompt_form(
            task.instruction,
            () if self.scenario == "class" else task.answer_words,
            task.input_template,
            task_name=task.name if self.config.names_task else None,
        )

    def neutral_text(self, seed: int) -> list[str]:
        """Texts that belong to no task of this stream, for a generated model's warm-up.

        Args:
            seed: Of their choice and order.

        Returns:
            Texts none of which occurs in any split of the stream.
        """
        return [
            text
            for text in self._neutral_text(seed)
            if content_digest(normalise(text)) not in self._contents.seen
        ]

    def training_text(self) -> Iterator[str]:
        """Every training example as a language model sees it, to train a tokenizer on."""
        for task in self.tasks:
            form = self.prompt(task)
            if task.labels:
                pairs = task.train["text_pair"] if task.has_pairs else None
                for row, (text, label) in enumerate(
                    zip(task.train["text"], task.train["label"], strict=True)
                ):
                    pair = pairs[row] if pairs is not None else ""
                    yield f"{form.fill(text, pair)} {task.answer_words[label]}"
            else:
                for text, output in zip(task.train["input"], task.train["output"], strict=True):
                    yield f"{form.fill(text)} {output}"


def check_one_label_space(
    stream: str, known: Sequence[tuple[str, tuple[tuple[str, ...], tuple[str, ...]]]]
) -> None:
    """Checks that tasks of the domain-incremental scenario share their labels.

    Args:
        stream: The stream's name.
        known: Task and its (label names, answer words), for every task.

    Raises:
        ConfigError: If a task has others than the first.
    """
    for name, labels in known[1:]:
        first_name, first = known[0]
        for what, mine, other in zip(("labels", "answer words"), labels, first, strict=True):
            if mine != other:
                raise ConfigError(
                    f"stream.scenario=domain needs the same {what} in every task of '{stream}', "
                    f"but '{first_name}' has {', '.join(other) or 'none'} and '{name}' has "
                    f"{', '.join(mine) or 'none'}; choose stream.scenario=task or class, or "
                    "stream.tasks that share theirs."
                )
