"""Losses of the three task types, against values worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

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


# Features: what a batch of padded examples gives, against one example at a time, unpadded, with
# the last layer's states caught where they come out of it.

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
ANSWERS = [[3, 4], [7, 8, 9], [5]]
SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()


def right_padded(rows: list[list[int]], pad: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def read(inputs: list[list[int]], labels: Tensor) -> Batch:
    ids = torch.arange(len(inputs))
    own = right_padded([[1] * len(row) for row in inputs], 0)
    # padding that looks like text: only the mask tells
    return Batch(
        {"input_ids": right_padded(inputs, 17), "attention_mask": own},
        labels,
        torch.zeros_like(ids),
        ids,
    )


def read_by_causal() -> Batch:
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    labels = [
        [-100] * len(prompt) + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    return read(texts, right_padded(labels, -100))


def caught(model: nn.Module, layer: nn.Module, prompt: list[int]) -> Tensor:
    """The mean of what a layer gives while the model reads one prompt alone: [D]."""
    states: list[Tensor] = []

    def catch(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(catch)
    ids = torch.tensor([prompt])
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    handle.remove()
    return states[0][0].mean(dim=0)


@pytest.mark.parametrize("keeps_logits", [False, True])
def test_features_of_a_decoder_are_of_its_prompts(keeps_logits: bool) -> None:
    model = llama()
    heads: list[int] = []
    model.lm_head.register_forward_hook(lambda m, i, output: heads.append(output.shape[1]))
    with torch.no_grad():
        found = CausalObjective(keeps_logits).features(model, read_by_causal())
        expected = torch.stack([caught(model.model, model.model.norm, row) for row in PROMPTS])

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert heads == [1 if keeps_logits else 7]  # positions whose logits were computed


def test_features_of_an_encoder() -> None:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, max_position_embeddings=16, num_labels=2)
    model = BertForSequenceClassification(config).eval()
    objective = ClassificationObjective(torch.ones(1, 2, dtype=torch.bool))
    with torch.no_grad():
        found = objective.features(model, read(PROMPTS, torch.tensor([0, 1, 0])))
        expected = torch.stack(
            [caught(model, model.bert.encoder.layer[-1], row) for row in PROMPTS]
        )

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_of_an_encoder_and_a_decoder_are_the_encoders() -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=30,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ).eval()
    batch = read(PROMPTS, right_padded(ANSWERS, -100))
    with torch.no_grad():
        found = Seq2SeqObjective(start=0, pad=17).features(model, batch)
        expected = torch.stack(
            [caught(model.encoder, model.encoder.final_layer_norm, row) for row in PROMPTS]
        )

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_leave_out_what_the_model_reads_before_the_text() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    base: Any = model.get_base_model()
    with torch.no_grad():
        found = CausalObjective().features(model, read_by_causal())
        virtual = model.get_prompt(batch_size=1)
        expected = []
        for prompt in PROMPTS:
            embedded = base.get_input_embeddings()(torch.tensor([prompt]))
            states = base.model(inputs_embeds=torch.cat([virtual, embedded], dim=1))
            expected.append(states.last_hidden_state[0, 4:].mean(dim=0))

    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_features_are_float32() -> None:
    found = CausalObjective().features(llama().bfloat16(), read_by_causal())
    assert found.dtype == torch.float32


def test_rows_that_are_asked_for() -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, 3, -100], [-100, -100, 4, 0]])
    given = batch(labels)
    every = CausalObjective().per_example(outputs(logits), given)

    for rows in (slice(1, 3), torch.tensor([2, 0])):
        found = CausalObjective().per_example(outputs(logits), given, rows)
        assert found.tolist() == every[rows].tolist()
