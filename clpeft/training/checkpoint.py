"""Checkpoints: all that training changed, never the frozen base, and no pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.config import CheckpointConfig

if TYPE_CHECKING:
    from clpeft.training.loop import Loop

log = logging.getLogger(__name__)

TENSOR = "__tensor__"  # stands in the JSON where the tensors' file holds the value


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be trusted, and why."""


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: The run directory; checkpoints lie in `checkpoints/step-<n>/` below it.
        config: Whether any are written, and how many of the newest are kept.

    Attributes:
        history_position: Gives the length of history.jsonl in bytes, so that a resumed run
            continues the file where the checkpoint was taken.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.folder = directory / "checkpoints"
        self.config = config
        self.history_position: Callable[[], int] = lambda: 0

    def save(self, loop: Loop) -> None:
        """Saves the state at a task boundary."""
        run = loop.run
        if not self.config.enabled or not run.accelerator.is_main_process:
            return
        state = {
            "step": run.step,
            "tasks_seen": run.tasks_seen,
            "matrix": loop.matrix,
            "skipped": loop.skipped,
            "history": self.history_position(),
            "cost": loop.cost.state_dict(),
            "random": random_states(run.generator),
            "trainable": {name: p.detach() for name, p in run.trainable.items()},
            "strategies": {str(i): s.state_dict() for i, s in enumerate(run.strategies)},
        }
        write_state(self.folder / f"step-{run.step}-task-{run.tasks_seen}", state)
        for old in self._folders()[: -self.config.keep]:
            shutil.rmtree(old)

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint that is whole; a broken one is named and passed by."""
        for folder in reversed(self._folders()):
            try:
                state = read_state(folder)
            except CheckpointError as error:
                log.warning("%s; the checkpoint before it is used", error)
                continue
            log.info("continuing from %s", folder)
            return state
        return None

    def _folders(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        found = [p for p in self.folder.glob("step-*-task-*") if p.is_dir()]
        return sorted(found, key=lambda p: [int(part) for part in p.name.split("-")[1::2]])


def restore(loop: Loop, state: dict[str, Any]) -> None:
    """Puts a saved state into a fresh run, after its strategies' `setup`.

    Args:
        loop: A loop that has not trained yet.
        state: What `Checkpoints.newest` gave.
    """
    run = loop.run
    run.step = state["step"]
    run.tasks_seen = state["tasks_seen"]
    loop.matrix = state["matrix"]
    loop.skipped = state["skipped"]
    loop.cost.load_state_dict(state["cost"])
    for i, strategy in enumerate(run.strategies):
        strategy.load_state_dict(state["strategies"][str(i)])
    saved = state["trainable"]
    with torch.no_grad():
        for name, parameter in run.trainable.items():
            parameter.copy_(saved[name])
    set_random_states(state["random"], run.generator)


def random_states(generator: torch.Generator) -> dict[str, Any]:
    """The states of every source of random numbers that training draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "run": generator.get_state()}


def set_random_states(states: dict[str, Any], generator: torch.Generator) -> None:
    """Puts back what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    generator.set_state(states["run"])


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts and lists of tensors and plain values, aside and then renamed.

    Args:
        folder: Where to; replaced if it exists.
        state: Tensors go to tensors.safetensors, all else to state.json, checksums to
            checksums.json.
    """
    from safetensors.torch import save_file

    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    plain = _detached(state, "", tensors)
    save_file(tensors, aside / "tensors.safetensors")
    (aside / "state.json").write_text(json.dumps(plain))
    sums = {name: _checksum(aside / name) for name in ("tensors.safetensors", "state.json")}
    (aside / "checksums.json").write_text(json.dumps(sums))
    for path in (*aside.iterdir(), aside):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote.

    Raises:
        CheckpointError: If a file is missing, cut short or altered.
    """
    from safetensors.torch import load_file

    try:
        sums = json.loads((folder / "checksums.json").read_text())
        for name, expected in sums.items():
            if _checksum(folder / name) != expected:
                raise CheckpointError(f"{folder / name} is not what was written (checksum differs)")
        plain = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is incomplete ({error})") from error
    return _attached(plain, load_file(folder / "tensors.safetensors"))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _detached(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value with every tensor moved to `tensors`, its key left in its place."""
    if isinstance(value, Tensor):
        # a copy of its own: safetensors refuses tensors that share memory
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {TENSOR: path}
    if isinstance(value, dict):
        wrong = [key for key in value if not isinstance(key, str)]
        assert not wrong, f"keys of a state must be strings, not {wrong} at {path}"
        return {key: _detached(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_detached(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    assert value is None or isinstance(value, (bool, int, float, str)), f"{type(value)} at {path}"
    return value


def _attached(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _attached(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_attached(item, tensors) for item in value]
    return value
