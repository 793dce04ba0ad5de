"""What a run needs of the machine that it is to run on, looked at before a model is loaded."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from clpeft.config import Config, ConfigError


def check_machine(config: Config) -> None:
    """Checks what composing a run does not need: packages, a GPU, a compiler.

    Raises:
        ConfigError: If something is missing.
    """
    from clpeft.models.quantize import QUANTIZATIONS
    from clpeft.training.optim import EIGHT_BIT

    name, method = config.optimizer.name, config.quantization.method
    if method != "none":
        _check_package(QUANTIZATIONS[method].package, f"quantization={method}")
    if name in EIGHT_BIT:
        _check_package("bitsandbytes", f"optimizer={name}")
    if name == "paged_adamw_8bit" and not _has_gpu():
        raise ConfigError(
            "optimizer=paged_adamw_8bit moves what a GPU has no room for to the host's memory, and "
            "there is no GPU here; use optimizer=adamw_8bit."
        )
    if config.training.precision == "fp16" and not _has_gpu():
        raise ConfigError(
            "training.precision=fp16 needs a GPU and there is none here; use bf16 or no."
        )
    if config.training.compile:
        check_compiler()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_package(package: str, switch: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"{switch} needs the package {package}, which is not installed: "
            f"pip install 'clpeft[quantization]'."
        )


def check_compiler() -> None:
    """Checks that there is what torch.compile calls: C++ for a CPU, C for what Triton writes.

    Raises:
        ConfigError: If the compiler or Python's headers are missing.
    """
    variable, usual = ("CC", "gcc") if _has_gpu() else ("CXX", "g++")
    compiler = os.environ.get(variable, usual)
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"training.compile=true needs a compiler, and there is no {compiler} here; install one "
            f"(Debian: apt-get install g++), name it in {variable}, or set training.compile=false."
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise ConfigError(
            "training.compile=true needs Python's headers, and there is no Python.h here; install "
            "them (Debian: apt-get install python3-dev) or set training.compile=false."
        )
