"""Online EWC, L2 and what they share, against values worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clpeft.strategies.anchors import Anchors, mean_one, quadratic_gradient, quadratic_penalty
from clpeft.strategies.ewc import OnlineEWC, OnlineEWCConfig
from clpeft.strategies.l2 import L2, L2Config
from clpeft.training.state import read_state, write_state


def fake_run(*values: float) -> Any:
    weight = torch.nn.Parameter(torch.tensor(values))
    run = SimpleNamespace(
        trainable={"weight": weight},
        logging=True,
        generator_for=lambda owner: torch.Generator(),
    )
    run.filled_gradients = lambda: [weight.grad]
    return run


def put(run: Any, *values: float) -> None:
    with torch.no_grad():
        run.trainable["weight"].copy_(torch.tensor(values))
    run.trainable["weight"].grad = torch.zeros(len(values))


def test_replaced_anchor_forgets_the_earlier_ones() -> None:
    anchors = Anchors.none([torch.zeros(2)])
    anchors.add([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
    anchors.add([torch.tensor([0.0, 5.0])], [torch.tensor([1.0, 1.0])])
    anchors.replace([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 4.0])])

    # 3/2 · (2 · (3 − 1)² + 4 · (0 − 1)²) and 3 · (2 · 2, 4 · −1)
    theta = [torch.tensor([3.0, 0.0])]
    assert quadratic_penalty(theta, anchors, 3.0).item() == 18.0
    assert quadratic_gradient(theta, anchors, 3.0)[0].tolist() == [12.0, -12.0]


def test_importance_of_mean_one() -> None:
    # 1 + 2 + 3 + 10 over 4 numbers: 4
    scaled = mean_one([torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 10.0]])])
    assert [t.flatten().tolist() for t in scaled] == [[0.25, 0.5], [0.75, 2.5]]
    assert mean_one([torch.zeros(3)])[0].tolist() == [0.0, 0.0, 0.0]


def test_online_ewc_fades_importance_and_moves_its_anchor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importances = iter([[4.0, 0.0], [1.0, 2.0]])
    monkeypatch.setattr(
        "clpeft.strategies.ewc.fisher_diagonal",
        lambda *_, **__: [torch.tensor(next(importances))],
    )
    config = OnlineEWCConfig(
        lambda_=2.0, fisher="empirical", fisher_examples=1, normalize="none", gamma=0.5
    )
    run, strategy = fake_run(0.0, 0.0), OnlineEWC(config)
    strategy.setup(run)
    assert strategy.transform_gradients(run) == {}
    for values in ((1.0, 1.0), (2.0, 3.0)):
        put(run, *values)
        strategy.after_task(run, SimpleNamespace(train=None))  # type: ignore[arg-type]

    # F = ½ · (4, 0) + (1, 2) = (3, 2) around (2, 3); at (1, 1): 2 · (3 · −1, 2 · −2)
    put(run, 1.0, 1.0)
    logged = strategy.transform_gradients(run)
    assert run.trainable["weight"].grad.tolist() == [-6.0, -8.0]
    # 3 · 1 + 2 · 4
    assert float(logged["loss/online_ewc"]) == 11.0
    # two numbers per weight, whatever the number of tasks
    assert strategy.state_dict()["pull"] == []


def test_l2_holds_every_weight_alike_at_the_latest() -> None:
    run, strategy = fake_run(0.0, 0.0), L2(L2Config(lambda_=0.5))
    strategy.setup(run)
    for values in ((5.0, 5.0), (1.0, -1.0)):
        put(run, *values)
        strategy.after_task(run, SimpleNamespace())  # type: ignore[arg-type]

    put(run, 3.0, -1.0)
    logged = strategy.transform_gradients(run)
    assert run.trainable["weight"].grad.tolist() == [1.0, 0.0]
    assert float(logged["loss/l2"]) == 1.0


@pytest.mark.parametrize("tasks", [1, 3])
def test_anchors_go_through_the_disk(tmp_path: Any, tasks: int) -> None:
    run, strategy = fake_run(0.0, 0.0), L2(L2Config(lambda_=1.0))
    strategy.setup(run)
    for task in range(tasks):
        put(run, 1.0 + task, 2.0)
        strategy._anchors.add(list(run.trainable.values()), [torch.tensor([1.0, 3.0])])
        strategy._tasks += 1
    write_state(tmp_path / "state", strategy.state_dict())
    other = L2(L2Config(lambda_=1.0))
    other.setup(run)
    other.load_state_dict(read_state(tmp_path / "state"))

    put(run, 0.5, 0.25)
    first, second = (s.transform_gradients(run)["loss/l2"] for s in (strategy, other))
    assert float(first) == float(second) > 0
