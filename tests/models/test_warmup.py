"""What a base model that is built here is warmed up with: which tokens it sees and has to tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from clpeft.config import WarmupConfig
from clpeft.models import warmup
from clpeft.models.generated import train_tokenizer
from clpeft.models.warmup import continuation_loss, masked_loss, warm_up

TOKENIZER: Any = SimpleNamespace(pad_token_id=0, mask_token_id=1)


def settings(**values: Any) -> WarmupConfig:
    known = {"steps": 4, "batch_size": 2, "length": 8, "lr": 1e-2, "vocabulary": 320, "seed": 0}
    return WarmupConfig(**(known | values))


def drawn(texts: list[list[int]], **values: Any) -> list[list[int]]:
    """Passages, each with its end behind it."""
    draw = torch.Generator().manual_seed(0)
    passages, ends = warmup._passages(texts, settings(**values), draw)
    return [[*ids.tolist(), end] for ids, end in zip(passages, ends.tolist(), strict=True)]


def test_short_texts_are_whole() -> None:
    texts = [[9, 1], [9, 2, 3], [9, 4, 5, 6]]
    found = drawn(texts, batch_size=60, length=4)
    assert {tuple(ids) for ids in found} == {tuple(ids) for ids in texts}


def test_of_a_long_text_it_is_a_stretch_behind_the_first_token() -> None:
    found = drawn([[9, 1, 2, 3, 4, 5]], batch_size=60, length=4)
    assert {tuple(ids) for ids in found} == {(9, 1, 2, 3), (9, 2, 3, 4), (9, 3, 4, 5)}


class Told(torch.nn.Module):
    """Gives fixed logits, or a fixed loss, and remembers what it was asked."""

    def __init__(self, logits: torch.Tensor | None = None) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **asked: torch.Tensor) -> Any:
        self.asked = {name: value.tolist() for name, value in asked.items()}
        return SimpleNamespace(loss=torch.tensor(2.0), logits=self.logits)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_masked_tokens_and_the_end(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "MASKED_SHARE", share)
    shares = torch.tensor([1.0, 1.0, 2.0, 4.0]).log()  # of 8: 1/8, 1/8, 1/4, 1/2
    model: Any = Told(shares.expand(2, 3, 4).clone())
    passages = [torch.tensor([2, 3, 2]), torch.tensor([2, 3])]

    loss = masked_loss(model, TOKENIZER, passages, torch.tensor([3, 2]), torch.Generator())

    # the ends are 3 and 2; asked by their masks are 3, 2 and 3: never the first token or padding
    ends = (torch.tensor(2.0).log() + torch.tensor(4.0).log()) / 2
    words = (2 * torch.tensor(2.0).log() + torch.tensor(4.0).log()) / 3
    assert loss.item() == pytest.approx((ends + share * words).item(), rel=1e-6)
    given = [[2, 1, 1], [2, 1, 0]] if share else [[2, 3, 2], [2, 3, 0]]
    assert model.asked == {"input_ids": given, "attention_mask": [[1, 1, 1], [1, 1, 0]]}


def test_nothing_masked_still_has_a_gradient() -> None:
    logits = torch.zeros(1, 1, 4, requires_grad=True)
    model: Any = Told(logits)
    draw = torch.Generator()
    masked_loss(model, TOKENIZER, [torch.tensor([2])], torch.tensor([3]), draw).backward()

    assert logits.grad is not None
    assert logits.grad.tolist() == [[[0.25, 0.25, 0.25, -0.75]]]  # softmax minus the end's place


def test_continuation_is_the_end_or_a_half() -> None:
    model: Any = Told()
    passages = [torch.tensor(ids) for ids in ([2, 5, 6], [2], [2, 7], [2, 5, 6, 7, 8])]

    assert continuation_loss(model, TOKENIZER, passages, torch.tensor([3, 4, 5, 9])).item() == 2.0

    assert model.asked == {
        "input_ids": [[2, 5, 6], [2, 0, 0], [2, 7, 0], [2, 5, 6]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]],
        "labels": [[3, -100, -100], [4, -100, -100], [5, -100, -100], [7, 8, 9]],
    }


def test_classifiers_token_learns_how_a_text_ends() -> None:
    # the end follows from one word of the text, wherever it stands
    nature = {"red": "stop", "amber": "wait", "green": "go"}
    frames = ("the {} light told me to", "a {} sign says", "so {} it was , and we")
    texts = [f"{frame.format(one)} {end}" for frame in frames for one, end in nature.items()]
    tokenizer = train_tokenizer([*texts, ""] * 4, 400)
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            initializer_range=0.1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    warm_up(model, tokenizer, [*texts, ""], settings(steps=120, batch_size=16, length=16, lr=5e-3))

    assert not model.training
    for text in texts:
        *given, end = tokenizer(text)["input_ids"]
        assert model(input_ids=torch.tensor([given])).logits[0, 0].argmax().item() == end
