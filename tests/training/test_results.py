"""Where a run takes its references from, and by what its weights are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clpeft.training.results import find_references, weights_digest

ALONE = [[0.25, 0.25], [0.9, 0.3], [0.9, 0.8]]
TOGETHER = [[0.25, 0.25], [None, None], [0.7, 0.6]]


def leave(folder: Path, name: str, matrix: list, setting: str = "same") -> None:
    (folder / name).mkdir()
    content = {
        "strategies": [name.split("-")[0]],
        "digests": {"setting": setting},
        "matrix": matrix,
    }
    (folder / name / "results.json").write_text(json.dumps(content))


def test_references_of_the_same_setting_and_seed(tmp_path: Path) -> None:
    assert find_references(tmp_path, "same", 0) == {}
    leave(tmp_path, "independent-s1-a", ALONE)
    leave(tmp_path, "independent-s0-b", ALONE, setting="other")
    leave(tmp_path, "independent+ewc-s0-c", ALONE)
    (tmp_path / "independent-s0-running").mkdir()
    assert find_references(tmp_path, "same", 0) == {}

    leave(tmp_path, "independent-s0-d", ALONE)
    leave(tmp_path, "joint-s0-e", TOGETHER)
    found = find_references(tmp_path, "same", 0)
    assert found == {"independent": [0.9, 0.8], "joint": [0.7, 0.6]}


def test_several_references_are_none(tmp_path: Path) -> None:
    # trained differently: which one is meant cannot be told
    for name in ("independent-s0-a", "independent-s0-b", "independent-s0-c"):
        leave(tmp_path, name, ALONE)
    leave(tmp_path, "joint-s0-e", TOGETHER)

    assert find_references(tmp_path, "same", 0) == {"joint": [0.7, 0.6]}


WEIGHTS = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(5.0)}


def test_equal_weights_have_equal_digests() -> None:
    same = {name: value.clone() for name, value in WEIGHTS.items()}
    assert weights_digest(same) == weights_digest(WEIGHTS)
    # what counts are the numbers in their order, not how they lie in memory
    strided = {**same, "a": WEIGHTS["a"].T.contiguous().T}
    assert weights_digest(strided) == weights_digest(WEIGHTS)
    assert len(weights_digest(WEIGHTS)) == 64


@pytest.mark.parametrize(
    "change",
    [
        # the next float32 after 5
        {"b": torch.nextafter(torch.tensor(5.0), torch.tensor(6.0))},
        {"b": torch.tensor([5.0])},
        {"b": torch.tensor(5.0, dtype=torch.float64)},
        {"b": torch.tensor(5.0, dtype=torch.bfloat16)},
        {"a": WEIGHTS["a"].T},
        {"a": WEIGHTS["a"].flatten()},
        {"c": torch.zeros(0)},
    ],
    ids=["bit", "shape", "double", "bfloat16", "order", "flat", "name"],
)
def test_whatever_differs_makes_another_digest(change: dict[str, torch.Tensor]) -> None:
    assert weights_digest({**WEIGHTS, **change}) != weights_digest(WEIGHTS)


def test_names_and_types_are_part_of_it() -> None:
    zeros = [torch.zeros(2, dtype=kind) for kind in (torch.float16, torch.bfloat16)]
    assert weights_digest({"a": zeros[0]}) != weights_digest({"a": zeros[1]})
    assert weights_digest({"a": zeros[0]}) != weights_digest({"b": zeros[0]})


def test_digest_is_of_all_that_was_trained(finished: Callable[..., Any]) -> None:
    outcome = finished("ewc")

    assert outcome.results["digests"]["weights"] == weights_digest(outcome.trainable)
    assert outcome.results["digests"]["weights"] != weights_digest(outcome.before)
