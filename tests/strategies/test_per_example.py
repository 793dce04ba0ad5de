"""Gradients of single examples from batches, against a loop over the examples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clpeft.strategies.fisher import fisher_diagonal
from clpeft.strategies.per_example import CHUNK_NUMBERS, PerExample
from clpeft.training.build import build_run
from clpeft.training.run import Run
from tests.running import compose

Overrides = Callable[..., list[str]]


@pytest.fixture
def run_of(tiny: Overrides, tmp_path: Path) -> Callable[..., Run]:
    """A run before its first step, its adapter moved off its start, where B is 0."""

    def make(model: str, peft: str, *more: str) -> Run:
        overrides = [*tiny("finetune", model=model, peft=peft), *more]
        _, config = compose([*overrides, "peft.target=all-linear"] if peft == "lora" else overrides)
        run = build_run(config, tmp_path)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in run.trainable.values():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        run.begin(run.stream.tasks[0])
        return run

    return make


def looped(run: Run, dataset: Any, kind: str) -> list[Tensor]:
    """Σ over examples of squared gradients, one backward pass each, as a textbook has it."""
    total = [torch.zeros_like(p) for p in run.trainable.values()]
    parameters = list(run.trainable.values())
    run.model.eval()
    for batch in run.loader(dataset, shuffle=False):
        for row in range(len(batch)):
            width = int(batch.inputs["attention_mask"][row].sum())
            one = type(batch)(
                {name: x[row : row + 1, :width] for name, x in batch.inputs.items()},
                batch.labels[row : row + 1, :width]
                if run.config.model.task_type == "causal_lm"
                else batch.labels[row : row + 1],
                batch.task_ids[row : row + 1],
                batch.example_ids[row : row + 1],
            )
            outputs = run.objective.forward(run.model, one)
            if kind == "empirical":
                terms = [(1.0, run.objective.total(outputs, one))]
            else:
                scores = torch.log_softmax(run.objective.predicted(outputs, one)[0], dim=-1)[0]
                terms = [(float(s.detach().exp()), s) for s in scores if s > -torch.inf]
            for weight, term in terms:
                found = torch.autograd.grad(term, parameters, allow_unused=True, retain_graph=True)
                for sum_, gradient in zip(total, found, strict=True):
                    if gradient is not None:
                        sum_ += weight * gradient**2
    return [t / len(dataset) for t in total]


@pytest.mark.parametrize("peft", ["lora", "full", "bottleneck"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert", "tiny_t5"])
def test_batches_give_what_a_loop_over_examples_gives(
    run_of: Callable[..., Run], model: str, peft: str
) -> None:
    run = run_of(model, peft)
    dataset = run.stream.tasks[0].train.select(range(12))
    kinds = ["empirical", "exact"] if model == "tiny_bert" else ["empirical"]
    for kind in kinds:
        found = fisher_diagonal(
            run, dataset, kind=kind, examples=12, generator=torch.Generator().manual_seed(0)
        )
        for name, one, other in zip(run.trainable, found, looped(run, dataset, kind), strict=True):
            # sums in another order; the padding of batches adds exact zeros
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-9, msg=name)
            if "pooler" not in name:
                assert other.count_nonzero() > 0, name


# Sums in another order; with bfloat16 a number that lies between two of its 256 steps may go to
# either, and so may inputs in 8 bits, which are rounded too.
@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [
        (("nf4", "quantization.compute_dtype=float32"), 1e-3),
        (("nf4",), 5e-3),
        (("int8",), 0.05),
        (("torchao_int8",), 1e-3),
    ],
    ids=["nf4", "nf4, bfloat16", "int8", "torchao_int8"],
)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_batches_give_the_same_on_a_quantized_base(
    run_of: Callable[..., Run],
    bases: Callable[[str], Path],
    model: str,
    quantization: tuple[str, ...],
    tolerance: float,
) -> None:
    wide = f"model.path={bases(model.replace('tiny', 'wide'))}"
    kind, *more = quantization
    run = run_of(model, "lora", wide, f"quantization={kind}", *more)
    dataset = run.stream.tasks[0].train.select(range(12))
    found = fisher_diagonal(
        run, dataset, kind="empirical", examples=12, generator=torch.Generator().manual_seed(0)
    )

    for name, one, other in zip(
        run.trainable, found, looped(run, dataset, "empirical"), strict=True
    ):
        assert other.count_nonzero() > 0, name
        assert (one - other).norm() <= tolerance * other.norm(), name


def test_linear_layers_and_norms_need_no_batches_of_one(run_of: Callable[..., Run]) -> None:
    for model in ("tiny_llama", "tiny_bert", "tiny_t5"):
        for peft in ("lora", "bottleneck"):
            run = run_of(model, peft)
            assert PerExample(run.model, run.trainable).single == []
    # tables of distances are read once for a whole batch
    for model, tables in (
        ("tiny_llama", []),
        ("tiny_bert", []),
        ("tiny_t5", ["relative_attention_bias"] * 2),
    ):
        run = run_of(model, "full")
        single = PerExample(run.model, run.trainable).single
        assert [name.split(".")[-2] for name in single] == tables


def test_positions_need_no_batches_of_one_either(
    run_of: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of("tiny_bert", "full")
    generator = torch.Generator().manual_seed(0)
    examples = run.stream.tasks[0].train
    with caplog.at_level(logging.INFO, logger="clpeft"):
        fisher_diagonal(run, examples, kind="empirical", examples=4, generator=generator)
    assert "batches of one" not in caplog.text


def test_what_is_drawn_does_not_hang_on_batches(run_of: Callable[..., Run]) -> None:
    run = run_of("tiny_llama", "lora")
    dataset = run.stream.tasks[0].train.select(range(12))
    found = []
    for size in (1, 5, 12):
        run.config.training.batch_size = size
        generator = torch.Generator().manual_seed(3)
        found.append(
            fisher_diagonal(run, dataset, kind="sampled", examples=12, generator=generator)
        )
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-9)


class Odd(nn.Module):
    """A scale of its own between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.last = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.scale).squeeze(-1)


def test_unknown_modules_are_named_and_found_one_by_one() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(5, 3)
    trainable = dict(model.named_parameters())
    squares = {name: torch.zeros_like(p) for name, p in trainable.items()}
    with PerExample(model, trainable) as recorded:
        recorded.add(torch.square, model(x), torch.ones(5), squares)
        assert recorded.single == ["scale"]
        for row in range(5):
            recorded.expect(1)
            recorded.add_single(torch.square, model(x[row : row + 1]), torch.ones(1), squares)

    for name, parameter in trainable.items():
        expected = sum(
            torch.autograd.grad(model(x[row : row + 1]).sum(), parameter)[0] ** 2
            for row in range(5)
        )
        torch.testing.assert_close(squares[name], expected)


class Attending(nn.Module):
    """PyTorch's own attention, which reads the weights of its last layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(dim=1)).squeeze(-1)


def test_weights_that_are_used_without_their_module_are_found_one_by_one() -> None:
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(5, 3, 4)
    trainable = dict(model.named_parameters())
    squares = {name: torch.zeros_like(p) for name, p in trainable.items()}
    with PerExample(model, trainable) as recorded:
        recorded.add(torch.square, model(x), torch.ones(5), squares)
        for row in range(5):
            recorded.expect(1)
            recorded.add_single(torch.square, model(x[row : row + 1]), torch.ones(1), squares)

    assert not {"last.weight", "last.bias"} & {*recorded.single}
    for name, parameter in trainable.items():
        expected = sum(
            torch.autograd.grad(model(x[row : row + 1]).sum(), parameter)[0] ** 2
            for row in range(5)
        )
        assert expected.any()
        torch.testing.assert_close(squares[name], expected)


class Table(nn.Module):
    """A table that is looked up once for all examples, under a name that says nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.words(torch.tensor([[1]]))[0]).sum(dim=-1)


def test_module_that_does_not_keep_examples_apart_is_found_out() -> None:
    torch.manual_seed(0)
    model, x = Table(), torch.randn(5, 2)
    trainable = dict(model.named_parameters())
    squares = {name: torch.zeros_like(p) for name, p in trainable.items()}
    with PerExample(model, trainable) as recorded:
        assert recorded.single == []
        recorded.add(torch.square, model(x), torch.ones(5), squares)
        assert recorded.single == ["words.weight"]
        assert squares["words.weight"].count_nonzero() == 0
        for row in range(5):
            recorded.expect(1)
            recorded.add_single(torch.square, model(x[row : row + 1]), torch.ones(1), squares)

    # row 1 is read; its slope for an example is the example
    assert torch.allclose(squares["words.weight"][1], (x**2).sum(dim=0))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, weights = Odd(), torch.randn(5, 3), torch.rand(5)
    trainable = dict(model.named_parameters())
    sums = []
    for numbers in (2**25, 25, 1):
        monkeypatch.setitem(CHUNK_NUMBERS, "cpu", numbers)
        squares = {name: torch.zeros_like(p) for name, p in trainable.items()}
        with PerExample(model, trainable) as recorded:
            recorded.add(torch.square, model(x), weights, squares)
        sums.append(squares)
    for name in trainable:
        torch.testing.assert_close(sums[1][name], sums[0][name])
        torch.testing.assert_close(sums[2][name], sums[0][name])


def test_single_parameters_are_told(
    run_of: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of("tiny_t5", "full")
    with caplog.at_level(logging.INFO, logger="clpeft"):
        fisher_diagonal(
            run,
            run.stream.tasks[0].train,
            kind="empirical",
            examples=2,
            generator=torch.Generator().manual_seed(0),
        )
    assert "batches of one are needed for " in caplog.text
    assert "relative_attention_bias" in caplog.text


def test_process_without_examples_has_nothing_to_add(run_of: Callable[..., Run]) -> None:
    """Two examples make one batch, which is the first process's; T5 needs batches of one too."""
    run = run_of("tiny_t5", "full")
    other = SimpleNamespace(
        **{name: getattr(run, name) for name in ("model", "trainable", "config", "batch")},
        eval_mode=run.eval_mode,
        objective=run.objective,
        accelerator=run.accelerator,
        rank=1,
        world_size=2,
        sum_gradients=lambda tensors: tensors,
    )
    found = fisher_diagonal(
        other,  # type: ignore[arg-type]
        run.stream.tasks[0].train,
        kind="empirical",
        examples=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert all(not tensor.any() for tensor in found)
