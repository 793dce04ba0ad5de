"""The words around an input."""

from __future__ import annotations

import pytest

from clpeft.config import ConfigError
from clpeft.streams.prompts import classifier_prefix, prompt_form


def test_prompt_of_a_classification_task_is_o_loras() -> None:
    form = prompt_form("What is it?", ("yes", "no"), "{text}")
    assert form.fill("Rain.") == "What is it?\nOption: yes, no \nRain.\nAnswer:"


def test_prompt_of_a_pair() -> None:
    form = prompt_form("Same?", ("yes", "no"), "sentence 1: {text}\nsentence 2: {text_pair}")
    assert form.has_pair
    assert form.fill("A", "B") == ("Same?\nOption: yes, no \nsentence 1: A\nsentence 2: B\nAnswer:")


def test_prompt_of_a_generation_task_has_no_options() -> None:
    assert prompt_form("Sum up.", (), "{text}").fill("Long.") == "Sum up.\nLong.\nAnswer:"


def test_prompt_without_instruction_begins_with_the_options() -> None:
    assert prompt_form("", ("a", "b"), "{text}").fill("x") == "Option: a, b \nx\nAnswer:"


def test_task_name_stands_first_where_asked_for() -> None:
    form = prompt_form("Sum up.", (), "{text}", task_name="news")
    assert form.fill("x") == "Task: news\nSum up.\nx\nAnswer:"
    assert classifier_prefix("news") == "news: "
    assert classifier_prefix(None) == ""


def test_braces_in_texts_and_doubled_braces_in_templates_are_kept() -> None:
    form = prompt_form("", (), "{{json}} {text} {text_pair}!")
    assert form.fill("{text_pair}", "{0}") == "{json} {text_pair} {0}!\nAnswer:"


@pytest.mark.parametrize(
    "template",
    ["{text.__class__}", "{text!r}", "{text:>9}", "{other} {text}", "{text_pair}", "{text", "none"],
)
def test_templates_with_anything_else_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="may hold only the fields"):
        prompt_form("", (), template)
