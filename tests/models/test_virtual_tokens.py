"""Where virtual tokens stand, how many there are, and the positions they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from clpeft.config import ConfigError
from clpeft.models.load import check_positions, positions
from clpeft.models.virtual_tokens import (
    before_text,
    find_last_token,
    places,
    reads_prefix,
    virtual_tokens,
    widened,
)
from clpeft.peft_methods.base import apply_peft
from tests.architectures import POSITIONS, build
from tests.peft_methods.learned_prompts import METHODS, VIRTUAL, settings

# padding on the left, on the right, on neither side
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])


def test_they_stand_right_before_the_text() -> None:
    order = places(MASK, 2)

    # 0 and 1 are the virtual tokens, 2 to 5 the text's
    assert order.tolist() == [
        [2, 3, 0, 1, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    virtual = torch.tensor([[10, 20]] * 3)
    text = torch.tensor([[1, 2, 3, 4]] * 3)
    assert before_text(virtual, text, order).tolist() == [
        [1, 2, 10, 20, 3, 4],
        [10, 20, 1, 2, 3, 4],
        [10, 20, 1, 2, 3, 4],
    ]
    vectors = before_text(virtual[..., None].double(), text[..., None].float(), order)
    assert (vectors.shape, vectors.dtype) == ((3, 6, 1), torch.float32)
    assert vectors[0, :, 0].tolist() == [1, 2, 10, 20, 3, 4]


def test_mask_has_them_before_the_text() -> None:
    assert widened(MASK, 2).tolist() == [
        [0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert widened(MASK, 0).tolist() == MASK.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_how_many_there_are(method: str) -> None:
    base = build("gpt2", "causal_lm")
    assert (virtual_tokens(base), reads_prefix(base)) == (0, False)
    model = apply_peft(base, settings(method), "causal_lm", [])

    assert virtual_tokens(model) == VIRTUAL
    assert reads_prefix(model) == method.startswith("prefix")


def test_other_adapters_have_none() -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = get_peft_model(build("llama", "causal_lm"), lora)
    assert (virtual_tokens(model), reads_prefix(model)) == (0, False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "roberta", "opt"])
@torch.no_grad()
def test_they_take_learned_positions(kind: str, method: str) -> None:
    task_type = "sequence_classification" if kind == "roberta" else "causal_lm"
    model = apply_peft(build(kind, task_type), settings(method), task_type, []).eval()
    room = POSITIONS - VIRTUAL

    assert positions(model) == room
    check_positions(model, room)
    longest = torch.full((1, room + 1), 5)
    told = rf"{room + 1} tokens, .* knows {POSITIONS} positions, {VIRTUAL} of which virtual tokens"
    with pytest.raises(ConfigError, match=told) as error:
        check_positions(model, room + 1)
    assert f"stream.max_length={room} or less, or peft.num_virtual_tokens" in str(error.value)
    # and so it is
    model(input_ids=longest[:, 1:], attention_mask=torch.ones(1, room, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=longest, attention_mask=torch.ones(1, room + 1, dtype=torch.long))


def test_more_of_them_than_there_are_positions() -> None:
    from clpeft.peft_methods.prompt import PromptSettings

    many = PromptSettings("prompt", POSITIONS, "random")
    with pytest.raises(ConfigError, match=r"knows 64 positions, 64 of which virtual tokens take"):
        apply_peft(build("gpt2", "causal_lm"), many, "causal_lm", [])


def read_by_head(model: PeftModel, texts: Tensor, mask: Tensor) -> Tensor:
    """What a classification head is given."""
    seen: list[Any] = []
    hook = model.get_base_model().score.register_forward_hook(lambda *call: seen.append(call[1][0]))
    model(input_ids=texts, attention_mask=mask)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_head_reads_the_last_token_whatever_stands_behind_it() -> None:
    model = apply_peft(
        build("llama", "sequence_classification"),
        settings("prompt"),
        "sequence_classification",
        ["score"],
    ).eval()
    texts = torch.tensor([[5, 6, 7], [8, 9, 0], [10, 0, 0]])
    mask = (texts != 0).long()
    states: list[Any] = []
    hook = model.get_base_model().model.register_forward_hook(
        lambda *call: states.append(call[-1].last_hidden_state)
    )
    found = read_by_head(model, texts, mask)
    hook.remove()

    # behind four virtual tokens the texts' last ones are the seventh, sixth and fifth
    expected = states[0][torch.arange(3), torch.tensor([6, 5, 4])][:, None]
    assert torch.equal(found, expected)
    # a text that is all padding but for the prompt, and none without a mask, are left alone
    bare = model(input_ids=texts[:1], attention_mask=None).logits
    torch.testing.assert_close(bare, model(input_ids=texts[:1], attention_mask=mask[:1]).logits)


def test_heads_that_read_the_first_token_are_left_alone() -> None:
    for kind, method in (("bert", "prompt"), ("llama", "lisa_hybrid")):
        base = build(kind, "sequence_classification")
        before = dict(base._forward_pre_hooks)
        model = apply_peft(base, settings(method), "sequence_classification", [])
        find_last_token(model)
        assert base._forward_pre_hooks == before
