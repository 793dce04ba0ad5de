"""Every strategy on a base in 4 bits, and runs on quantized bases from end to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.models.load import load_model
from clpeft.registry import STRATEGIES
from clpeft.training.run import Run
from tests.running import build_it, compose_only, run_it, same_bits
from tests.settings import STRATEGY_SETTINGS, models_of

NAMES = sorted(STRATEGY_SETTINGS)
KINDS = ("nf4", "int8", "torchao_int8")

Overrides = Callable[..., list[str]]


@pytest.fixture
def wide(tiny: Overrides, bases: Callable[[str], Path]) -> Overrides:
    """Overrides of a tiny run on a base that is wide enough for 4 bits."""

    def overrides(strategy: str, *more: str, model: str = "tiny_llama") -> list[str]:
        base = bases(model.replace("tiny", "wide"))
        return [*tiny(strategy, model=model), f"model.path={base}", *more]

    return overrides


def base_state(run: Run) -> dict[str, Tensor]:
    """The frozen part of a model, as it is stored: weights, scales and levels."""
    trained = set(run.changed)
    return {n: t.clone() for n, t in run.model.state_dict().items() if n not in trained}


@pytest.mark.parametrize("name", NAMES)
def test_strategy_on_a_base_in_four_bits(wide: Overrides, tmp_path: Path, name: str) -> None:
    model = models_of(name)[0]
    overrides = wide(name, "quantization=nf4", "stream.num_tasks=2", model=model)
    if not STRATEGIES[name].target.supports_quantized:
        with pytest.raises(ConfigError, match=f"'{name}' needs dense base weights"):
            settle(compose_only(overrides))
        return
    outcome = run_it(overrides, tmp_path / "run")

    assert all(math.isfinite(step["train/loss"]) for step in outcome.logged_steps)
    for row in outcome.results["matrix"][2:]:
        assert all(score * 16 in range(17) for score in row)  # 16 test examples
    if trace := STRATEGY_SETTINGS[name].trace:
        assert any(step.get(trace, 0.0) != 0.0 for step in outcome.steps(1))
    assert all(
        not torch.equal(value, outcome.before[parameter])
        for parameter, value in outcome.trainable.items()
    )
    # a second load quantizes to the same bits, and training has left them
    fresh = build_it(overrides, tmp_path)
    assert same_bits(base_state(outcome.run), base_state(fresh))


def test_merging_into_four_bits_is_refused_with_the_way_out(wide: Overrides) -> None:
    merging = "strategies.olora.merge_previous=true"
    with pytest.raises(ConfigError, match=r"set strategies\.olora\.merge_previous=null"):
        settle(compose_only(wide("olora", "quantization=nf4", merging, model="tiny_llama")))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_trains_has_gradients_and_optimizer_state(
    wide: Overrides, tmp_path: Path, kind: str
) -> None:
    more = (f"quantization={kind}", "stream.num_tasks=1", "training.checkpoint.every_steps=3")
    outcome = run_it(wide("finetune", *more, model="tiny_bert"), tmp_path / "run")
    run = outcome.run
    whole = {n for n in run.trainable if "lora" not in n}
    optimizer = outcome.read("step-3-task-0")["course"]["optimizer"]

    # the classifier and the pooler, which is new; query and value of two layers
    assert len(whole) == 4
    assert len(run.trainable) == 4 + 2 * 2 * 2
    moments = [state["exp_avg"] for state in optimizer["state"].values()]
    assert [m.shape for m in moments] == [p.shape for p in run.trainable.values()]
    assert {m.dtype for m in moments} == {torch.float32}
    assert {p.dtype for p in run.trainable.values()} == {torch.float32}
    assert not any(
        p.grad is not None for n, p in run.model.named_parameters() if n not in run.trainable
    )
    batch = run.loader(run.stream.tasks[0].train).batch(0)
    run.mean_loss(batch).backward()
    found = {n for n, p in run.model.named_parameters() if p.grad is not None}
    assert found == set(run.trainable)


# How far a step's loss may be from the one on a base that is not quantized. 4 bits leave 16 levels
# to each block of 64 weights, an error of a tenth of the weights' spread; 8 bits of a hundredth.
CLOSE = {"nf4": 0.1, "int8": 0.03, "torchao_int8": 0.03}


def test_loss_falls_as_on_a_base_that_is_not_quantized(wide: Overrides, tmp_path: Path) -> None:
    losses = {}
    for kind in ("none", *KINDS):
        more = ("stream.num_tasks=1", "stream.train_size=64", "optimizer.lr=5e-3")
        more += ("peft.target=all-linear", "peft.dropout=0", f"quantization={kind}")
        outcome = run_it(wide("finetune", *more), tmp_path / kind)
        losses[kind] = [step["train/loss"] for step in outcome.logged_steps]
        # an eighth of the size, or a quarter, and what the scales take; the rest is embeddings
        assert (
            outcome.results["cost"]["base_bytes"]
            == {
                "none": 482560,
                "nf4": 212408,
                "int8": 241408,
                "torchao_int8": 242560,
            }[kind]
        )

    assert len(losses["none"]) == 16
    assert losses["none"][-1] < losses["none"][0] / 2
    for kind in KINDS:
        assert losses[kind] == pytest.approx(losses["none"], rel=CLOSE[kind])
        assert losses[kind] != losses["none"]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_is_the_model_that_was_trained(
    wide: Overrides, tmp_path: Path, kind: str, model: str
) -> None:
    overrides = wide("finetune", f"quantization={kind}", "stream.num_tasks=1", model=model)
    outcome = run_it(overrides, tmp_path / "run")
    run, (folder,) = outcome.run, (outcome.directory / "adapters").iterdir()
    config = run.config
    base, _ = load_model(config.model, config.model.path, run.tokenizer, 4, config.quantization)
    loaded = PeftModel.from_pretrained(base, folder)
    batch = run.loader(run.stream.tasks[0].test, shuffle=False).batch(0)
    with torch.no_grad():
        found = loaded.eval()(**batch.inputs).logits
        expected = run.model.eval()(**batch.inputs).logits

    assert torch.equal(found, expected)
