"""A stream without its examples, as JSON: what it takes to ask a model about new texts."""

from __future__ import annotations

from typing import Any

from clpeft.streams.base import Stream, StreamConfig, Task
from clpeft.streams.contents import Contents

SETTINGS = ("name", "scenario", "max_length", "names_task")
FACTS = ("name", "metric", "labels", "answer_words", "instruction", "input_template")


def described(stream: Stream) -> dict[str, Any]:
    """What JSON can hold of a stream: settings, labels and prompts; none of its examples."""
    return {
        **{name: getattr(stream.config, name) for name in SETTINGS},
        "tasks": [
            {name: getattr(task, name) for name in FACTS} | {"pairs": task.has_pairs}
            for task in stream.tasks
        ],
    }


def stream_of(description: dict[str, Any]) -> Stream:
    """The stream that `described` has described, all its splits empty."""
    settings = {name: description[name] for name in SETTINGS}
    tasks = tuple(_task(index, facts) for index, facts in enumerate(description["tasks"]))
    return Stream(StreamConfig(**settings), tasks, Contents(), lambda seed: [])


def _task(index: int, facts: dict[str, Any]) -> Task:
    import datasets

    first = "text" if facts["labels"] else "input"
    columns = [first, "text_pair"] if facts["pairs"] else [first]
    empty = datasets.Dataset.from_dict({column: [] for column in columns})
    return Task(
        name=facts["name"],
        index=index,
        train=empty,
        validation=empty,
        test=empty,
        metric=facts["metric"],
        labels=tuple(facts["labels"]),
        answer_words=tuple(facts["answer_words"]),
        instruction=facts["instruction"],
        input_template=facts["input_template"],
        chance=None,
    )
