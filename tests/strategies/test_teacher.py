"""The teacher: other weights in the same model, and what is kept of its answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clpeft import experiment
from clpeft.strategies import teacher as module
from clpeft.strategies.teacher import CachedOutputs, cached_outputs, teacher_of
from clpeft.streams.batching import Columns
from tests.running import compose

Fixture = Callable[..., Any]
Overrides = Callable[..., list[str]]


def test_teacher_has_its_own_weights_and_no_dropout(regression: Fixture, examples: Fixture) -> None:
    run = regression((0.0, 1.0, 2.0), (1.0, -3.0), dropout=0.9)
    run.model.train()
    teacher = teacher_of(run, {"weight": torch.tensor([5.0, 7.0])})
    batch = run.batch(Columns(examples([[1], [2]], labels=[0, 1])), [0, 1])
    for _ in range(5):
        logits, labels = teacher(batch)
        assert logits.tolist() == [[5.0, 7.0], [10.0, 14.0]]
        assert labels.tolist() == [0, 1]
        assert not logits.requires_grad


def test_student_is_as_it_was(regression: Fixture, examples: Fixture) -> None:
    run = regression((0.0, 1.0, 2.0), (1.0, -3.0), dropout=0.5)
    run.model.train()
    run.model.frozen = torch.nn.Dropout(0.5).eval()  # one that somebody else keeps from training
    parameter = run.trainable["weight"]
    teacher = teacher_of(run, {"weight": torch.tensor([5.0, 7.0])})
    batch = run.batch(Columns(examples([[1], [2]], labels=[0, 1])), [0, 1])
    gradients = []
    for asked in (False, True):
        torch.manual_seed(0)
        loss = run.mean_loss(batch)
        if asked:
            teacher(batch)  # between the student's forward pass and its backward pass
        gradients.append(torch.autograd.grad(loss, [parameter])[0])

    assert torch.equal(*gradients)
    assert run.model.weight is parameter
    assert parameter.tolist() == [1.0, -3.0]
    assert run.model.training
    assert run.model.dropout.training
    assert not run.model.frozen.training


def test_student_is_as_it_was_after_an_error(regression: Fixture) -> None:
    run = regression((0.0, 1.0), (1.0, -3.0))
    run.model.train()
    parameter = run.trainable["weight"]
    teacher = teacher_of(run, {"weight": torch.tensor([5.0, 7.0])})
    with pytest.raises(TypeError):
        teacher(SimpleNamespace(inputs={"nonsense": 1}))  # type: ignore[arg-type]
    assert run.model.weight is parameter
    assert run.model.training


def test_tied_weights_are_replaced_everywhere(tiny: Overrides, tmp_path: Path) -> None:
    """With peft=full the embedding is the head's weight too: one parameter in two places."""
    run = experiment.build_run(compose(tiny("finetune", peft="full"))[1], tmp_path)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in run.trainable.items()
    }
    batch = run.loader(run.stream.tasks[0].train).batch(0)
    other = copy.deepcopy(run.model).eval()
    other.load_state_dict(weights, strict=False)
    head, embedding = other.get_output_embeddings(), other.get_input_embeddings()
    assert head.weight is embedding.weight

    found, _ = teacher_of(run, weights)(batch)
    with torch.no_grad():
        expected, _ = run.objective.predicted(run.objective.forward(other, batch), batch)
    assert torch.equal(found, expected)
    before, _ = teacher_of(run, dict(run.trainable))(batch)
    assert not torch.allclose(found, before, atol=0.1)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "torchao_int8"])
def test_teacher_over_a_quantized_base(
    tiny: Overrides, bases: Fixture, tmp_path: Path, quantization: str
) -> None:
    wide = f"model.path={bases('wide_llama')}"
    overrides = tiny("finetune", wide, f"quantization={quantization}")
    run, other = (experiment.build_run(compose(overrides)[1], tmp_path) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in run.trainable.items()
    }
    with torch.no_grad():
        for name, parameter in other.trainable.items():
            parameter.copy_(weights[name])
    batch = run.loader(run.stream.tasks[0].train).batch(0)
    run.model.train()

    found, _ = teacher_of(run, weights)(batch)
    with torch.no_grad(), other.eval_mode():
        expected, _ = other.objective.predicted(other.objective.forward(other.model, batch), batch)
        student, _ = other.objective.predicted(run.objective.forward(run.model, batch), batch)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, student, atol=0.1)


def test_lookup_by_hand() -> None:
    # example 5 has two targets, example 2 one; the rest are not known
    cache = CachedOutputs(
        torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]), torch.tensor([3, 3, 2, 3, 3, 0])
    )
    targets = torch.tensor([[False, True, True], [False] * 3, [True, False, False]])
    found = cache.at(torch.tensor([5, 999, 2]), targets)

    assert found[targets].tolist() == [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]
    assert found.isfinite().all()


@pytest.mark.parametrize("unknown", [3, 6])
def test_example_that_nobody_was_asked_about_is_an_error(unknown: int) -> None:
    cache = CachedOutputs(torch.zeros(3, 2), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(IndexError):
        cache.at(torch.tensor([unknown]), torch.tensor([[True]]))


ROWS = ([1, 2, 3, 1], [2, 3], [3, 1, 2], [1, 3, 3, 3, 2], [2, 1])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_cache_holds_the_answers_of_each_example(
    bigrams: Fixture, examples: Fixture, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """The next token's logits are the table's row of the token before it."""
    monkeypatch.setattr(module, "EXCHANGED_NUMBERS", 8)  # two targets at a time
    run = bigrams(4)
    run.config.training.batch_size = 2
    table = torch.arange(16.0).view(4, 4)
    teacher = teacher_of(run, {"table": table})
    columns = Columns(examples(ROWS, prompt_length=1))
    rows = np.array([4, 0, 3, 1])  # not the third
    parts = []
    monkeypatch.setattr(run, "sum_gradients", lambda tensors: tensors)
    for rank in range(processes):
        monkeypatch.setattr(run.accelerator, "num_processes", processes)
        monkeypatch.setattr(run.accelerator, "process_index", rank)
        parts.append(cached_outputs(run, teacher, columns, rows, 4))
    cache = CachedOutputs(sum(part.values for part in parts), parts[0].starts)  # type: ignore[arg-type]

    for row in rows.tolist():
        count = len(ROWS[row]) - 1
        found = cache.at(torch.tensor([row]), torch.ones(1, count, dtype=torch.bool))
        assert torch.equal(found[0], table[torch.tensor(ROWS[row][:-1])])
    assert len(cache.values) == 1 + 3 + 4 + 1
    with pytest.raises(IndexError):
        cache.at(torch.tensor([2]), torch.ones(1, 2, dtype=torch.bool))


def test_processes_share_the_work(
    bigrams: Fixture, examples: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bigrams(4)
    run.config.training.batch_size = 1
    monkeypatch.setattr(run, "sum_gradients", lambda tensors: tensors)
    monkeypatch.setattr(run.accelerator, "num_processes", 2)
    asked: list[int] = []
    plain = teacher_of(run, dict(run.trainable))

    def teacher(batch: Any) -> Any:
        asked.append(int(batch.example_ids))
        return plain(batch)

    by_rank = []
    for rank in range(2):
        asked.clear()
        monkeypatch.setattr(run.accelerator, "process_index", rank)
        cached_outputs(run, teacher, Columns(examples(ROWS, prompt_length=1)), np.arange(5), 4)
        by_rank.append(sorted(asked))
    assert sorted(by_rank[0] + by_rank[1]) == [0, 1, 2, 3, 4]
    assert len(by_rank[0]) == 3
