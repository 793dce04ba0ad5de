"""Where a run takes its references from, and what it says of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clpeft.models.weights import weights_digest
from clpeft.training.adapters import saved_bytes
from clpeft.training.results import find_references

ALONE = [[0.25, 0.25], [0.9, 0.3], [0.9, 0.8]]
TOGETHER = [[0.25, 0.25], [None, None], [0.7, 0.6]]


def leave(folder: Path, name: str, matrix: list, setting: str = "same", base: str = "b") -> None:
    (folder / name).mkdir()
    content = {
        "strategies": [name.split("-")[0]],
        "digests": {"setting": setting, "base": base},
        "matrix": matrix,
    }
    (folder / name / "results.json").write_text(json.dumps(content))


def test_references_of_the_same_setting_base_and_seed(tmp_path: Path) -> None:
    assert find_references(tmp_path, "same", 0, "b") == {}
    leave(tmp_path, "independent-s1-a", ALONE)
    leave(tmp_path, "independent-s0-b", ALONE, setting="other")
    leave(tmp_path, "independent+ewc-s0-c", ALONE)
    leave(tmp_path, "independent-s0-f", ALONE, base="retrained")
    (tmp_path / "independent-s0-running").mkdir()
    assert find_references(tmp_path, "same", 0, "b") == {}

    leave(tmp_path, "independent-s0-d", ALONE)
    leave(tmp_path, "joint-s0-e", TOGETHER)
    found = find_references(tmp_path, "same", 0, "b")
    assert found == {"independent": [0.9, 0.8], "joint": [0.7, 0.6]}


def test_several_references_are_none(tmp_path: Path) -> None:
    # trained differently: which one is meant cannot be told
    for name in ("independent-s0-a", "independent-s0-b", "independent-s0-c"):
        leave(tmp_path, name, ALONE)
    leave(tmp_path, "joint-s0-e", TOGETHER)

    assert find_references(tmp_path, "same", 0, "b") == {"joint": [0.7, 0.6]}


def test_bytes_are_of_the_latest_adapter(finished: Callable[..., Any]) -> None:
    cost = finished("olora").results["cost"]

    # a rank of 8 on each of three tasks, of which one trains
    assert cost["adapter_bytes"] == 3 * cost["trained_bytes"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_bytes_of_embeddings_that_are_saved_beside_the_adapter(
    finished: Callable[..., Any],
) -> None:
    outcome = finished("finetune", "stream.num_tasks=1", "peft.target=[embed_tokens,q_proj]")
    cost = outcome.results["cost"]
    embeddings = outcome.run.model.get_input_embeddings().base_layer.weight

    assert cost["adapter_bytes"] == cost["trained_bytes"] + 4 * embeddings.numel()


def test_latest_adapter_is_the_one_of_the_highest_number(tmp_path: Path) -> None:
    assert saved_bytes(tmp_path) is None
    sizes = {"9_i": 9, "10_j": 10, ".11_k.part": 11}  # the last was not written to its end
    for folder, size in sizes.items():
        (tmp_path / "adapters" / folder).mkdir(parents=True)
        file = tmp_path / "adapters" / folder / "adapter_model.safetensors"
        save_file({"weight": torch.zeros(size), "bias": torch.zeros(2).bfloat16()}, file)

    assert saved_bytes(tmp_path) == 4 * 10 + 2 * 2


def test_digest_is_of_all_that_was_trained(finished: Callable[..., Any]) -> None:
    outcome = finished("ewc")

    assert outcome.results["digests"]["weights"] == weights_digest(outcome.trainable)
    assert outcome.results["digests"]["weights"] != weights_digest(outcome.before)
