"""Checkpoints on disk: what goes in comes out, and what was damaged is told and passed by."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clpeft.config import CheckpointConfig
from clpeft.training.checkpoint import Checkpoints
from clpeft.training.state import StateError, read_state, write_state
from tests.running import Outcome, run_it, same_bits

TENSORS = "tensors.safetensors"


def state(step: int = 1) -> dict[str, Any]:
    shared = torch.arange(6.0)
    return {
        "step": step,
        "matrix": [[None, 0.5], [1.0, 0.25]],
        "nothing": {},
        "name": "müller",
        "settings": {},
        "weights": {
            "a": torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]]),
            "b": torch.tensor([1, 2**40]),
            "c": torch.tensor(0.1, dtype=torch.bfloat16),
            "d": torch.tensor([], dtype=torch.float32),
            # two views of one memory, one of them not contiguous
            "e": [shared, shared.view(2, 3).T],
        },
    }


def test_what_goes_in_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    write_state(tmp_path / "one", state())
    found, expected = read_state(tmp_path / "one"), state()

    for key in ("step", "matrix", "nothing", "name"):
        assert found[key] == expected[key]
    for key in "abcd":
        one, other = found["weights"][key], expected["weights"][key]
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.contiguous().view(-1).view(torch.uint8).equal(other.view(-1).view(torch.uint8))
    assert found["weights"]["e"][1].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_written_again_it_replaces_the_first(tmp_path: Path) -> None:
    write_state(tmp_path / "one", state(1))
    write_state(tmp_path / "one", state(2))

    assert read_state(tmp_path / "one")["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut short": cut_short,
    "one bit flipped": one_bit_flipped,
    "emptied": emptied,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("file", [TENSORS, "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, file: str
) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(enabled=True, keep=2), {})
    write_state(checkpoints.folder / "step-9-task-1", state(9))
    broken = checkpoints.folder / "step-10-task-2"  # newer, though before it by name
    write_state(broken, state(10))
    found = checkpoints.newest()
    assert found is not None
    assert found["step"] == 10

    DAMAGE[damage](broken / file)
    with pytest.raises(StateError, match=broken.name):
        read_state(broken)
    with caplog.at_level(logging.WARNING, logger="clpeft"):
        found = checkpoints.newest()
    assert found is not None
    assert found["step"] == 9
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert broken.name in warning
    assert "the checkpoint before it is used" in warning


def test_replaced_state_stands_until_the_new_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(enabled=True, keep=1), {})
    folder = checkpoints.folder / "step-9-task-1"
    write_state(folder, state(1))

    def rename(source: Path, target: Path) -> None:
        if Path(target) == folder:
            raise KeyboardInterrupt  # killed between the two renames
        original(source, target)

    original = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            write_state(folder, state(2))
    assert not folder.exists()

    checkpoints.tidy()
    found = checkpoints.newest()
    assert found is not None
    assert found["step"] == 1
    assert [path.name for path in checkpoints.folder.iterdir()] == [folder.name]


def test_no_whole_checkpoint_is_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(enabled=True, keep=2), {})
    assert checkpoints.newest() is None
    # what a process that was killed while writing leaves
    unfinished = checkpoints.folder / ".step-9-task-1.part"
    unfinished.mkdir(parents=True)
    (unfinished / TENSORS).write_bytes(b"half")
    assert checkpoints.newest() is None


def test_run_with_a_damaged_checkpoint_ends_in_the_same_bits(
    finished: Callable[..., Outcome], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole = finished("ewc+replay")
    run_it(tiny("ewc+replay"), tmp_path / "run", interrupt_after=2)
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-*-task-2")
    cut_short(newest / TENSORS)
    resumed = run_it(tiny("ewc+replay"), tmp_path / "run")

    assert same_bits(resumed.trainable, whole.trainable)
    assert resumed.results["matrix"] == whole.results["matrix"]
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"{newest / TENSORS} is not what was written (checksum differs)" in log


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept(tiny: Callable[..., list[str]], tmp_path: Path, keep: int) -> None:
    outcome = run_it(tiny("finetune", f"training.checkpoint.keep={keep}"), tmp_path / "run")

    names = sorted(path.name for path in (outcome.directory / "checkpoints").iterdir())
    assert [int(name[-1]) for name in names] == [2, 3][-keep:]


def test_frozen_base_is_not_in_it(finished: Callable[..., Outcome]) -> None:
    saved = finished("ewc").state(2)

    assert set(saved["parameters"]) == set(finished("ewc").trainable)
    assert all("lora" in name for name in saved["parameters"])
    (folder,) = (finished("ewc").directory / "checkpoints").glob("step-*-task-2")
    sums = json.loads((folder / "checksums.json").read_text())
    assert {*sums, "checksums.json"} == {path.name for path in folder.iterdir()}
