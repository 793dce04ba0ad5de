"""Losses of the three task types, against values worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from clpeft.models.objective import (
    CausalObjective,
    ClassificationObjective,
    Seq2SeqObjective,
    shift_right,
    takes_logits_to_keep,
)
from clpeft.streams.batch import Batch


def batch(labels: Tensor, tasks: list[int] | None = None) -> Batch:
    size = len(labels)
    ids = torch.zeros(size, dtype=torch.int64)
    return Batch({"input_ids": ids}, labels, torch.tensor(tasks or [0] * size), ids)


def outputs(logits: Tensor) -> Any:
    return SimpleNamespace(logits=logits)


def test_classification() -> None:
    # logits 0 and ln 3: p = (1/4, 3/4)
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    objective = ClassificationObjective(torch.ones(1, 2, dtype=torch.bool))
    given = batch(torch.tensor([0, 1]))

    expected = [math.log(4), math.log(4 / 3)]
    assert objective.per_example(outputs(logits), given).tolist() == pytest.approx(expected)
    assert float(objective.total(outputs(logits), given)) == pytest.approx(sum(expected))


def test_labels_that_do_not_compete_are_left_out_example_by_example() -> None:
    logits = torch.tensor([[0.0, math.log(3), 50.0], [50.0, 0.0, math.log(3)]])
    allowed = torch.tensor([[True, True, False], [False, True, True]])
    objective = ClassificationObjective(allowed)
    # the first example is of task 0, the second, replayed perhaps, of task 1
    given = batch(torch.tensor([1, 2]), tasks=[0, 1])

    expected = [math.log(4 / 3), math.log(4 / 3)]
    assert objective.per_example(outputs(logits), given).tolist() == pytest.approx(expected)
    masked, _ = objective.predicted(outputs(logits), given)
    assert masked.isinf().tolist() == [[False, False, True], [True, False, False]]
    every, labels = objective.unmasked(outputs(logits), given, slice(1, 2))
    assert (every.tolist(), labels.tolist()) == (logits[1:].tolist(), [2])


def test_causal_position_predicts_the_next_token() -> None:
    # two tokens to be told: the one at position 1 by position 0, the one at 2 by position 1
    table = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [9.0, 9.0]])
    labels = torch.tensor([[-100, 1, 1]])
    objective = CausalObjective()

    # p(1) = 3/4 at position 0 and 1/4 at position 1; position 2 predicts nothing
    expected = math.log(4 / 3) + math.log(4)
    given = batch(labels)
    assert objective.per_example(outputs(table[None]), given).tolist() == pytest.approx([expected])
    assert float(objective.total(outputs(table[None]), given)) == pytest.approx(expected)
    assert given.num_targets == 2


def test_prompt_and_padding_count_nothing() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, -100], [-100, 1, 2, 4]])
    per_example = CausalObjective().per_example(outputs(logits), batch(labels))

    scores = torch.log_softmax(logits, dim=-1)
    assert float(per_example[0]) == pytest.approx(-float(scores[0, 1, 3]), rel=1e-6)
    second = scores[1, 0, 1] + scores[1, 1, 2] + scores[1, 2, 4]
    assert float(per_example[1]) == pytest.approx(-float(second), rel=1e-6)


def test_seq2seq_reads_what_it_is_taught_one_late() -> None:
    read: dict[str, Tensor] = {}

    def model(input_ids: Tensor, decoder_input_ids: Tensor) -> Any:
        read["decoder"] = decoder_input_ids
        return outputs(torch.zeros(2, 3, 4))

    labels = torch.tensor([[2, 3, 1], [3, 1, -100]])
    objective, given = Seq2SeqObjective(start=0, pad=9), batch(labels)
    found = objective.forward(model, given)  # type: ignore[arg-type]

    assert read["decoder"].tolist() == [[0, 2, 3], [0, 3, 1]]
    # four equal logits: log 4 a token
    per_example = objective.per_example(found, given).tolist()
    assert per_example == pytest.approx([3 * math.log(4), 2 * math.log(4)])


def test_shift_right_pads_what_is_ignored() -> None:
    labels = torch.tensor([[5, 6, -100, -100]])

    assert shift_right(labels, 0, 9).tolist() == [[0, 5, 6, 9]]
    assert labels.tolist() == [[5, 6, -100, -100]]


def test_losses_are_taken_in_float32() -> None:
    logits = torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)
    objective = ClassificationObjective(torch.ones(1, 2, dtype=torch.bool))

    assert objective.total(outputs(logits), batch(torch.tensor([0]))).dtype == torch.float32


def test_logits_of_the_prompt_are_not_needed() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(50, (2, 9))
    labels = torch.full((2, 9), -100)
    labels[0, 5:7], labels[1, 6:] = ids[0, 5:7], ids[1, 6:]
    given = Batch({"input_ids": ids}, labels, torch.tensor([0, 0]), torch.tensor([0, 1]))
    everything, kept = CausalObjective(), CausalObjective(takes_logits_to_keep(model))

    outputs = kept.forward(model, given)
    # the targets begin at position 5, which position 4 predicts
    assert outputs.logits.shape == (2, 5, 50)
    expected = everything.per_example(everything.forward(model, given), given)
    assert kept.per_example(outputs, given).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    plain = model(input_ids=ids, labels=labels).loss * given.num_targets
    assert kept.total(outputs, given).item() == pytest.approx(plain.item(), rel=1e-5)


def test_models_without_logits_to_keep_are_asked_for_all() -> None:
    assert not takes_logits_to_keep(torch.nn.Linear(2, 2))
