"""The Fisher diagonal, against what softmax regression gives on paper.

With logits w_c x the gradient of log p_y with respect to w_c is (1[c = y] − p_c) x. The weights are
0 and ln 3, so that p = (1/4, 3/4) at x = 1 and (1/10, 9/10) at x = 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clpeft.strategies.fisher import fisher_diagonal

WEIGHT = (0.0, math.log(3.0))
INPUTS = (0.0, 1.0, 2.0)  # of token 0, 1, 2
FLOAT32 = {"rtol": 1e-6, "atol": 1e-7}


def fisher(run: Any, dataset: Any, kind: str, examples: int = 1000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    (found,) = fisher_diagonal(run, dataset, kind=kind, examples=examples, generator=generator)
    return found


def test_exact(regression: Callable[..., Any], examples: Callable[..., Any]) -> None:
    run = regression(INPUTS, WEIGHT)

    # Σ_y p_y (1[c=y] − p_c)² x² = p_c (1 − p_c) x²: 3/16 · 1 and 9/100 · 4, for both labels
    found = fisher(run, examples([[1], [2]]), "exact")

    torch.testing.assert_close(found, torch.full((2,), (0.1875 + 0.36) / 2), **FLOAT32)


def test_empirical_is_per_example(
    regression: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run = regression(INPUTS, WEIGHT)

    found = fisher(run, examples([[1], [2]], labels=[1, 0]), "empirical")

    # example 1: (−1/4, 1/4), squared 1/16; example 2: (0.9 · 2, −0.9 · 2), squared 3.24
    torch.testing.assert_close(found, torch.full((2,), (1 / 16 + 3.24) / 2), **FLOAT32)
    # the square of the batch's mean gradient would be ((−1/4 + 1.8) / 2)²
    assert not torch.allclose(found, torch.full((2,), 0.600625), rtol=0.5)


def test_sampled_draws_labels_from_the_model(
    regression: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run, n = regression(INPUTS, WEIGHT), 400

    # the given label is the unlikely one; it must play no part
    found = fisher(run, examples([[1]] * n, labels=[0] * n), "sampled")

    # an example adds 9/16 if label 0 is drawn (p = 1/4) and 1/16 if label 1 is
    zeros = (float(found[0]) * 16 - 1) / 8 * n
    assert zeros == pytest.approx(round(zeros), abs=1e-2)
    # binomial: mean 100, standard deviation √75 = 8.7; the seed is fixed
    assert abs(round(zeros) - 100) < 3 * 8.7
    torch.testing.assert_close(found[0], found[1])


def test_examples_weigh_alike_whatever_their_number(
    regression: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run = regression(INPUTS, WEIGHT)

    # x = 0 adds nothing but counts: nine examples, so that no batch size divides them well
    found = fisher(run, examples([[1]] * 5 + [[0]] * 3 + [[2]]), "exact")

    torch.testing.assert_close(found, torch.full((2,), (5 * 0.1875 + 0.36) / 9), **FLOAT32)


def test_mean_is_over_the_examples_drawn(
    regression: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run = regression(INPUTS, WEIGHT)
    possible = {0.1875, 0.36, (0.1875 + 0.36) / 2}
    singles, pairs = set(), set()
    for seed in range(8):
        dataset = examples([[1], [2]])
        singles.add(round(float(fisher(run, dataset, "exact", examples=1, seed=seed)[0]), 6))
        pairs.add(round(float(fisher(run, dataset, "exact", examples=2, seed=seed)[0]), 6))

    assert singles == {0.1875, 0.36}
    assert pairs == {(0.1875 + 0.36) / 2}
    assert singles | pairs == possible


def test_dropout_is_off_and_the_mode_restored(
    regression: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run = regression(INPUTS, WEIGHT, dropout=0.5)
    run.model.train()

    found = fisher(run, examples([[1]] * 20), "exact")

    torch.testing.assert_close(found, torch.full((2,), 0.1875), **FLOAT32)
    assert run.model.training


def test_gradients_at_hand_are_neither_used_nor_changed(
    regression: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run = regression(INPUTS, WEIGHT)
    run.model.weight.grad = torch.tensor([5.0, -7.0])

    found = fisher(run, examples([[1]]), "exact")

    torch.testing.assert_close(found, torch.full((2,), 0.1875), **FLOAT32)
    assert run.model.weight.grad.tolist() == [5.0, -7.0]


def test_labels_that_do_not_compete_have_no_part(
    regression: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    # a third label of any weight, masked: probability 0, so the rest is as with two
    run = regression(INPUTS, (*WEIGHT, 50.0))
    run.objective = type(run.objective)(torch.tensor([[True, True, False]]))

    found = fisher(run, examples([[1]]), "exact")

    torch.testing.assert_close(found, torch.tensor([0.1875, 0.1875, 0.0]), **FLOAT32)


def test_text_is_one_example_however_long(
    bigrams: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run = bigrams(2)

    # token 1 three times, the first of them the prompt: the answer's two tokens are each predicted
    # by row 1 with p = (1/2, 1/2). The log-likelihood is a sum, so its gradient is 2 · (−1/2, 1/2)
    found = fisher(run, examples([[1, 1, 1]], prompt_length=1), "empirical")

    # (±1)² = 1; the squares of the tokens' gradients would add to 1/2, their mean's to 1/4
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), **FLOAT32)


def test_prompt_has_no_part_in_the_likelihood(
    bigrams: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    run = bigrams(3)

    # only "2 after 1" is answered: row 1, p = 1/3 each: (−1/3, −1/3, 2/3)²
    found = fisher(run, examples([[2, 0, 1, 2]], prompt_length=3), "empirical")

    expected = torch.zeros(3, 3)
    expected[1] = torch.tensor([1 / 9, 1 / 9, 4 / 9])
    torch.testing.assert_close(found, expected, **FLOAT32)


def test_sampled_tokens_follow_the_models_distribution(
    bigrams: Callable[..., Any], examples: Callable[..., Any]
) -> None:
    """Of a language model, whose labels stand one place behind the logits that predict them."""
    run, n = bigrams(3), 600
    with torch.no_grad():  # after token 1: p = (.2, .5, .3); after token 0: p = (0, 0, 1), nearly
        run.model.table[1] = torch.tensor([0.2, 0.5, 0.3]).log()
        run.model.table[0] = torch.tensor([-50.0, -50.0, 0.0])
    # prompt 1, answer 0 2: the first drawn token follows row 1, the second row 0
    found = fisher(run, examples([[1, 0, 2]] * n, prompt_length=1), "sampled", examples=n)

    # the gradient in row 1 is 1[drawn] − p, so that its square tells the drawn tokens: of column c
    # it is f (1 − p)² + (1 − f) p², f the share of c among those drawn
    for token, p in ((0, 0.2), (2, 0.3)):  # for p = ½ the square says nothing
        share = (float(found[1, token]) - p**2) / ((1 - p) ** 2 - p**2)
        assert abs(share - p) < 3 * math.sqrt(p * (1 - p) / n)
    # row 0 draws what is certain
    torch.testing.assert_close(found[0], torch.zeros(3), rtol=0, atol=1e-9)
