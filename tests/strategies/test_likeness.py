"""Likeness of examples, against sets and vectors worked out by hand."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from clpeft.strategies.likeness import jaccard, near_duplicates, ngrams, too_close


def grams(*tokens: int, n: int = 2) -> np.ndarray:
    return ngrams(np.array(tokens), n)


def test_ngrams_are_a_set() -> None:
    # 1 2, 2 1, 1 2 again, 2 3
    assert len(grams(1, 2, 1, 2, 3)) == 3
    assert len(grams(1, 2, 1, 2, 3, n=1)) == 3
    assert len(grams(1, 2, 1, 2, 3, n=4)) == 2
    assert (np.diff(grams(*range(50)).astype(object)) > 0).all()  # sorted, each once
    assert jaccard(grams(1, 2, 3), grams(3, 2, 1)) == 0.0  # order counts
    assert jaccard(grams(1, 2, n=1), grams(2, 1, n=1)) == 1.0


def test_short_text_is_one_gram() -> None:
    assert len(grams(7, n=3)) == len(grams(7, 8, n=3)) == 1
    assert jaccard(grams(7, n=3), grams(7, n=3)) == 1.0
    assert jaccard(grams(7, 8, n=3), grams(7, n=3)) == 0.0
    assert len(grams()) == 0


def test_jaccard_by_hand() -> None:
    # {12, 23, 34} and {12, 23, 35}: 2 of 4
    assert jaccard(grams(1, 2, 3, 4), grams(1, 2, 3, 5)) == 0.5
    assert jaccard(grams(1, 2, 3, 4), grams(1, 2, 3)) == pytest.approx(2 / 3)
    assert jaccard(grams(), grams()) == 0.0
    assert jaccard(grams(), grams(1, 2)) == 0.0


def test_no_two_of_many_grams_share_a_hash() -> None:
    texts = np.array(list(itertools.product(range(60), repeat=3)))
    hashes = [int(ngrams(text, 3)[0]) for text in texts]
    assert len(set(hashes)) == 60**3


def test_first_of_those_alike_stays() -> None:
    a, b, c = grams(1, 2, 3, 4), grams(1, 2, 3, 5), grams(9, 8, 7)

    assert near_duplicates([a, c, b, a], 0.5) == [2, 3]
    assert near_duplicates([a, c, b, a], 0.51) == [3]
    assert near_duplicates([a, c], 0.5, beside=[b]) == [0]
    assert near_duplicates([c], 0.5, beside=[b, b]) == []  # those beside are not judged
    assert near_duplicates([], 0.5) == []


def test_what_was_dropped_drops_nothing() -> None:
    # neighbours share 3 of 5 elements; the first and the third only 2 of 6
    one, two, three = (np.arange(start, start + 4, dtype=np.uint64) for start in (0, 1, 2))
    assert jaccard(one, two) == jaccard(two, three) == 0.6
    assert near_duplicates([one, two, three], 0.6) == [1]


def test_nothing_is_not_like_nothing() -> None:
    assert near_duplicates([grams(), grams(), grams(1, 2)], 0.1) == []


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_shortcut_finds_what_comparing_all_pairs_finds(threshold: float) -> None:
    rng = np.random.default_rng(int(100 * threshold))
    dropped = 0
    for _ in range(30):
        # small sets of few elements, so that similarities lie on the threshold itself
        sets = [
            np.unique(rng.integers(0, 12, rng.integers(0, 11))).astype(np.uint64) for _ in range(40)
        ]
        beside = sets[:5]
        stay = list(beside)
        expected = []
        for place, own in enumerate(sets[5:]):
            members = {*own.tolist()}
            alike = [
                len(members & {*other.tolist()}) * 10 >= 10 * threshold * len(members | {*other})
                for other in stay
                if members
            ]
            if any(alike):
                expected.append(place)
            else:
                stay.append(own)
        assert near_duplicates(sets[5:], threshold, beside) == expected
        dropped += len(expected)
    assert dropped > 0


def test_cost_of_many_texts_is_about_linear() -> None:
    # words as rare as in a language; comparing all pairs of 4000 would take 8 million comparisons
    rng = np.random.default_rng(0)
    texts = [ngrams(np.minimum(rng.zipf(1.2, 40), 20_000), 3) for _ in range(4000)]
    times = []
    for count in (1000, 4000):
        start = time.process_time()
        near_duplicates(texts[:count], 0.8)
        times.append(time.process_time() - start)
    assert times[1] < 10 * times[0]


def test_too_close_by_hand() -> None:
    # cosines to the first: 1, 0.6, 0, −1; of the second and the third: 0.8
    features = torch.tensor([[2.0, 0.0], [5.0, 0.0], [3.0, 4.0], [0.0, 1.0], [-1.0, 0.0]])

    assert too_close(features, 0.1) == [1]
    assert too_close(features, 0.3) == [1, 3]
    # without the third the fourth stays
    assert too_close(features, 0.5) == [1, 2]
    assert too_close(features, 2.0) == [1, 2, 3]
    assert too_close(features[2:], 0.3, beside=features[:1]) == [1]
    assert too_close(features[2:], 0.5, beside=features[:1]) == [0]
    assert too_close(features[:0], 0.5) == []
