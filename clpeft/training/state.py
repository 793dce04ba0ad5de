"""Nested states on disk: tensors apart from plain values, checksums, and no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

TENSOR = "__tensor__"  # stands in the JSON where the tensors' file holds the value
PAIRS = "__pairs__"  # a dict whose keys are not all strings, as an optimizer's state has them
TUPLE = "__tuple__"
MARKS = {TENSOR, PAIRS, TUPLE}
TENSORS, PLAIN, CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"


class StateError(RuntimeError):
    """A stored state that cannot be trusted, and why."""


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts, lists and tuples of tensors and plain values, aside and then renamed.

    Args:
        folder: Where to; replaced if it exists.
        state: Tensors go to tensors.safetensors, all else to state.json, checksums to
            checksums.json.

    Raises:
        OSError: If it cannot be written; what was there before then still is.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    tensors: dict[str, Tensor] = {}
    plain = _detached(state, "", tensors)
    try:
        aside.mkdir(parents=True)
        try:
            save_file(tensors, aside / TENSORS)
        except SafetensorError as error:  # what an OSError becomes inside of it
            raise OSError(str(error)) from error
        (aside / PLAIN).write_text(json.dumps(plain))
        sums = {name: _checksum(aside / name) for name in (TENSORS, PLAIN)}
        (aside / CHECKSUMS).write_text(json.dumps(sums))
        for path in (*aside.iterdir(), aside):
            _flush(path)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    # the one that is replaced stands until the new one does
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(aside, folder)
    _flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote.

    Raises:
        StateError: If a file is missing, cut short or altered.
    """
    from safetensors.torch import load_file

    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        for name, expected in sums.items():
            if _checksum(folder / name) != expected:
                raise StateError(f"{folder / name} is not what was written (checksum differs)")
        plain = json.loads((folder / PLAIN).read_text())
    except (OSError, ValueError) as error:
        raise StateError(f"{folder} is incomplete ({error})") from error
    return _attached(plain, load_file(folder / TENSORS))


def read_plain(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote but for its tensors, in whose places marks stand; not checked.

    Raises:
        StateError: If it is missing or cut short.
    """
    try:
        return dict(json.loads((folder / PLAIN).read_text()))
    except (OSError, ValueError) as error:
        raise StateError(f"{folder} is incomplete ({error})") from error


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Makes the disk, not only the system's memory, hold a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _detached(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value with every tensor moved to `tensors`, its key left in its place."""
    if isinstance(value, Tensor):
        # a copy of its own: safetensors refuses tensors that share memory
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {TENSOR: path}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and not MARKS & value.keys():
            return {key: _detached(item, f"{path}/{key}", tensors) for key, item in value.items()}
        return {PAIRS: [_detached([k, v], f"{path}/{k}", tensors) for k, v in value.items()]}
    if isinstance(value, tuple):
        return {TUPLE: _detached(list(value), path, tensors)}
    if isinstance(value, list):
        return [_detached(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    assert value is None or isinstance(value, (bool, int, float, str)), f"{type(value)} at {path}"
    return value


def _attached(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_attached(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {TENSOR}:
        return tensors[value[TENSOR]]
    if set(value) == {PAIRS}:
        return dict(_attached(value[PAIRS], tensors))
    if set(value) == {TUPLE}:
        return tuple(_attached(value[TUPLE], tensors))
    return {key: _attached(item, tensors) for key, item in value.items()}
