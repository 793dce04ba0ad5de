"""Whatever a model reads before the texts, a text in a padded batch is what it is alone.

For every method that learns a prompt, every kind of model and of task: in the forward pass, in
ranking and in writing, which one token after another, unpadded, is to agree with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from clpeft.config import ConfigError
from clpeft.evaluation.scoring import causal_scorer, left_padded, right_padded, seq2seq_scorer
from clpeft.models.continuation import continuations
from clpeft.models.objective import (
    CausalObjective,
    ClassificationObjective,
    takes_logits_to_keep,
)
from clpeft.models.sampling import sample
from clpeft.peft_methods.base import apply_peft
from clpeft.streams.batch import IGNORED, Batch
from tests.architectures import DECODERS, ENCODER_DECODERS, ENCODERS, build, heads_of
from tests.peft_methods.learned_prompts import METHODS, moved, settings

TEXTS = [[5, 6, 7, 8, 9, 10, 2], [11, 2], [13, 14, 15, 16, 2]]
CANDIDATES = [[5], [6, 7, 2], [8, 9]]
# float32 logits of size 1 to 10, summed in another order
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

SETTINGS: Any = GenerationConfig(
    max_new_tokens=5, do_sample=False, num_beams=1, pad_token_id=0, eos_token_id=2
)

SLOW = [pytest.mark.slow]

# what cannot be put before a text there
REFUSED = {
    ("prefix", "deberta-v2"): "does not support past key values",
    ("prefix", "distilbert"): "does not support past key values",
    **{
        (method, kind): "does not work with"
        for method in ("prompt", "p_tuning", "prefix")
        for kind in ENCODER_DECODERS
    },
}


def crossed(kinds: Iterable[str]) -> list[Any]:
    """Every kind of model with every method; in CI some of the former have one each."""
    return [
        pytest.param(kind, method, marks=[] if often or place % len(METHODS) == turn else SLOW)
        for place, kind in enumerate(kinds)
        for turn, method in enumerate(METHODS)
        for often in [kind in ("bert", "llama", "gpt2", "mistral", "t5")]
    ]


def adapted(kind: str, task_type: str, method: str) -> Any:
    base = build(kind, task_type)
    torch.manual_seed(0)
    new = heads_of(base) if task_type == "sequence_classification" else []
    return moved(apply_peft(base, settings(method), task_type, new)).eval()


def alone(model: Any, text: Sequence[int], **more: Any) -> Tensor:
    """The logits of one text, which needs no padding."""
    ids = torch.tensor([list(text)])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]


def together(texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    return {
        "input_ids": right_padded(texts, 0),
        "attention_mask": right_padded([[1] * len(text) for text in texts], 0),
    }


@pytest.mark.parametrize(("kind", "method"), crossed([*ENCODERS, *DECODERS, *ENCODER_DECODERS]))
@torch.no_grad()
def test_classification(kind: str, method: str) -> None:
    told = REFUSED.get((method.partition(":")[0], kind))
    if told is not None:
        with pytest.raises(ConfigError, match=told):
            adapted(kind, "sequence_classification", method)
        return
    model = adapted(kind, "sequence_classification", method)
    plain = build(kind, "sequence_classification")(**together(TEXTS)).logits

    found = model(**together(TEXTS)).logits
    expected = torch.stack([alone(model, text) for text in TEXTS])

    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (found - plain).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_classification_of_pairs(method: str) -> None:
    model = adapted("bert", "sequence_classification", method)
    kinds = [[0, 0, 0, 1, 1, 1, 1], [0, 1], [0, 1, 1, 1, 1]]

    found = model(**together(TEXTS), token_type_ids=right_padded(kinds, 0)).logits
    expected = torch.stack(
        [
            alone(model, text, token_type_ids=torch.tensor([kind]))
            for text, kind in zip(TEXTS, kinds, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (found - model(**together(TEXTS)).logits).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
@torch.no_grad()
def test_features(kind: str, method: str) -> None:
    model = adapted(kind, "sequence_classification", method)
    objective = ClassificationObjective(torch.ones(1, 3, dtype=torch.bool))

    def features(texts: list[list[int]]) -> Tensor:
        ids = torch.arange(len(texts))
        return objective.features(model, Batch(together(texts), ids, ids * 0, ids))

    expected = torch.cat([features([text]) for text in TEXTS])
    torch.testing.assert_close(features(TEXTS), expected, **TOLERANCE)


@pytest.mark.parametrize(("kind", "method"), crossed(DECODERS))
@torch.no_grad()
def test_decoders(kind: str, method: str) -> None:
    model = adapted(kind, "causal_lm", method)
    inputs = together(TEXTS)
    width = inputs["input_ids"].shape[1]
    plain = build(kind, "causal_lm")(**inputs).logits

    # what was read before the texts may have logits, too
    found = model(**inputs).logits[:, -width:]
    for row, text in enumerate(TEXTS):
        expected = alone(model, text)[-len(text) :]
        torch.testing.assert_close(found[row, : len(text)], expected, **TOLERANCE)
    assert (found - plain).abs().max() > 0.1

    scores = torch.zeros(len(TEXTS), len(CANDIDATES))
    for row, text in enumerate(TEXTS):
        for column, candidate in enumerate(CANDIDATES):
            for place, token in enumerate(candidate):
                last = alone(model, [*text, *candidate[:place]])[-1]
                scores[row, column] += last.log_softmax(dim=-1)[token]
    ranked = causal_scorer(model, SimpleNamespace(pad_token_id=0))(TEXTS, CANDIDATES)  # type: ignore[arg-type]
    torch.testing.assert_close(ranked, scores, **TOLERANCE)

    objective, told = CausalObjective(takes_logits_to_keep(model)), CANDIDATES[1]
    rows = [[*text, *told] for text in TEXTS]
    labels = right_padded([[IGNORED] * len(text) + told for text in TEXTS], IGNORED)
    batch = Batch(together(rows), labels, labels[:, 0], torch.arange(3))
    losses = objective.per_example(objective.forward(model, batch), batch)
    torch.testing.assert_close(losses, -scores[:, 1], **TOLERANCE)

    ids, mask = left_padded(TEXTS, 0)
    written = continuations(model, ids, mask, SETTINGS)
    for row, text in enumerate(TEXTS):
        assert cut(written[row]) == greedy(
            lambda so_far, text=text: alone(model, [*text, *so_far])[-1]
        )


@pytest.mark.parametrize(("kind", "method"), crossed(ENCODER_DECODERS))
@torch.no_grad()
def test_encoder_decoders(kind: str, method: str) -> None:
    model = adapted(kind, "seq2seq_lm", method)
    start = model.config.decoder_start_token_id
    inputs, begun = together(TEXTS), torch.tensor([[start, 4, 3]] * len(TEXTS))
    plain = build(kind, "seq2seq_lm")(**inputs, decoder_input_ids=begun).logits

    found = model(**inputs, decoder_input_ids=begun).logits
    expected = torch.stack([alone(model, text, decoder_input_ids=begun[:1]) for text in TEXTS])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (found - plain).abs().max() > 0.1

    def after(text: list[int], so_far: list[int]) -> Tensor:
        return alone(model, text, decoder_input_ids=torch.tensor([[start, *so_far]]))[-1]

    scores = torch.zeros(len(TEXTS), len(CANDIDATES))
    for row, text in enumerate(TEXTS):
        for column, candidate in enumerate(CANDIDATES):
            for place, token in enumerate(candidate):
                last = after(text, candidate[:place])
                scores[row, column] += last.log_softmax(dim=-1)[token]
    scorer = seq2seq_scorer(model, SimpleNamespace(pad_token_id=0), start)  # type: ignore[arg-type]
    torch.testing.assert_close(scorer(TEXTS, CANDIDATES), scores, **TOLERANCE)

    written = continuations(model, inputs["input_ids"], inputs["attention_mask"], SETTINGS)
    for row, text in enumerate(TEXTS):
        assert cut(written[row]) == greedy(lambda so_far, text=text: after(text, so_far))


@pytest.mark.parametrize("method", ["prompt", "prefix", "lisa_hybrid"])
def test_sampled_from_the_likeliest_alone(method: str) -> None:
    model = adapted("llama", "causal_lm", method)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    rows = sample(
        *(model, tokenizer, TEXTS[0], 2),
        max_new_tokens=SETTINGS.max_new_tokens,
        top_k=1,
        temperature=1.0,
        seed=0,
    )
    with torch.no_grad():
        assert rows == [greedy(lambda so_far: alone(model, [*TEXTS[0], *so_far])[-1])] * 2


def greedy(after: Any) -> list[int]:
    """The likeliest token again and again, each from a whole forward pass."""
    written: list[int] = []
    while len(written) < SETTINGS.max_new_tokens and 2 not in written:
        written.append(int(after(written).argmax()))
    return written


def cut(row: Tensor) -> list[int]:
    """What was written up to the end; behind it stands padding."""
    tokens = row.tolist()
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens
