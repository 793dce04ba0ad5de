"""AdaLoRA: its formulas on paper, beside PEFT's own allocator, and in runs of several tasks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file
from torch import Tensor

from clpeft.config import ConfigError
from clpeft.models.load import count_parameters
from clpeft.peft_methods.adalora import (
    AdaLoraSettings,
    RankAllocation,
    kept_entries,
    orthogonality,
    ranks_at,
    smooth,
    triplet_scores,
    with_new_ranks,
)
from clpeft.peft_methods.base import apply_peft
from clpeft.training.guard import Guard
from tests.peft_methods.models import llama, logits, moved, training
from tests.running import Outcome, build_it, killed_at, run_it, same_run

Overrides = Callable[..., list[str]]
Finished = Callable[..., Outcome]

# PEFT takes AdaLoRA's pattern, which names parameters, for LoRA's, which names modules
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")

TWO = "stream.num_tasks=2"
# of PEFT_SETTINGS: eight steps to a task, ranks are taken away from the first to the sixth
MODULES, INIT, TARGET = 4, 6, 3


def settings(**changes: Any) -> AdaLoraSettings:
    values = {
        "method": "adalora",
        "init_r": 4,
        "target_r": 2,
        "alpha": 8.0,
        "dropout": 0.0,
        "target": "auto",
        "tinit": 0.25,
        "tfinal": 0.25,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
    }
    return AdaLoraSettings(**(values | changes))


# On paper.


def test_orthogonality() -> None:
    # ‖diag(1, 4) − I‖ = 3, ‖I − I‖ = 0 and, of one row, ‖9 + 16 − 1‖ = 24
    matrices = [
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        torch.eye(2, 3),
        torch.tensor([[3.0, 4.0]]),
    ]
    assert float(orthogonality(matrices)) == (3 + 0 + 24) / 3


def test_orthogonality_has_a_gradient() -> None:
    p = torch.tensor([[2.0, 0.0]], requires_grad=True)
    orthogonality([p, torch.eye(1, 2)]).backward()
    # d|p₁² + p₂² − 1|/dp = 2p, halved by the mean; at 0 nothing is NaN
    assert p.grad is not None
    assert p.grad.tolist() == [[2.0, 0.0]]
    q = torch.eye(2, requires_grad=True)
    orthogonality([q]).backward()
    assert q.grad is not None
    assert q.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("step", "ranks"),
    [
        (1, 12),
        (2, 12),
        (3, 10),  # 6 + 6 · (7/8)³ = 10.02
        (6, 6),  # 6 + 6 · (1/2)³ = 6.75
        (9, 6),  # 6 + 6 · (1/8)³ = 6.01
        (10, 6),
        (11, 6),
    ],
)
def test_ranks_fall_along_a_cubic(step: int, ranks: int) -> None:
    assert ranks_at(step, warmup=2, end=10, first=12, last=6) == ranks


def test_importance_and_its_uncertainty() -> None:
    importance, uncertainty = [torch.zeros(2)], [torch.zeros(2)]
    weights = [torch.tensor([2.0, -1.0])]
    smooth(importance, uncertainty, weights, [torch.tensor([-1.0, 3.0])], 0.75, 0.5)
    # |w·g| = 2, 3; a quarter of that; half of how far 2, 3 are from 0.5, 0.75
    assert importance[0].tolist() == [0.5, 0.75]
    assert uncertainty[0].tolist() == [0.75, 1.125]
    smooth(importance, uncertainty, weights, [torch.tensor([0.25, 0.0])], 0.75, 0.5)
    # 0.5, 0: 0.75 · 0.5 + 0.25 · 0.5 and 0.75 · 0.75
    assert importance[0].tolist() == [0.5, 0.5625]
    assert uncertainty[0].tolist() == [0.375, 0.5625 + 0.5 * 0.5625]


def test_score_of_a_triplet() -> None:
    values = torch.tensor([[1.0], [2.0]])
    left = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    right = torch.tensor([[4.0, 0.0], [1.0, 2.0]])
    assert triplet_scores(values, left, right).tolist() == [1 + 2 + 2, 2 + 1 + 1.5]


def test_the_best_triplets_of_all_modules_are_kept() -> None:
    scores = [torch.tensor([5.0, 1.0]), torch.tensor([0.0, 2.0, 4.0])]
    assert [part.tolist() for part in kept_entries(scores, 3)] == [
        [True, False],
        [False, True, True],
    ]
    # as many as asked for where several are equal too
    equal = kept_entries([torch.zeros(2), torch.zeros(3)], 2)
    assert sum(int(part.sum()) for part in equal) == 2


# Beside PEFT's.


def begun(model: Any, config: AdaLoraSettings, steps: int) -> tuple[RankAllocation, Any]:
    """The companion of a model, and a run of so many steps, about to make its first."""
    run = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(scaler=None),
        steps_of_task=steps,
        step_of_task=0,
    )
    companion = RankAllocation(config)
    companion.setup(run)  # type: ignore[arg-type]
    companion.before_task(run, None)  # type: ignore[arg-type]
    return companion, run


def test_the_same_ranks_as_pefts_allocator_leaves() -> None:
    """PEFT's allocator on a copy, asked for the same ranks after every step of a task."""
    config, steps = settings(), 12
    model = apply_peft(llama(), config, "causal_lm", [])
    moved(model)
    other = copy.deepcopy(model)
    companion, run = begun(model, config, steps)
    described = other.peft_config["default"]
    described.tinit, described.tfinal, described.total_step = 3, 3, steps
    allocator = RankAllocator(other.base_model.model, described, "default")
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for step in range(1, steps + 1):
        run.step_of_task = step
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if mine.requires_grad:
                mine.grad = torch.randn(mine.shape, generator=generator)
                theirs.grad = mine.grad.clone()
        companion.transform_gradients(run)
        budget, masks = allocator.budget_schedule(step)
        if step <= 9:
            allocator.update_ipt(other.base_model.model)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if mine.requires_grad:
                mine.data -= 0.01 * mine.grad
                theirs.data -= 0.01 * theirs.grad
        companion.after_step(run)
        if masks and step <= 9:
            pattern = allocator.mask_to_budget(other.base_model.model, budget)
        elif step > 9:
            allocator.mask_using_rank_pattern(other.base_model.model, pattern)
        for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs), (step, name)
        seen.add(budget)
    assert len(seen) > 3
    assert {*seen} >= {16, 8}


def test_what_was_set_to_0_may_grow_again_until_the_choice_stands() -> None:
    config = settings(deltaT=2, tinit=0.0)
    model = apply_peft(llama(), config, "causal_lm", [])
    moved(model)
    companion, run = begun(model, config, 8)
    values = [p for name, p in model.named_parameters() if "lora_E" in name]

    zeros = []
    for step in range(1, 9):
        run.step_of_task = step
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
        companion.transform_gradients(run)
        with torch.no_grad():
            for value in values:
                value += 1.0  # the optimizer
        companion.after_step(run)
        zeros.append(sum(int((value == 0).sum()) for value in values))
    # 16 ranks to 8 by the sixth step; 8 + 8 · (4/6)³ = 10.4 after two, 8 + 8 · (2/6)³ = 8.3 after
    # four, and none is 0 where nothing was allocated
    assert zeros == [0, 6, 0, 8, 0, 8, 8, 8]


# The adapter.


def test_sizes() -> None:
    model = apply_peft(llama(), settings(), "causal_lm", [])

    # of rank 4, per layer: query 16 → 16, value 16 → 8, and an entry of Λ per rank
    assert count_parameters(model)[1] == 2 * 4 * ((16 + 16 + 1) + (16 + 8 + 1))
    assert {n.split(".")[-2] for n in training(model)} == {"lora_A", "lora_B", "lora_E"}


def test_function() -> None:
    """The logits of the base with α/r·P·Λ·Q added to its weights."""
    base = llama()
    plain = llama()
    plain.load_state_dict(base.state_dict())
    before = logits(plain)
    model = apply_peft(base, settings(), "causal_lm", [])
    assert torch.equal(logits(model), before)
    moved(model)
    for number, layer in enumerate(plain.model.layers):
        for name in ("q_proj", "v_proj"):
            found: Any = model.get_submodule(
                f"base_model.model.model.layers.{number}.self_attn.{name}"
            )
            a, b, e = (getattr(found, f"lora_{x}")["default"].detach() for x in "ABE")
            weight = getattr(layer.self_attn, name).weight
            weight.data += 8 / 4 * b @ torch.diag(e[:, 0]) @ a

    # float32, in another order; and PEFT divides by r + 1e-5
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_r": 4}, "peft.target_r=4 leaves nothing to take away from peft.init_r=4"),
        ({"tinit": 0.5, "tfinal": 0.5}, "must add up to less than 1"),
        ({"beta1": 0.0}, "peft.beta1=0.0 must be between 0 and 1"),
        ({"beta2": 1.0}, "peft.beta2=1.0 must be between 0 and 1"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings(**changes).check()
    settings().check()


# In runs.


def adapter(outcome: Outcome, task: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was saved of a task: config and tensors."""
    (folder,) = (outcome.directory / "adapters").glob(f"{task}_*")
    tensors = load_file(folder / "adapter_model.safetensors")
    return json.loads((folder / "adapter_config.json").read_text()), tensors


def test_every_task_takes_ranks_away_by_its_own_steps(finished: Finished) -> None:
    outcome = finished("finetune", TWO, peft="adalora")
    ranks = [[step["train/adalora/rank"] for step in outcome.steps(task)] for task in (0, 1)]

    # as each of eight steps finds them; up to the first all, from the sixth on the last, and
    # between them 12 + 12 · (4/6)³ = 15.6 after the second and 12 + 12 · (2/6)³ = 12.4 after the
    # fourth, of 24 in four modules
    assert ranks == [[6.0, 6.0, 15 / 4, 15 / 4, 3.0, 3.0, 3.0, 3.0]] * 2


def test_tasks_of_unequal_lengths(finished: Finished) -> None:
    outcome = finished("cumulative", TWO, peft="adalora")
    ranks = [[step["train/adalora/rank"] for step in outcome.steps(task)] for task in (0, 1)]

    assert ranks[0] == [6.0, 6.0, 15 / 4, 15 / 4, 3.0, 3.0, 3.0, 3.0]
    # of sixteen steps all ranks up to the first, and the last choice after the twelfth: of 24 there
    # are left 12 + 12 · (10/11)³ = 21.0, 12 + 12 · (8/11)³ = 16.6, 13.9 and 12.6
    assert ranks[1] == [6.0] * 2 + [21 / 4] * 2 + [16 / 4] * 2 + [13 / 4] * 2 + [12 / 4] * 8
    assert adapter(outcome, 2)[0]["total_step"] == 16


def test_term_is_in_the_loss_of_every_step(
    finished: Finished, tiny: Overrides, tmp_path: Path
) -> None:
    outcome = finished("finetune", TWO, peft="adalora")
    key = "train/loss/adalora_orthogonality"
    for task in (0, 1):
        for step in outcome.steps(task):
            assert step[key] > 0
            assert step["train/loss"] == step["train/loss/task"] + step[key]

    run = build_it(tiny("finetune", TWO, peft="adalora"), tmp_path)
    rows = [p for n, p in run.trainable.items() if "lora_A" in n]
    columns = [p.T for n, p in run.trainable.items() if "lora_B" in n]
    norms = []
    for matrix in (m.detach().double() for m in (*rows, *columns)):
        products = [[float(row @ other) for row in matrix] for other in matrix]
        off = [(p - (i == j)) ** 2 for i, row in enumerate(products) for j, p in enumerate(row)]
        norms.append(math.sqrt(sum(off)))
    # half of their mean, in double precision against float32
    assert outcome.steps(0)[0][key] == pytest.approx(0.1 * sum(norms) / len(norms), rel=1e-5)


def test_term_makes_rows_more_orthogonal(tiny: Overrides, tmp_path: Path) -> None:
    last = {}
    for weight in (0, 10):
        overrides = tiny(
            "finetune", "stream.num_tasks=1", f"peft.orth_reg_weight={weight}", peft="adalora"
        )
        run = run_it(overrides, tmp_path / str(weight)).run
        rows = [p.detach() for n, p in run.trainable.items() if "lora_A" in n]
        last[weight] = float(orthogonality(rows))
    assert last[10] < last[0] - 0.1


@pytest.mark.parametrize("task", [1, 2])
def test_saved_adapter_has_the_ranks_that_are_left(finished: Finished, task: int) -> None:
    outcome = finished("finetune", TWO, peft="adalora")
    config, tensors = adapter(outcome, task)
    pattern = config["rank_pattern"]

    assert len(pattern) == MODULES
    assert sum(map(sum, pattern.values())) == MODULES * TARGET
    for name, kept in pattern.items():
        assert len(kept) == INIT
        path = f"base_model.model.{name}".removesuffix(".lora_E")
        assert tensors[f"{path}.lora_E"].shape == (sum(kept), 1)
        assert tensors[f"{path}.lora_A"].shape[0] == sum(kept)
        assert tensors[f"{path}.lora_B"].shape[1] == sum(kept)
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (8, 0, 2)
    if task == 2:  # what is not saved is 0 in the model that was trained
        for name, kept in pattern.items():
            values = outcome.run.trainable[f"base_model.model.{name}.default"][:, 0]
            assert (values != 0).tolist() == kept


def test_the_second_task_begins_with_all_ranks(tiny: Overrides, tmp_path: Path) -> None:
    every = (TWO, "training.checkpoint.every_steps=1")
    outcome = run_it(tiny("finetune", *every, peft="adalora"), tmp_path)
    left = {}
    for step, tasks in ((8, 1), (9, 1)):
        parameters = outcome.read(f"step-{step}-task-{tasks}")["parameters"]
        values = [value for name, value in parameters.items() if "lora_E" in name]
        left[step] = sum(int(value.count_nonzero()) for value in values)
    state = outcome.read("step-9-task-1")["strategies"]["1"]

    # after the first task, and after the first step of the second
    assert left == {8: MODULES * TARGET, 9: MODULES * INIT}
    assert (state["kept"], state["ranks"]) == ([], MODULES * INIT)
    # after one step of a task the one is (1 − β₁)·|w·g| and the other (1 − β₂)·β₁·|w·g|
    for importance, uncertainty in zip(state["importance"], state["uncertainty"], strict=True):
        torch.testing.assert_close(uncertainty, 0.85 * importance)


def test_schedule_follows_the_real_number_of_steps(tiny: Overrides, tmp_path: Path) -> None:
    overrides = tiny(
        "finetune",
        "stream.num_tasks=1",
        "training.max_steps=20",
        "peft.deltaT=100",
        "peft.tfinal=0.45",
        peft="adalora",
    )
    outcome = run_it(overrides, tmp_path)

    # one choice only, after step 20 − 9
    ranks = [step["train/adalora/rank"] for step in outcome.steps(0)]
    assert ranks == [6.0] * 11 + [3.0] * 9
    config, _ = adapter(outcome, 1)
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (20, 2, 9)


def test_choice_is_made_although_its_step_is_left_out(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With training.on_nan=skip, of the last three of eight steps, the sixth and the eighth."""
    monkeypatch.setattr(
        Guard,
        "skips",
        lambda self, logs: self.run.step_of_task in (6, 8),  # type: ignore[misc]
    )
    more = ("stream.num_tasks=1", "training.on_nan=skip", "peft.tfinal=0")
    outcome = run_it(tiny("finetune", *more, peft="adalora"), tmp_path / "run")
    config, _ = adapter(outcome, 1)

    # without a final phase the choice is due after the eighth step, which is never made
    assert sum(map(sum, config["rank_pattern"].values())) == MODULES * TARGET
    for name, kept in config["rank_pattern"].items():
        values = outcome.run.trainable[f"base_model.model.{name}.default"][:, 0]
        assert (values != 0).tolist() == kept


def test_new_ranks_stand_behind_those_that_are_left() -> None:
    saved, new = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])

    assert with_new_ranks(saved, new, 0).tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert with_new_ranks(saved.T, new, 1).tolist() == [[1.0, 4.0], [2.0, 6.0]]
    assert with_new_ranks(saved[:0], new, 0).tolist() == new.tolist()  # none was left
    assert with_new_ranks(torch.ones(1, 3), new, 0).tolist() == [[1.0, 1.0, 1.0]]


def test_a_run_that_starts_from_an_adapter_has_all_its_ranks_again(
    finished: Finished, tiny: Overrides, tmp_path: Path
) -> None:
    first = finished("finetune", TWO, peft="adalora")
    folder = next((first.directory / "adapters").glob("2_*"))
    _, saved = adapter(first, 2)
    # how training goes may differ, and how much is left in the end
    more = ("peft.target_r=2", "peft.deltaT=1", "peft.tinit=0.2", "peft.orth_reg_weight=0.2")
    overrides = tiny("finetune", TWO, f"model.path={folder}", *more, peft="adalora")
    outcome = run_it(overrides, tmp_path / "run")

    began = {name: value for name, value in outcome.before.items() if ".lora_E." in name}
    assert len(began) == MODULES
    for name, values in began.items():
        kept = saved[name.removesuffix(".default")]
        assert torch.equal(values, torch.cat([kept, torch.zeros(INIT - len(kept), 1)]))
        # a new rank can learn only if its vectors are not 0 too
        assert outcome.before[name.replace("lora_E", "lora_A")].any(dim=1).all()
        assert outcome.before[name.replace("lora_E", "lora_B")].any(dim=0).all()
    assert outcome.steps(0)[0]["train/adalora/rank"] == INIT
    assert outcome.steps(0)[-1]["train/adalora/rank"] == 2
    written, _ = adapter(outcome, 1)
    assert sum(map(sum, written["rank_pattern"].values())) == MODULES * 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("peft.init_r=5", r"\(init_r is 6 there and 5 here\)"),
        ("peft.alpha=4", r"\(lora_alpha is 32(\.0)? there and 4(\.0)? here\)"),
    ],
)
def test_an_adapter_of_other_ranks_or_scale_is_refused(
    finished: Finished, tiny: Overrides, tmp_path: Path, override: str, told: str
) -> None:
    folder = next((finished("finetune", TWO, peft="adalora").directory / "adapters").glob("2_*"))

    with pytest.raises(ConfigError, match=told):
        build_it(tiny("finetune", f"model.path={folder}", override, peft="adalora"), tmp_path)


@pytest.mark.parametrize("boundary", [1, 2])
def test_stopped_after_a_task_it_ends_in_the_same_bits(
    finished: Finished, tiny: Overrides, tmp_path: Path, boundary: int
) -> None:
    run_it(tiny("finetune", TWO, peft="adalora"), tmp_path / "run", interrupt_after=boundary)
    resumed = run_it(tiny("finetune", TWO, peft="adalora"), tmp_path / "run")

    same_run(resumed, finished("finetune", TWO, peft="adalora"))


@pytest.mark.parametrize("step", [11, 14])
def test_killed_before_and_after_the_choice_it_ends_in_the_same_bits(
    finished: Finished, tiny: Overrides, tmp_path: Path, step: int
) -> None:
    """The sixth of the second task's eight steps is the one after which the choice stands."""
    every = (TWO, "training.checkpoint.every_steps=1")
    killed_at(tiny("finetune", *every, peft="adalora"), tmp_path / "run", step)
    resumed = run_it(tiny("finetune", *every, peft="adalora"), tmp_path / "run")
    whole = finished("finetune", *every, peft="adalora")

    same_run(resumed, whole)
    one, other = (outcome.read(f"step-{step + 1}-task-1") for outcome in (resumed, whole))
    for name in ("importance", "uncertainty", "kept"):
        found, expected = (state["strategies"]["1"][name] for state in (one, other))
        assert all(map(torch.equal, found, expected))
        assert len(found) == len(expected)


def test_state_is_that_of_the_middle_of_a_task(tiny: Overrides, tmp_path: Path) -> None:
    every = ("stream.num_tasks=1", "training.checkpoint.every_steps=1")
    outcome = run_it(tiny("finetune", *every, peft="adalora"), tmp_path / "run")
    early, middle, settled = (
        outcome.read(f"step-{step}-task-0")["strategies"]["1"] for step in (1, 4, 7)
    )

    assert (early["kept"], early["ranks"], early["settled"]) == ([], 24, False)
    assert (middle["ranks"], middle["settled"], middle["steps"]) == (12, False, 8)
    assert len(middle["importance"]) == len(middle["uncertainty"]) == 3 * MODULES
    assert all(float(tensor.abs().max()) > 0 for tensor in middle["importance"])
    assert sum(int(kept.sum()) for kept in settled["kept"]) == MODULES * TARGET
    assert (settled["importance"], settled["settled"]) == ([], True)
