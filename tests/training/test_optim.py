"""Optimizers and schedules, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from clpeft.config import OptimizerConfig, SchedulerConfig
from clpeft.training.optim import learning_rate_factor, make_optimizer, make_schedule
from clpeft.training.state import read_state, write_state

# ten steps, of which round(.2 · 10) = 2 rise: 1/2, 2/2; then eight steps at progress k/8
COURSES = {
    "constant": [0.5] + [1.0] * 9,
    "linear": [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [0.5, 1.0, *(0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8))],
}


@pytest.mark.parametrize("name", COURSES)
def test_course_of_the_learning_rate(name: str) -> None:
    factor = learning_rate_factor(SchedulerConfig(name=name, warmup_ratio=0.2), 10)

    assert [factor(step) for step in range(10)] == pytest.approx(COURSES[name], abs=1e-15)
    # what is left once the task is over
    assert factor(10) == pytest.approx(1.0 if name == "constant" else 0.0, abs=1e-15)
    assert factor(11) == pytest.approx(1.0 if name == "constant" else 0.0, abs=1e-15)


@pytest.mark.parametrize("name", COURSES)
def test_without_warm_up_the_first_step_has_the_whole_rate(name: str) -> None:
    assert learning_rate_factor(SchedulerConfig(name=name), 4)(0) == 1.0


def test_schedule_sets_the_optimizers_rate() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer(OptimizerConfig(name="sgd", lr=0.8), [weight])
    schedule = make_schedule(SchedulerConfig(name="linear"), optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()

    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


def stepped(config: OptimizerConfig, gradients: list[float], start: float = 2.0) -> float:
    """Where a weight ends after steps with these gradients, in float64."""
    weight = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = make_optimizer(config, [weight])
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    return weight.item()


def test_sgd_with_momentum_and_decay() -> None:
    config = OptimizerConfig(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.1)
    # g = 1 + .1·2 = 1.2, v = 1.2, w = 2 − .12 = 1.88
    # g = 3 + .188 = 3.188, v = .6 + 3.188 = 3.788, w = 1.88 − .3788
    assert stepped(config, [1.0, 3.0]) == pytest.approx(1.5012, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # decay apart from the gradient: 2 − .1·.1·2 = 1.98, then −.1 · g/|g|
        ("adamw", 1.98 - 0.1),
        # decay inside the gradient, which the division by its size takes away: 2 − .1
        ("adam", 2.0 - 0.1),
    ],
)
def test_decay_of_adam_and_adamw(name: str, expected: float) -> None:
    config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.1, eps=0.0)
    # at the first step m/(1−β1) = g and v/(1−β2) = g²
    assert stepped(config, [3.0]) == pytest.approx(expected, abs=1e-12)


def test_moments_in_eight_bits_stay_close_to_those_in_32() -> None:
    """Two hundred steps down a valley with noise, from the same start."""
    ends = {}
    for name in ("adamw", "adamw_8bit"):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(8192, generator=generator))
        config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.1)
        optimizer = make_optimizer(config, [weight])
        for _ in range(200):
            weight.grad = weight.detach() + 0.1 * torch.randn(8192, generator=generator)
            optimizer.step()
        ends[name] = weight.detach()
    start = torch.randn(8192, generator=torch.Generator().manual_seed(0))
    way = (ends["adamw"] - start).norm()

    # a moment has 256 levels for six orders of magnitude: errors of some percent, of either sign
    assert 0 < (ends["adamw"] - ends["adamw_8bit"]).norm() < 0.05 * way


def test_few_numbers_keep_moments_in_32_bits() -> None:
    config = OptimizerConfig(name="adamw_8bit", lr=0.1, weight_decay=0.1, eps=0.0)
    # as AdamW above, up to float32: 2 − .1·.1·2 = 1.98, then −.1 · g/|g|
    assert stepped(config, [3.0]) == pytest.approx(1.98 - 0.1, abs=1e-6)


def test_state_in_eight_bits_goes_on_from_disk(tmp_path: Path) -> None:
    def made(values: torch.Tensor) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        weight = torch.nn.Parameter(values.clone())
        config = OptimizerConfig(name="adamw_8bit", lr=0.01, weight_decay=0.1)
        return weight, make_optimizer(config, [weight])

    def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
        weight.grad = torch.randn(8192, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    weight, optimizer = made(torch.linspace(-1, 1, 8192))
    for seed in range(3):
        step(weight, optimizer, seed)
    write_state(tmp_path / "state", {"optimizer": optimizer.state_dict()})
    other, again = made(weight.detach())
    again.load_state_dict(read_state(tmp_path / "state")["optimizer"])
    for seed in range(3, 6):
        step(weight, optimizer, seed)
        step(other, again, seed)

    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    assert torch.equal(weight, other)


def test_betas_and_eps_are_handed_on() -> None:
    config = OptimizerConfig(name="adamw", lr=1.0, betas=[0.5, 0.5], eps=1.0)
    # g = 1, then 3: m = .5·.5 + .5·3 = 1.75, v = .5·.5 + .5·9 = 4.75; both over 1 − .25
    first = 2.0 - 1 / (1 + 1)
    second = first - (1.75 / 0.75) / (math.sqrt(4.75 / 0.75) + 1)
    assert stepped(config, [1.0, 3.0]) == pytest.approx(second, abs=1e-12)
