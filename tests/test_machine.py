"""What a run needs of its machine, told in one sentence before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clpeft import machine
from clpeft.config import ConfigError
from clpeft.launching import launch
from clpeft.machine import check_machine
from tests.running import compose, compose_only, run_it

QLORA = (
    "quantization=nf4",
    "peft=lora",
    "peft.target=all-linear",
    "training.gradient_checkpointing=true",
)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        check_machine(compose(overrides)[1])
    return str(error.value)


@pytest.mark.parametrize(
    ("switch", "package"),
    [
        ("quantization=nf4", "bitsandbytes"),
        ("quantization=int8", "bitsandbytes"),
        ("quantization=torchao_int8", "torchao"),
        ("optimizer=adamw_8bit", "bitsandbytes"),
    ],
)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, switch: str, package: str) -> None:
    missing = {package}
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name in missing else machine)

    assert refusal(switch) == (
        f"{switch} needs the package {package}, which is not installed: "
        f"pip install 'clpeft[quantization]'."
    )
    missing = {"bitsandbytes", "torchao"} - {package}
    check_machine(compose([switch])[1])


@pytest.mark.parametrize(
    ("switch", "way_out"),
    [
        ("optimizer=paged_adamw_8bit", "use optimizer=adamw_8bit"),
        ("training.precision=fp16", "use bf16 or no"),
    ],
)
def test_missing_gpu(monkeypatch: pytest.MonkeyPatch, switch: str, way_out: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = refusal(switch)

    assert told.startswith(switch)
    assert told.endswith(f"{way_out}.")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_machine(compose([switch])[1])


@pytest.mark.parametrize(("gpu", "variable"), [(False, "CXX"), (True, "CC")])
def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, gpu: bool, variable: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv(variable, "a-compiler")
    told = refusal("training.compile=true")
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: "/no/such/folder")

    assert told.startswith(
        "training.compile=true needs a compiler, and there is no a-compiler here"
    )
    assert f"name it in {variable}" in told
    assert "there is no Python.h here" in refusal("training.compile=true")


def test_machine_of_a_large_model_is_asked_for_when_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    large = ["model=llama3_1_8b", *QLORA, "optimizer=paged_adamw_8bit"]
    _, config = compose(large)  # as --cfg job does

    assert config.model.hub_id == "meta-llama/Llama-3.1-8B"
    assert config.quantization.double_quantization
    with pytest.raises(ConfigError, match=r"optimizer=paged_adamw_8bit moves .* there is no GPU"):
        launch(compose_only(large), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_same_switches_run_on_a_small_model(
    tiny: Callable[..., list[str]], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    wide = f"model.path={bases('wide_llama')}"
    overrides = tiny("finetune", wide, *QLORA, "optimizer=adamw_8bit", "stream.num_tasks=2")
    outcome = run_it([*overrides, "peft.dropout=0"], tmp_path / "run")
    losses = [step["train/loss"] for step in outcome.logged_steps]

    assert outcome.run.model.is_gradient_checkpointing
    assert losses[-1] < 0.75 * losses[0]
    # seven matrices in each of two layers, two factors of rank 8 for each
    assert len(outcome.trainable) == 2 * 2 * 7
