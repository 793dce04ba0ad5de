"""Compiled forward passes: the same losses, names, strategies and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.machine import check_compiler
from clpeft.registry import STRATEGIES, Entry
from clpeft.strategies.base import Strategy, StrategyConfig
from clpeft.training import prepared
from tests.running import Outcome, compose_only, run_it, same_bits

COMPILED = "training.compile=true"
Overrides = Callable[..., list[str]]
Finished = Callable[..., Outcome]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compiles without writing new kernels: the same graph, and so the same bits; lists breaks."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(prepared, "BACKEND", "eager")
    return counters["graph_break"]


@pytest.fixture
def compiler() -> None:
    """What kernels are written with; CI installs it where it is missing."""
    try:
        check_compiler()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("compiler")
def test_kernels_of_its_own_give_the_same_losses(
    finished: Finished, tiny: Overrides, tmp_path: Path
) -> None:
    more = ("peft.dropout=0", "stream.num_tasks=2", "training.epochs=1")
    plain = finished("finetune", *more)
    overrides = tiny("finetune", *more, COMPILED)
    compiled = run_it(overrides, tmp_path / "whole")
    run_it(overrides, tmp_path / "run", interrupt_after=1)
    resumed = run_it(overrides, tmp_path / "run")

    found, expected = (
        [step["train/loss"] for step in outcome.logged_steps] for outcome in (compiled, plain)
    )
    # float32 sums in another order, which Adam's division by √v blows up over eight steps
    assert found == pytest.approx(expected, rel=1e-3)
    assert found != expected
    assert same_bits(resumed.after, compiled.after)
    assert resumed.results["matrix"] == compiled.results["matrix"]


# What runs passes of its own beside the loop's, with hooks on modules in them or in the loop's.
OTHER_PASSES = {
    "ewc": (),  # Fisher: hooks on every adapter
    "lwf": ("strategies.lwf.teacher=live",),  # other weights between forward and backward
    "agem": (),  # gradients of another batch
    "generative_replay": (),  # writing
    "olora": ("strategies.olora.merge_previous=false",),  # hooks that add earlier updates
    "derpp": (),  # parts of a batch, and readings
}


@pytest.mark.parametrize("name", OTHER_PASSES)
def test_strategies_do_the_same(
    finished: Finished, tiny: Overrides, tmp_path: Path, traced: dict[str, int], name: str
) -> None:
    more = ("stream.num_tasks=2", "training.epochs=1", *OTHER_PASSES[name])
    plain = finished(name, *more)
    compiled = run_it(tiny(name, *more, COMPILED), tmp_path / "run")

    assert not traced
    assert compiled.after.keys() == plain.after.keys()
    assert same_bits(compiled.after, plain.after)
    assert compiled.results["matrix"] == plain.results["matrix"]
    for one, other in zip(
        sorted((compiled.directory / "adapters").glob("*/*.safetensors")),
        sorted((plain.directory / "adapters").glob("*/*.safetensors")),
        strict=True,
    ):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        ("training.precision=bf16",),
        ("quantization=nf4",),
        ("training.gradient_checkpointing=true", "peft.dropout=0"),
        ("training.gradient_accumulation=2",),
    ],
    ids=lambda more: more[0].partition("=")[0].partition(".")[2] or "quantization",
)
def test_it_goes_with_the_other_switches(
    finished: Finished,
    tiny: Overrides,
    tmp_path: Path,
    traced: dict[str, int],
    more: tuple[str, ...],
) -> None:
    more = ("stream.num_tasks=2", "training.epochs=1", *more)
    compiled = run_it(tiny("finetune", *more, COMPILED), tmp_path / "run")

    assert not traced
    assert same_bits(compiled.after, finished("finetune", *more).after)


def test_many_tasks_stay_compiled(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: dict[str, int]
) -> None:
    """Accelerate's autocast is a new one for each task, which has it compiled anew."""
    passes: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*given: Tensor) -> Any:
            passes.append(True)
            return graph(*given)

        return run

    monkeypatch.setattr(prepared, "BACKEND", backend)
    more = ("stream.num_tasks=10", "training.max_steps=2", "training.precision=bf16")
    run_it(tiny("finetune", *more, COMPILED), tmp_path / "run")

    # PyTorch's own limit is 8
    assert len(passes) == 10 * 2


def test_strategy_that_replaces_the_forward_pass_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny: Overrides
) -> None:
    class Meta(Strategy):
        def compute_gradients(self, run: Any, batch: Any) -> Any:
            """Never called."""

    list(STRATEGIES)
    entries = STRATEGIES._entries | {"ewc": Entry("ewc", Meta, StrategyConfig)}
    composed = compose_only(tiny("ewc", COMPILED))
    monkeypatch.setattr(STRATEGIES, "_entries", entries)
    composed = composed.copy()
    composed.strategies = {"ewc": StrategyConfig()}

    with pytest.raises(ConfigError, match=r"compile=true compiles .* the strategy 'ewc' replaces"):
        settle(composed)
