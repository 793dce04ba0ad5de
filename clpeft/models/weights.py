"""Digests of weights: what two models share only if they are equal, bit by bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from clpeft.config import ModelConfig
from clpeft.models.adapted import adapter_settings, whole_source
from clpeft.models.own import OwnModelConfig

# in the order in which transformers looks for them, and PEFT
WHOLE = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
DIGITS = 16


def base_digest(config: ModelConfig, model: nn.Module, source: str, cache_dir: Path) -> str:
    """What tells base models apart in results: weights and config.json, wherever they lie.

    A base that is generated is known by the fingerprint of its recipe, because another machine's
    warm-up may differ in the last bits; any other by what its files hold.

    Args:
        config: The model's settings.
        model: The base model, not adapted yet.
        source: The folder or the Hub's name; an adapter counts beside the base that it stands on.
        cache_dir: Digests of files are kept below it.
    """
    if config.path is None and config.architecture is not None:
        return Path(source).name
    files: list[Path] = []
    if adapter_settings(source) is not None:
        files += _weights_files(source, ADAPTER, None)
    known = ""
    if isinstance(config, OwnModelConfig):  # whose weights come from wherever its function says
        known = weights_digest(dict([*model.named_parameters(), *model.named_buffers()]))
    elif whole := [*_weights_files(whole_source(source), WHOLE, config.revision)]:
        files = whole + files
        known = _settings_digest(whole_source(source), config.revision)
    else:  # in a format of its own
        known = f"{source}@{config.revision}"
    known += "".join(_file_digest(path, cache_dir / "digests") for path in files)
    return hashlib.sha256(known.encode()).hexdigest()[:DIGITS]


def files_digest(source: str, revision: str | None = None, kept: Path | None = None) -> str:
    """What two bases share only if their weights' files and config.json are equal.

    Args:
        source: A folder or a name on the Hub.
        revision: Of the latter.
        kept: Where digests of files are kept; None reads them in any case.

    Returns:
        64 hexadecimal digits.
    """
    files = _weights_files(source, WHOLE, revision)
    digests = [_file_digest(path, kept) if kept else _read_digest(path) for path in files]
    known = _settings_digest(source, revision) + "".join(digests)
    return hashlib.sha256(known.encode()).hexdigest()


def weights_digest(parameters: Mapping[str, Tensor]) -> str:
    """What two sets of named weights share only if they are equal, bit by bit.

    Args:
        parameters: Name to parameter, of any type and shape.

    Returns:
        64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for name, parameter in parameters.items():
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        # one at a time: all of a large model need not fit in the host's memory twice
        content = parameter.detach().cpu().reshape(-1).view(torch.uint8)
        found.update(content.numpy().data)
    return found.hexdigest()


def _settings_digest(source: str, revision: str | None) -> str:
    """Of the config.json: the same weights answer otherwise with another epsilon of a norm, say."""
    file = _local(source, "config.json", revision)
    if file is None:
        return ""
    settings = json.loads(file.read_text())
    for told in ("transformers_version", "_name_or_path"):  # of where it comes from alone
        settings.pop(told, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _weights_files(source: str, names: tuple[str, ...], revision: str | None) -> Iterator[Path]:
    """The files of the first format that is there: one, or the parts that its index names."""
    for name in names:
        if whole := _local(source, name, revision):
            yield whole
            return
        if index := _local(source, f"{name}.index.json", revision):
            for part in sorted({*json.loads(index.read_text())["weight_map"].values()}):
                yield index.with_name(part)
            return


def _local(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a model that was loaded: in its folder, or in the Hub's cache."""
    from transformers.utils import cached_file

    found = cached_file(
        source,
        name,
        revision=revision or "main",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
    )
    return Path(found) if found else None


def _read_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_digest(path: Path, kept: Path) -> str:
    """The digest of a file's content, which is read once as long as the file is not touched."""
    path = path.resolve()
    if path.parent.name == "blobs" and len(path.name) == 64:
        return path.name  # in the Hub's cache, which calls large files by this very digest
    known = path.stat()
    key = hashlib.sha256(f"{path} {known.st_size} {known.st_mtime_ns}".encode()).hexdigest()
    record = kept / key
    if record.is_file():
        return record.read_text()
    digest = _read_digest(path)
    kept.mkdir(parents=True, exist_ok=True)
    aside = kept / f".{key}-{os.getpid()}"  # never half written, whoever else writes it
    aside.write_text(digest)
    aside.rename(record)
    return digest
