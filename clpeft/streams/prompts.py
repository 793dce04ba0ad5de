"""The words that a model is shown around an example's own text."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from clpeft.config import ConfigError

# A part of every cache key: to be raised whenever the same example would be shown differently.
PROMPT_VERSION = 2

# The end of every prompt; an answer follows it after one blank.
ANSWER = "Answer:"


@dataclass(frozen=True)
class PromptForm:
    """The fixed words around the input texts of one task.

    Args:
        pieces: Pairs of a fixed text and of the input that follows it: 0 the text, 1 its pair,
            None for nothing (the last piece).
    """

    pieces: tuple[tuple[str, int | None], ...]

    def fill(self, *texts: str) -> str:
        """The prompt of one example.

        Args:
            texts: The example's text and, where the task has pairs, its pair.
        """
        return "".join(
            fixed if field is None else fixed + texts[field] for fixed, field in self.pieces
        )

    @property
    def has_pair(self) -> bool:
        """Whether the prompt shows a second text."""
        return any(field == 1 for _, field in self.pieces)


def prompt_form(
    instruction: str,
    answer_words: Sequence[str],
    input_template: str,
    *,
    task_name: str | None = None,
) -> PromptForm:
    """The prompt of a task: what to do, what to choose from, the input, the request to answer.

    Args:
        instruction: What to do; may be empty.
        answer_words: What to choose from, for classification; empty for generation.
        input_template: How the input is shown, with `{text}` and, for pairs, `{text_pair}`.
        task_name: The task's name, where the prompt shall begin with it.

    Returns:
        The form to be filled with each example.

    Raises:
        ConfigError: If the template is not made of text, `{text}` and `{text_pair}`.

    Source:
        O-LoRA (Wang et al., 2023), whose prompts these are.
    """
    opening = f"Task: {task_name}\n" if task_name is not None else ""
    if instruction:
        opening += f"{instruction}\n"
    if answer_words:
        opening += f"Option: {', '.join(answer_words)} \n"
    pieces = list(_template_pieces(input_template))
    first, field = pieces[0]
    pieces[0] = (opening + first, field)
    last, field = pieces[-1]
    assert field is None
    pieces[-1] = (f"{last}\n{ANSWER}", None)
    return PromptForm(tuple(pieces))


def classifier_prefix(task_name: str | None) -> str:
    """What goes before a classifier's text: the task's name where it shall be shown."""
    return "" if task_name is None else f"{task_name}: "


def _template_pieces(template: str) -> list[tuple[str, int | None]]:
    """Splits a template at its fields; the last piece has no field.

    The template may come from a file that someone else wrote, so it is taken apart rather than
    formatted: `str.format` would follow attributes.
    """
    fields = {"text": 0, "text_pair": 1}
    mistake = ConfigError(
        f"The input template {template!r} may hold only the fields {{text}} and {{text_pair}}, "
        "and must hold {text}."
    )
    pieces: list[tuple[str, int | None]] = []
    closing = ""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise mistake from error
    for fixed, name, spec, conversion in parsed:
        if name is None:
            closing += fixed
        elif name in fields and not spec and conversion is None:
            pieces.append((closing + fixed, fields[name]))
            closing = ""
        else:
            raise mistake
    if not any(field == 0 for _, field in pieces):
        raise mistake
    return [*pieces, (closing, None)]
