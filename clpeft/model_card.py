"""The README of an exported model: what it is, what it scores, how it is loaded and asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from clpeft.config import result_settings
from clpeft.models.own import OwnModelConfig
from clpeft.streams.description import stream_of
from clpeft.streams.prompts import classifier_prefix
from clpeft.tracking.history import read_events

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from clpeft.config import ModelConfig
    from clpeft.serving import Models
    from clpeft.streams.base import Stream, Task

AUTO = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}
REGISTERED = "import clpeft.tuners  # so that PEFT knows the adapter's type\n"
HERE = "path/to/this/folder"


def model_card(models: Models, number: int, config: ModelConfig, *, merged: bool) -> str:
    """The README of the model that a run had after a task.

    Args:
        models: The run's.
        number: The number of tasks behind the model.
        config: How its base is loaded.
        merged: Whether it is a whole model rather than an adapter.
    """
    serving = models.serving
    stream = stream_of(serving.stream)
    task = stream.tasks[number - 1]
    what = "Model" if merged else f"Adapter (`{serving.peft}`)"
    frozen = models.record.frozen
    assert frozen is not None, "a run's directory holds its config"
    strategies = ", ".join(f"`{name}`" for name in frozen.strategies)
    stored = serving.quantization["method"]
    likewise = (
        "" if merged or stored == "none" else f"the base quantized ({stored}) as it was, and "
    )
    registered = "" if merged or _is_pefts(models.path(number)) else REGISTERED
    parts = [
        _head(config, merged),
        f"# {config.name} after task {number} of {len(stream.tasks)}, `{task.name}`",
        f"{what} of the run `{serving.run}`: trained by clpeft on the tasks of the stream "
        f"`{stream.name}` ({stream.scenario}-incremental), one after another, with {strategies}.",
        "## Scores",
        _scores(models, stream, number),
        "## Loading",
        f"```python\n{registered}{_loading(config, stream, merged)}```",
        f"or, with {likewise}the prompt and the labels that it was trained with:",
        f'```python\nimport clpeft\n\nloaded = clpeft.load("{HERE}")\nloaded.predict(["..."])\n```',
        "## Input",
        _input(config, stream, task),
        "## Settings",
        _settings(frozen),
    ]
    return "\n\n".join(parts) + "\n"


def _is_pefts(adapter: Path) -> bool:
    """Whether an adapter is of a type that PEFT has itself."""
    from peft import PeftConfig

    from clpeft.peft_methods.registration import register_types

    register_types()
    return type(PeftConfig.from_pretrained(adapter)).__module__.startswith("peft.")


def _head(config: ModelConfig, merged: bool) -> str:
    lines = [f"library_name: {'transformers' if merged else 'peft'}", "tags: [clpeft]"]
    if config.hub_id is not None:
        lines.append(f"base_model: {config.hub_id}")
    return "\n".join(["---", *lines, "---"])


def _scores(models: Models, stream: Stream, number: int) -> str:
    rows = [
        event["row"]
        for event in read_events(models.folder)
        if event["event"] == "evaluation" and event["trained"] == number
    ]
    if not rows:
        return "Not evaluated."
    table = ["| task | metric | score |", "|---|---|---|"]
    table += [
        f"| {task.name} | {task.metric} | {score:.4f} |"
        for task, score in zip(stream.tasks, rows[-1], strict=True)
        if score is not None
    ]
    return "\n".join(table)


def _loading(config: ModelConfig, stream: Stream, merged: bool) -> str:
    if isinstance(config, OwnModelConfig):
        return "\n".join(
            [
                "from peft import PeftModel",
                "",
                f'folder = "{HERE}"',
                f"# model: what the function of model={config.builder} builds",
                "model = PeftModel.from_pretrained(model, folder)\n",
            ]
        )
    auto = AUTO[config.task_type]
    source = config.path or config.hub_id
    base = "folder" if merged else json.dumps(source)
    options = [] if config.revision is None or merged else [f"revision={config.revision!r}"]
    options.append(f'dtype="{config.dtype}"')
    if config.task_type == "sequence_classification" and not merged:
        options += [f"num_labels={len(stream.label_names)}", "ignore_mismatched_sizes=True"]
    lines = [
        *([] if merged else ["from peft import PeftModel"]),
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'folder = "{HERE}"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(",
        *(f"    {argument}," for argument in (base, *options)),
        ")",
    ]
    if not merged:
        lines += [
            "model.config.pad_token_id = tokenizer.pad_token_id",
            "model = PeftModel.from_pretrained(model, folder)",
        ]
    return "\n".join(lines) + "\n"


def _input(config: ModelConfig, stream: Stream, task: Task) -> str:
    if config.task_type == "sequence_classification":
        prefix = classifier_prefix(task.name if stream.config.names_task else None)
        pair = ", and its pair as a second text" if task.has_pairs else ""
        labels = "\n".join(f"{place}. {name}" for place, name in enumerate(stream.label_names))
        return f"`{prefix}{{text}}`{pair}. The labels, by the place of their logit:\n\n{labels}"
    prompt = stream.prompt(task).fill("{text}", "{text_pair}")
    return f"```\n{prompt}\n```\n\nThe answer follows after one blank."


def _settings(frozen: DictConfig) -> str:
    lines = [f"{key}={value}" for key, value in result_settings(frozen).items()]
    return "\n".join(["```", *lines, "```"])
