"""A run's model, ready to answer, with one or several of its adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clpeft.config import ConfigError, ModelConfig, RunError
from clpeft.evaluation.answers import Batchwise, classified, ranked, written
from clpeft.evaluation.generation import exact_match
from clpeft.models.adapted import adapter_settings
from clpeft.models.load import load_model, load_tokenizer, make_objective, model_source
from clpeft.models.mixed_batches import refuse_mixed_batches
from clpeft.models.objective import beneath_adapter
from clpeft.models.own import OwnModelConfig
from clpeft.models.quantize import dequantized
from clpeft.models.weights import base_digest
from clpeft.peft_methods.registration import register_types
from clpeft.serving import Models
from clpeft.streams.base import Task
from clpeft.streams.batching import Collator, sorted_batches
from clpeft.streams.description import stream_of
from clpeft.streams.encoded import tokenizer_fingerprint
from clpeft.streams.tokenize import Encoder, label_answers
from clpeft.training.checkpoint import trained_parameters

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from clpeft.streams.base import Stream

ALL = "all"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Loaded:
    """A model of a run, in eval mode and on its device; it answers as the run's evaluation asked.

    Args:
        models: Where it comes from.
        numbers: The tasks whose adapters it has, by number; the last is the active one.
        model: The model.
        tokenizer: Its tokenizer.
        stream: The run's stream, without examples.

    Attributes:
        model: `PeftModel` where the run trained an adapter, and a plain model of transformers where
            not. Each adapter is called `task_<k>`. It has all that are loaded, but for adapters
            that train biases of the base (`peft.bias`), of which it has the active one.
        tokenizer: Its tokenizer.
        stream: The run's tasks, their labels and prompts; without examples.
        number: How many tasks are behind the active adapter: the number of its own.
    """

    def __init__(
        self,
        models: Models,
        numbers: Sequence[int],
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        stream: Stream,
    ) -> None:
        serving = models.serving
        config = serving.model_config
        self.model: Any = model
        self.tokenizer = tokenizer
        self.number = numbers[-1]
        self._models = models
        self._numbers = list(numbers)
        self.stream = stream
        self._evaluation = serving.evaluation
        self._task_type = config.task_type
        self._answers = label_answers(stream, tokenizer, config.task_type)
        self._encoder = Encoder(stream, tokenizer, config.task_type, self._answers)
        self._collator = Collator(config.task_type, int(tokenizer.pad_token_id))
        # which labels compete is asked of the stream
        every = torch.ones(len(stream.tasks), len(stream.label_names), dtype=torch.bool)
        self._objective = make_objective(config, model, tokenizer, every)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def task(self) -> str:
        """The task of the active adapter."""
        return self.stream.tasks[self.number - 1].name

    @property
    def tasks(self) -> list[str]:
        """The tasks whose adapters are loaded."""
        return [self.stream.tasks[number - 1].name for number in self._numbers]

    @property
    def labels(self) -> list[str]:
        """The labels that compete when the active adapter is asked about its task."""
        names = self.stream.label_names
        return [names[label] for label in self._competing(self.stream.tasks[self.number - 1])]

    def use(self, task: int | str) -> Loaded:
        """Makes the adapter of a task the active one; returns this.

        Args:
            task: Its number, from 1, or its name.

        Raises:
            ConfigError: If that adapter is not loaded.
        """
        number = self._models.number(task)
        if number not in self._numbers:
            raise ConfigError(
                f"The adapter of '{self.stream.tasks[number - 1].name}' is not loaded, but those "
                f"of {', '.join(self.tasks)}; load them all with task='{ALL}'."
            )
        if len(self._numbers) > 1:
            name = adapter_name(number)
            if name not in self.model.peft_config:
                _swap(self.model, name, self._models.path(number))
            self.model.set_adapter(name)
            self.model.requires_grad_(False)  # which PEFT lets the active one train
        self.number = number
        return self

    @torch.inference_mode()
    def predict(
        self, texts: Sequence[str | tuple[str, str]], task: int | str | None = None
    ) -> list[str]:
        """What the model with its active adapter answers, asked as the run's evaluation asks.

        Args:
            texts: New texts; where the task has pairs, pairs.
            task: Whose prompt and labels they are asked with, by number or name; the active
                adapter's own if not given.

        Returns:
            Per text the name of a label, as `labels` has it, or what the model writes where the
            task has no labels. With `evaluation.mode=generate` also what it writes where that is no
            label's answer.

        Raises:
            ValueError: If a pair is given to a task of single texts, or the other way round.
        """
        number = self.number if task is None else self._models.number(task)
        asked = self.stream.tasks[number - 1]
        if not len(texts):
            return []
        lengths, answer = self._question(asked, self._encoded(asked, texts))
        found = np.empty(len(texts), dtype=object)
        with self._autocast():
            for rows in sorted_batches(lengths, self._evaluation["batch_size"]):
                found[rows] = answer(rows)
        return found.tolist()

    def _question(self, task: Task, examples: Dataset) -> Batchwise:
        """What asks the model about examples of a task, and answers with names or texts."""
        names = self.stream.label_names
        labels = self._competing(task)
        if self._task_type == "sequence_classification":
            lengths, choose = classified(self.model, self._collator, examples, labels, self.device)
            return lengths, lambda rows: [names[label] for label in choose(rows)]
        if task.labels and self._evaluation["mode"] == "rank":
            candidates = list(dict.fromkeys(self._answers[label] for label in labels))
            owners = {self._answers[label]: names[label] for label in self._by_priority(task)}
            lengths, choose = ranked(
                self.model, self.tokenizer, self._objective, examples, candidates
            )
            return lengths, lambda rows: [owners[candidates[place]] for place in choose(rows)]
        limit = self._evaluation["max_new_tokens"]
        if task.labels:
            limit = max(map(len, self._answers))
        lengths, write = written(self.model, self.tokenizer, examples, limit)
        return lengths, lambda rows: [self._named(task, text) for text in write(rows)]

    def _competing(self, task: Task) -> list[int]:
        given = self._evaluation["task_id_given"]
        return self.stream.candidates(task.index, self.number, given)

    def _by_priority(self, task: Task) -> list[int]:
        """The labels that compete, the task's own last: theirs is a word that several share."""
        own = self.stream.global_labels(task.index)
        return [*(label for label in reversed(self._competing(task)) if label not in own), *own]

    def _named(self, task: Task, text: str) -> str:
        """The label that a text is the answer of; the text itself where it is none's."""
        words, names = self.stream.answer_words, self.stream.label_names
        for label in reversed(self._by_priority(task)):
            if exact_match(text, [words[label]]):
                return names[label]
        return text

    def _encoded(self, task: Task, texts: Sequence[str | tuple[str, str]]) -> Dataset:
        """Texts as evaluation reads a task's examples; what their answers are is not known."""
        import datasets
        import pyarrow

        rows = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        if isinstance(texts, str) or any(len(row) != 1 + task.has_pairs for row in rows):
            wanted = "pairs of texts" if task.has_pairs else "single texts"
            raise ValueError(f"The task '{task.name}' is asked with a list of {wanted}.")
        columns: dict[str, Any] = {
            "text" if task.labels else "input": [row[0] for row in rows],
            "example_id": np.arange(len(rows)),
        }
        if task.has_pairs:
            columns["text_pair"] = [row[1] for row in rows]
        if task.labels:
            columns["label"] = np.zeros(len(rows), dtype=np.int64)
        else:
            columns["output"] = [""] * len(rows)
        table = self._encoder.encode(task, pyarrow.table(columns), "given")
        return datasets.Dataset(table)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS.get(self._evaluation["precision"])
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def load(
    folder: str | Path,
    task: int | str | None = None,
    *,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """See `clpeft.load`."""
    models = Models(Path(folder))
    if task == ALL and models.paths:
        numbers = list(models.paths)
    else:
        numbers = [models.number(None if task == ALL else task)]
    config = replace(models.base(base), trust_remote_code=trust_remote_code)
    return assembled(models, numbers, config, device)


def assembled(
    models: Models,
    numbers: Sequence[int],
    config: ModelConfig,
    device: str | torch.device | None = None,
    *,
    dequantize: bool = False,
) -> Loaded:
    """Puts the adapters of some tasks on their base model.

    Args:
        models: Of a run, or an export.
        numbers: The tasks, by number; the last will be the active one.
        config: How the base is loaded.
        device: Where to; the accelerator if there is one.
        dequantize: Whether a quantized base is turned back into floating point.

    Raises:
        ConfigError: If a model is missing, the base's tokenizer is another one, or PEFT cannot hold
            the adapters together.
    """
    serving = models.serving
    paths = {number: models.path(number) for number in numbers}
    if len(paths) > 1 and not serving.adapts:
        raise ConfigError(
            f"peft={serving.peft} leaves whole models, which cannot be loaded together; choose one "
            f"of the tasks {', '.join(map(str, paths))}."
        )
    stream = stream_of(serving.stream)
    source = model_source(config, stream, Path())
    tokenizer = load_tokenizer(config, source, stream)
    if tokenizer_fingerprint(tokenizer) != serving.tokenizer:
        raise ConfigError(
            f"The tokenizer in {source} is not the one that {serving.run} was trained with; give "
            f"the folder of a base model that has it as base= (--base)."
        )
    labels, how = len(stream.label_names), serving.quantized
    model, _ = load_model(config, source, tokenizer, labels, how, serving.trained_whole)
    if dequantize:
        model = dequantized(model)
    if isinstance(config, OwnModelConfig) and serving.base_digest is not None:
        if serving.base_digest != base_digest(config, model, source, Path()):
            raise ConfigError(
                f"The function of model={config.builder} builds another model now than when "
                f"{serving.run} was made: its weights differ."
            )
    if not serving.merged:
        if serving.adapts:
            model = _adapted(model, paths, serving.peft)
        else:
            model = _trained(model, *paths.values())
    if config.task_type == "sequence_classification" and not isinstance(config, OwnModelConfig):
        plain = beneath_adapter(model).config
        plain.id2label = dict(enumerate(stream.label_names))
        plain.label2id = {name: label for label, name in plain.id2label.items()}
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model.to(device or found or "cpu")
    return Loaded(models, list(paths), model.eval(), tokenizer, stream).use(numbers[-1])


def adapter_name(number: int) -> str:
    """What PEFT calls the adapter of a task."""
    return f"task_{number}"


def _adapted(model: PreTrainedModel | PeftModel, paths: dict[int, Path], peft: str) -> PeftModel:
    """A base model with the adapters of some folders, as far as it holds them together."""
    from peft import PeftModel

    register_types()
    (first, folder), *others = paths.items()
    if any(_trains_biases(path) for path in paths.values()):
        ((first, folder), others) = (list(paths.items())[-1], [])
    with _whole(folder):
        adapted = PeftModel.from_pretrained(model, folder, adapter_name=adapter_name(first))
    for number, folder in others:
        try:
            with _whole(folder):
                adapted.load_adapter(folder, adapter_name(number))
        except ValueError as error:
            raise ConfigError(
                f"PEFT does not hold several such adapters at once "
                f"({str(error).splitlines()[0].rstrip('.')}); load one task at a time."
            ) from error
    refuse_mixed_batches(adapted, peft)
    return adapted


def _trains_biases(adapter: Path) -> bool:
    """Whether biases of the base are an adapter's own, so that the base has those of one only."""
    settings = adapter_settings(str(adapter))
    return settings is not None and settings.get("bias", "none") != "none"


def _swap(model: PeftModel, name: str, folder: Path) -> None:
    """Loads an adapter in the place of the one that a model has.

    Its biases go over those of the other: adapters of one run train the same.
    """
    held = dict(model.peft_config)
    for config in held.values():
        config.bias = "none"  # else PEFT would not take the other, and it needs one to be there
    with _whole(folder):
        model.load_adapter(folder, name, torch_device=str(next(model.parameters()).device))
    model.set_adapter(name)
    for other in held:
        model.delete_adapter(other)
    model.eval()


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Refuses an adapter that lacks weights, with which PEFT would go on, and answer wrongly."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            yield
    except UserWarning as warning:
        raise RunError(f"The adapter in {folder} is not whole: {warning}") from warning


@torch.no_grad()
def _trained(model: PreTrainedModel | PeftModel, checkpoint: Path) -> PreTrainedModel | PeftModel:
    """A base model with the weights that a checkpoint has trained of it."""
    for name, value in trained_parameters(checkpoint).items():
        model.get_parameter(name).copy_(value)
    return model
