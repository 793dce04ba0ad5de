"""O-LoRA: its term by hand, and its two ways of keeping earlier updates active."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clpeft.strategies.olora import OLoRA, orthogonality
from clpeft.training.build import build_run
from clpeft.training.run import Run
from tests.running import Outcome, compose

Finished = Callable[..., Outcome]
Overrides = Callable[..., list[str]]


def test_orthogonality_by_hand() -> None:
    previous = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]])
    new = torch.tensor([[[3.0, -4.0]], [[2.0, 5.0]]])

    # module 1: |3| + |−8|; module 2: |7| + 0
    assert orthogonality(previous, new).item() == 18.0


def test_orthogonal_rows_cost_nothing() -> None:
    previous = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])

    assert orthogonality(previous, torch.tensor([[[0.0, 0.0, 5.0]]])).item() == 0.0


def test_orthogonality_pushes_on_the_new_rows() -> None:
    previous = torch.tensor([[[1.0, 2.0]]])
    new = torch.tensor([[[3.0, -1.0]]], requires_grad=True)
    orthogonality(previous, new).backward()

    # d|3 − 2|/d(a₁, a₂) = sign(1) · (1, 2)
    assert new.grad.tolist() == [[[1.0, 2.0]]]  # type: ignore[union-attr]


def test_term_moves_the_weights(finished: Finished) -> None:
    free = finished("olora", "strategies.olora.lambda1=0")
    bound = finished("olora")

    # the first task has nothing to be orthogonal to
    for name, value in free.state(1)["parameters"].items():
        assert torch.equal(value, bound.state(1)["parameters"][name])
    last = free.trainable, bound.trainable
    assert any(not torch.equal(last[0][name], last[1][name]) for name in last[0])


def after_task(outcome: Outcome, overrides: list[str], tasks: int, directory: Path) -> Run:
    """A fresh run brought to where a finished one was after so many tasks."""
    _, config = compose(overrides)
    run = build_run(config, directory)
    (strategy,) = run.strategies
    strategy.setup(run)
    if tasks > 1:
        strategy.load_state_dict(outcome.state(tasks - 1)["strategies"]["0"])
    task = run.stream.tasks[tasks - 1]
    run.begin(task)
    strategy.before_task(run, task)
    saved = outcome.state(tasks)["parameters"]
    with torch.no_grad():
        for name, parameter in run.trainable.items():
            parameter.copy_(saved[name])
    return run


@torch.no_grad()
def logits(model: Any, run: Run) -> Tensor:
    """What a model says to a task's first examples, without dropout."""
    model.eval()
    batch = run.loader(run.stream.tasks[0].test, shuffle=False).batch(0)
    found: Tensor = run.objective.forward(model, batch).logits
    return found


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_merged_and_unmerged_are_one_function(
    finished: Finished, tiny: Overrides, tmp_path: Path, model: str
) -> None:
    outcome = finished("olora", model=model)
    overrides = tiny("olora", model=model)
    merged = after_task(outcome, overrides, 3, tmp_path)
    beside = after_task(outcome, [*overrides, "strategies.olora.merge_previous=false"], 3, tmp_path)
    plain = after_task(outcome, overrides, 1, tmp_path)

    one, other = logits(merged.model, merged), logits(beside.model, beside)
    assert torch.equal(one, logits(outcome.run.model, merged))
    # x(W + sBA)ᵀ against xWᵀ + s(xAᵀ)Bᵀ in float32, through two layers
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    # and the earlier updates are no trifle
    assert (logits(plain.model, plain) - one).abs().max() > 0.02
    base = [n for n in dict(beside.model.named_parameters()) if "base_layer" in n]
    for name in base:
        assert torch.equal(beside.model.get_parameter(name), outcome.before[name])


@pytest.mark.parametrize("more", [(), ("peft.use_rslora=true",)], ids=["lora", "rslora"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_saved_adapter_is_the_whole_update_for_the_plain_base(
    finished: Finished,
    tiny: Overrides,
    bases: Callable[[str], Path],
    tmp_path: Path,
    model: str,
    more: tuple[str, ...],
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    outcome = finished("olora", *more, model=model)
    for tasks, folder in enumerate(sorted((outcome.directory / "adapters").iterdir()), 1):
        run = after_task(outcome, tiny("olora", *more, model=model), tasks, tmp_path)
        if model == "tiny_llama":
            base = AutoModelForCausalLM.from_pretrained(bases(model))
        else:
            base = AutoModelForSequenceClassification.from_pretrained(bases(model), num_labels=4)
        loaded = PeftModel.from_pretrained(base, folder)

        assert loaded.peft_config["default"].r == 8 * tasks
        # the sum of the updates in one product, against their sums into the weights
        torch.testing.assert_close(
            logits(loaded, run), logits(run.model, run), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_term_and_its_logged_size(
    finished: Finished, tiny: Overrides, tmp_path: Path, reduction: str
) -> None:
    outcome = finished("olora")
    more = (
        f"strategies.olora.reduction={reduction}",
        "strategies.olora.lambda1=0.25",
        "strategies.olora.lambda2=0.125",
    )
    run = after_task(outcome, tiny("olora", *more), 3, tmp_path)
    terms = run.strategies[0].loss_terms(run, None, None)  # type: ignore[arg-type]
    earlier = outcome.state(2)["strategies"]["0"]["previous_a"]

    overlap, entries, norms = 0.0, 0, 0.0
    for path, rows in earlier.items():
        layer: Any = run.model.get_submodule(path)
        a, b = layer.lora_A.default.weight.double(), layer.lora_B.default.weight.double()
        overlap += (rows.double() @ a.T).abs().sum().item()
        entries += rows.shape[0] * a.shape[0]
        norms += a.square().sum().sqrt().item() + b.square().sum().sqrt().item()
    expected = 0.25 * (overlap / entries if reduction == "mean" else overlap)
    # two layers, query and value, 16 earlier rows against 8 new ones
    assert entries == 4 * 16 * 8
    assert terms["orthogonality"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["olora_norm"].item() == pytest.approx(0.125 * norms, rel=1e-5)


def test_logged_update_norm(finished: Finished, tiny: Overrides, tmp_path: Path) -> None:
    run = after_task(finished("olora"), tiny("olora"), 2, tmp_path)
    run.logging = True
    logged = run.strategies[0].transform_gradients(run)
    layers = [m for n, m in run.model.named_modules() if n.endswith(("q_proj", "v_proj"))]
    # s = 16/8
    updates = [2.0 * m.lora_B.default.weight @ m.lora_A.default.weight for m in layers]  # type: ignore
    squares = sum(update.square().sum().item() for update in updates)

    assert len(layers) == 4
    assert float(logged["olora/update_norm"]) == pytest.approx(squares**0.5, rel=1e-5)
    run.logging = False
    assert run.strategies[0].transform_gradients(run) == {}


def test_first_task_has_no_term(finished: Finished, tiny: Overrides, tmp_path: Path) -> None:
    run = after_task(finished("olora"), tiny("olora"), 1, tmp_path)

    assert isinstance(run.strategies[0], OLoRA)
    assert run.strategies[0].loss_terms(run, None, None) == {}  # type: ignore[arg-type]
