"""Frozen: what trains is a head, which is saved and loaded like any adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from clpeft.models.load import count_parameters
from clpeft.peft_methods.base import apply_peft
from clpeft.peft_methods.frozen import FrozenConfig
from tests.peft_methods.models import (
    NEW_IN_BERT,
    bert,
    llama_classifier,
    logits,
    moved,
    training,
)

FROZEN = FrozenConfig(method="frozen")


@pytest.mark.parametrize(
    ("make", "new", "expected"),
    [
        # pooler 16 → 16 and classifier 16 → 3, each with biases
        (bert, NEW_IN_BERT, 16 * 16 + 16 + 16 * 3 + 3),
        # of a BERT that was a classifier before, whose pooler has weights
        (bert, ["classifier"], 16 * 3 + 3),
        (llama_classifier, ["score"], 16 * 3),
    ],
)
def test_the_head_trains_and_nothing_else(
    make: Callable[[], PreTrainedModel], new: list[str], expected: int
) -> None:
    model = apply_peft(make(), FROZEN, "sequence_classification", new)

    assert count_parameters(model)[1] == expected
    assert {name.split(".modules_to_save")[0] for name in training(model)} == {
        f"base_model.model.{path}" for path in new
    }


def test_it_changes_nothing_before_it_is_trained() -> None:
    base = bert()
    before = logits(base)

    model = apply_peft(base, FROZEN, "sequence_classification", NEW_IN_BERT)
    assert torch.equal(logits(model), before)


def test_heads_are_saved_loaded_and_switched_by_peft_alone(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")

    def base() -> PreTrainedModel:
        return type(bert()).from_pretrained(tmp_path / "base")

    expected = []
    for size in (0.3, 0.6):
        model = apply_peft(base(), FROZEN, "sequence_classification", NEW_IN_BERT)
        moved(model, size)
        expected.append(logits(model))
        model.save_pretrained(tmp_path / str(size))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "0.3", adapter_name="first")
    loaded.load_adapter(tmp_path / "0.6", adapter_name="second")

    for name, logit in (("second", expected[1]), ("first", expected[0])):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logit)
