"""By what weights are known, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from clpeft.config import ModelConfig
from clpeft.models.weights import base_digest, weights_digest

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


def config(path: Path | None, **more: str) -> ModelConfig:
    return ModelConfig(name="mine", path=None if path is None else str(path), **more)


@pytest.fixture
def base(bases: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model's folder that may be changed."""
    return Path(shutil.copytree(bases("tiny_llama"), tmp_path / "base"))


def known(folder: Path, tmp_path: Path) -> str:
    return base_digest(config(folder), nn.Identity(), str(folder), tmp_path / "cache")


def change(folder: Path) -> None:
    """Moves one number of a model's weights by one bit, the file's size unchanged."""
    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    flat = weights[name].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_it_is_that_of_settings_and_weights(base: Path, tmp_path: Path) -> None:
    settings = json.loads((base / "config.json").read_text())
    del settings["transformers_version"]
    content = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    both = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest() + content

    assert known(base, tmp_path) == hashlib.sha256(both.encode()).hexdigest()[:16]


def test_another_setting_makes_another_base(base: Path, tmp_path: Path) -> None:
    settings = json.loads((base / "config.json").read_text())
    found = {known(base, tmp_path)}

    def digest(**others: object) -> str:
        (base / "config.json").write_text(json.dumps({**settings, **others}, indent=1))
        return known(base, tmp_path)

    # what a saving library says of itself
    assert {digest(transformers_version="4.0.0", _name_or_path="elsewhere")} == found
    found.add(digest(rms_norm_eps=1e-3))
    found.add(digest(rms_norm_eps=1e-4))
    assert len(found) == 3


def test_one_base_in_two_folders_is_one(base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "elsewhere")
    (other / "README.md").write_text("what else lies there is not the model")

    assert known(base, tmp_path) == known(other, tmp_path)


def test_a_base_trained_on_in_its_folder_is_another(base: Path, tmp_path: Path) -> None:
    before, size = known(base, tmp_path), (base / "model.safetensors").stat().st_size
    change(base)

    assert (base / "model.safetensors").stat().st_size == size
    assert known(base, tmp_path) != before


def test_a_file_is_read_once_until_it_is_touched(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *of: read.append(1) or digest(*of))
    first = known(base, tmp_path)
    assert known(base, tmp_path) == first
    assert len(read) == 1
    os.utime(base / "model.safetensors", ns=(1, 1))

    assert known(base, tmp_path) == first
    assert len(read) == 2


def test_the_hub_s_cache_says_it_by_the_file_s_name(base: Path, tmp_path: Path) -> None:
    before = known(base, tmp_path)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    weights = base / "model.safetensors"
    blob = blobs / hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)
    blob.write_bytes(b"not read")

    assert known(base, tmp_path) == before


def test_every_part_of_a_model_in_parts_counts(base: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(parts, max_shard_size="50KB")
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 1
    found = {known(parts, tmp_path)}
    for file in files:
        weights = load_file(parts / file)
        save_file({n: w + 1 for n, w in weights.items()}, parts / file, metadata={"format": "pt"})
        found.add(known(parts, tmp_path))

    assert len(found) == 1 + len(files)


def test_the_format_that_is_loaded_counts(base: Path, tmp_path: Path) -> None:
    before = known(base, tmp_path)
    (base / "pytorch_model.bin").write_bytes(b"not read where there is the other")
    assert known(base, tmp_path) == before
    (base / "model.safetensors").unlink()

    assert known(base, tmp_path) != before


def test_a_base_that_is_built_here_is_known_by_its_recipe(tmp_path: Path) -> None:
    built = config(None, architecture={"model_type": "llama"})

    assert (
        base_digest(built, nn.Identity(), "/cache/bases/tiny_llama-0123", tmp_path)
        == "tiny_llama-0123"
    )


def test_weights_that_cannot_be_found_are_known_by_their_name(tmp_path: Path) -> None:
    named = config(None, hub_id="org/model", revision="v2")
    expected = hashlib.sha256(b"org/model@v2").hexdigest()[:16]

    assert base_digest(named, nn.Identity(), "org/model", tmp_path) == expected


def test_an_adapter_counts_beside_its_base(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    told = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    one = known(adapter, tmp_path)
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    other = known(adapter, tmp_path)
    change(base)

    assert len({known(base, tmp_path), one, other, known(adapter, tmp_path)}) == 4
