"""Every metric against a matrix worked out by hand."""

import math
import random

import pytest

from clpeft.evaluation.metrics import (
    METRICS,
    compute_metrics,
    confidence_interval,
    paired_difference,
)

# Three tasks. Every metric comes out different, and every term of each counts.
MATRIX = [
    [0.25, 0.20, 0.50],  # untrained
    [0.90, 0.30, 0.45],
    [0.95, 0.80, 0.55],
    [0.70, 0.50, 0.75],
]
SIZES = [100, 300, 100]
INDEPENDENT = [0.92, 0.85, 0.80]

EXPECTED = {
    # (.70 + .50 + .75) / 3
    "average_accuracy": 0.65,
    # (70 + 150 + 75) / 500 right answers
    "average_accuracy_micro": 295 / 500,
    # (.90 + (.95 + .80) / 2 + .65) / 3
    "average_anytime_accuracy": (0.90 + 0.875 + 0.65) / 3,
    # (90/100 + (95 + 240)/400 + 295/500) / 3
    "average_anytime_accuracy_micro": (0.90 + 0.8375 + 0.59) / 3,
    # the diagonal: (.90 + .80 + .75) / 3
    "learning_accuracy": 2.45 / 3,
    # ((.70 - .90) + (.50 - .80)) / 2
    "backward_transfer": -0.25,
    # the best before the end was .95 (after task 2) and .80: ((.95 - .70) + (.80 - .50)) / 2
    "forgetting": 0.275,
    # one before the diagonal, over chance: ((.30 - .20) + (.55 - .50)) / 2
    "forward_transfer": 0.075,
    # ((.92 - .90) + (.85 - .80) + (.80 - .75)) / 3
    "intransigence": 0.04,
    # (.70 - .25)/(.90 - .25) = 9/13 and (.50 - .20)/(.80 - .20) = 1/2; their mean
    "retained_learning": 31 / 52,
}


def with_none(*places):
    matrix = [list(row) for row in MATRIX]
    for t, i in places:
        matrix[t][i - 1] = None
    return matrix


def test_every_metric_of_the_hand_worked_matrix():
    metrics, undefined = compute_metrics(MATRIX, independent=INDEPENDENT, test_sizes=SIZES)
    assert undefined == {}
    assert metrics == pytest.approx(EXPECTED, abs=1e-12)  # rounding of a dozen additions
    assert tuple(metrics) == METRICS


def test_results_are_plain_floats():
    import numpy as np

    rows = [[np.float64(value) for value in row] for row in MATRIX]
    metrics, _ = compute_metrics(rows, independent=INDEPENDENT, test_sizes=SIZES)
    assert {type(value) for value in metrics.values()} == {float}


def test_a_declared_chance_level_goes_before_the_untrained_score():
    metrics, _ = compute_metrics(MATRIX, chance=[None, 0.40, None])
    # ((.30 - .40) + (.55 - .50)) / 2
    assert metrics["forward_transfer"] == pytest.approx(-0.025, abs=1e-12)
    # (9/13 + (.50 - .40)/(.80 - .40)) / 2
    assert metrics["retained_learning"] == pytest.approx((9 / 13 + 0.25) / 2, abs=1e-12)


def test_declared_chance_levels_make_row_zero_unnecessary():
    metrics, undefined = compute_metrics(
        with_none((0, 1), (0, 2), (0, 3)), chance=[0.25, 0.20, 0.50]
    )
    assert metrics["forward_transfer"] == pytest.approx(0.075, abs=1e-12)
    assert metrics["retained_learning"] == pytest.approx(31 / 52, abs=1e-12)
    assert set(undefined) == {
        "average_accuracy_micro",
        "average_anytime_accuracy_micro",
        "intransigence",
    }


def test_forgetting_looks_back_to_the_best_score_but_not_at_the_end():
    # Task 1 is at its best at the very end: 0.5 → 0.6 → 0.9. The maximum before the end is 0.6.
    matrix = [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.6, 0.7, 0.0], [0.9, 0.7, 0.8]]
    metrics, _ = compute_metrics(matrix)
    assert metrics["forgetting"] == pytest.approx(-0.15, abs=1e-12)  # ((.6 - .9) + 0) / 2
    assert metrics["backward_transfer"] == pytest.approx(0.2, abs=1e-12)  # ((.9 - .5) + 0) / 2


EVERYTHING_FROM_SEEN = {"average_anytime_accuracy", "average_anytime_accuracy_micro"}
FROM_AN_EARLY_DIAGONAL = EVERYTHING_FROM_SEEN | {
    "learning_accuracy",
    "backward_transfer",
    "forgetting",
    "intransigence",
    "retained_learning",
}
FROM_AN_EARLY_FINAL = EVERYTHING_FROM_SEEN | {
    "average_accuracy",
    "average_accuracy_micro",
    "backward_transfer",
    "forgetting",
    "retained_learning",
}


@pytest.mark.parametrize(
    ("place", "lost"),
    [
        ((0, 1), {"retained_learning"}),
        ((0, 2), {"retained_learning", "forward_transfer"}),
        ((0, 3), {"forward_transfer"}),
        ((1, 1), FROM_AN_EARLY_DIAGONAL),
        ((1, 2), {"forward_transfer"}),
        ((1, 3), set()),  # two tasks ahead: nothing needs it
        ((2, 1), EVERYTHING_FROM_SEEN | {"forgetting"}),
        ((2, 2), FROM_AN_EARLY_DIAGONAL),
        ((2, 3), {"forward_transfer"}),
        ((3, 1), FROM_AN_EARLY_FINAL),
        ((3, 2), FROM_AN_EARLY_FINAL),
        (
            (3, 3),
            EVERYTHING_FROM_SEEN
            | {"average_accuracy", "average_accuracy_micro", "learning_accuracy", "intransigence"},
        ),
    ],
)
def test_one_missing_entry_undefines_exactly_what_needs_it(place, lost):
    t, i = place
    metrics, undefined = compute_metrics(
        with_none(place), independent=INDEPENDENT, test_sizes=SIZES
    )
    assert set(undefined) == lost
    for reason in undefined.values():
        assert f"R[{t}][{i}]" in reason
    assert metrics == pytest.approx(
        {name: value for name, value in EXPECTED.items() if name not in lost}, abs=1e-12
    )


def test_a_reason_names_all_that_is_missing_and_cuts_a_long_list():
    _, undefined = compute_metrics(with_none((1, 2), (2, 3)))
    assert undefined["forward_transfer"] == (
        "not evaluated: R[1][2], R[2][3] (R[t][i]: task i after t trained tasks)"
    )
    _, undefined = compute_metrics([[None] * 4 for _ in range(5)])
    assert undefined["average_anytime_accuracy"] == (
        "not evaluated: R[1][1], R[2][1], R[2][2], R[3][1], R[3][2], R[3][3] and 4 more "
        "(R[t][i]: task i after t trained tasks)"
    )


def test_a_matrix_of_nothing_defines_nothing():
    metrics, undefined = compute_metrics([[None] * 3 for _ in range(4)])
    assert metrics == {}
    assert set(undefined) == set(METRICS)


def test_missing_references_are_named():
    _, undefined = compute_metrics(MATRIX)
    assert "independently trained" in undefined["intransigence"]
    assert "sizes of the test sets" in undefined["average_accuracy_micro"]
    _, undefined = compute_metrics(MATRIX, independent=[0.9, None, 0.8], test_sizes=SIZES)
    assert set(undefined) == {"intransigence"}
    assert "S[2]" in undefined["intransigence"]
    assert "S[1]" not in undefined["intransigence"]


def test_one_task_has_no_transfer():
    metrics, undefined = compute_metrics([[0.5], [0.75]], independent=[0.8], test_sizes=[10])
    assert metrics == pytest.approx(
        {
            "average_accuracy": 0.75,
            "average_accuracy_micro": 0.75,
            "average_anytime_accuracy": 0.75,
            "average_anytime_accuracy_micro": 0.75,
            "learning_accuracy": 0.75,
            "intransigence": 0.05,
        },
        abs=1e-12,
    )
    assert set(undefined) == {
        "backward_transfer",
        "forgetting",
        "forward_transfer",
        "retained_learning",
    }
    assert set(undefined.values()) == {"needs at least two tasks, and there is one"}


def test_retained_learning_leaves_out_tasks_that_were_not_learned():
    # Task 1 rose from 1/2 to 17/32, by 1/32: left out. Task 2 rose from 1/4 to 3/4 and kept half.
    matrix = [[0.5, 0.25, 0], [0.53125, 0, 0], [0, 0.75, 0], [0.25, 0.5, 1]]
    metrics, _ = compute_metrics(matrix)
    assert metrics["retained_learning"] == 0.5

    matrix[2][1] = 0.25  # nor did task 2 rise
    metrics, undefined = compute_metrics(matrix)
    assert "retained_learning" not in metrics
    assert "no task before the last was learned by more than 0.05" in undefined["retained_learning"]


def test_retained_learning_of_a_task_that_fell_below_chance_is_negative():
    matrix = [[0.5, 0.5], [1.0, 0.5], [0.25, 1.0]]
    metrics, _ = compute_metrics(matrix)
    assert metrics["retained_learning"] == -0.5  # (.25 - .5) / (1 - .5)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "empty"),
        ([[]], "empty"),
        ([[0.5]], "rows"),  # row 0 is missing
        ([[0.1, 0.2], [0.1, 0.2]], "row 0 has 2 scores"),
        ([[0.1, 0.2], [0.1], [0.1, 0.2]], "row 1 has 1 scores"),
        ([[0.5], [math.nan]], r"matrix\[1\]\[0\] is nan"),
        ([[0.5], [1.01]], r"matrix\[1\]\[0\] is 1.01; scores are fractions from 0 to 1"),
        ([[-0.01], [1.0]], r"matrix\[0\]\[0\] is -0.01"),
        ([[math.inf], [1.0]], r"matrix\[0\]\[0\] is inf"),
        ([["0.5"], [1.0]], r"matrix\[0\]\[0\] is '0.5', not a number"),
        ([[True], [1.0]], r"matrix\[0\]\[0\] is True, not a number"),
    ],
)
def test_a_malformed_matrix_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(matrix)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ({"chance": [0.5]}, "chance has 1 values for 3 tasks"),
        ({"chance": [0.5, 2.0, 0.5]}, r"chance\[1\] is 2.0"),
        ({"independent": [0.5] * 4}, "independent has 4 values for 3 tasks"),
        ({"independent": [math.nan, 0.5, 0.5]}, r"independent\[0\] is nan"),
        ({"test_sizes": [1, 2]}, "test_sizes has 2 values for 3 tasks"),
        ({"test_sizes": [1, 0, 2]}, r"test_sizes\[1\] is 0"),
        ({"test_sizes": [1, 2, None]}, r"test_sizes\[2\] is None"),
        ({"test_sizes": [True, 2, 3]}, r"test_sizes\[0\] is True"),
    ],
)
def test_malformed_references_are_refused(references, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(MATRIX, **references)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 15])
def test_identities_that_hold_for_every_full_matrix(tasks):
    draw = random.Random(tasks)
    for _ in range(20):
        matrix = [[draw.random() for _ in range(tasks)] for _ in range(tasks + 1)]
        size = draw.randint(1, 1000)
        metrics, _ = compute_metrics(
            matrix,
            independent=[draw.random() for _ in range(tasks)],
            test_sizes=[size] * tasks,
        )
        # equal sizes: weighting changes nothing
        for name in ("average_accuracy", "average_anytime_accuracy"):
            assert metrics[f"{name}_micro"] == pytest.approx(metrics[name], abs=1e-12)
        if tasks == 1:
            continue
        # the last task ends where it was learned, so (T − 1) BWT = T (average − learning)
        assert (tasks - 1) * metrics["backward_transfer"] == pytest.approx(
            tasks * (metrics["average_accuracy"] - metrics["learning_accuracy"]), abs=1e-12
        )
        # the best score before the end is no worse than the one on the diagonal
        assert metrics["forgetting"] >= -metrics["backward_transfer"] - 1e-12
        if tasks == 2:  # then there is only the diagonal to look back at
            assert metrics["forgetting"] == pytest.approx(-metrics["backward_transfer"])


def test_the_input_is_left_as_it_was():
    matrix = with_none((1, 3))
    before = [list(row) for row in matrix]
    compute_metrics(matrix, chance=[None, 0.1, None])
    assert matrix == before


def test_confidence_interval_against_tables_of_student_t():
    # n = 3: mean .8, s = .1, t(.975; 2) = 4.302653
    mean, half = confidence_interval([0.7, 0.8, 0.9])
    assert mean == pytest.approx(0.8)
    assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    # n = 2: s/√n = .1, t(.975; 1) = 12.706205; at 90 %: t(.95; 1) = 6.313752
    assert confidence_interval([0.6, 0.8])[1] == pytest.approx(1.2706205, rel=1e-6)
    assert confidence_interval([0.6, 0.8], level=0.9)[1] == pytest.approx(0.6313752, rel=1e-6)


def test_confidence_interval_of_one_value_has_no_width():
    assert confidence_interval([0.5]) == (0.5, None)
    assert confidence_interval([0.5, 0.5, 0.5]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("values", "level", "message"),
    [
        ([], 0.95, "at least one"),
        ([0.1, math.nan], 0.95, "finite"),
        ([0.1], 95, "between 0 and 1"),
    ],
)
def test_confidence_interval_refuses(values, level, message):
    with pytest.raises(ValueError, match=message):
        confidence_interval(values, level)


def test_paired_difference_uses_the_seeds_that_both_have():
    a = {0: 0.9, 1: 0.7, 2: 0.5, 7: 0.0}
    b = {2: 0.3, 1: 0.6, 0: 0.6, 8: 1.0}
    # differences .3, .1, .2: mean .2, s = .1; unpaired they would overlap
    mean, half, count = paired_difference(a, b)
    assert (mean, count) == (pytest.approx(0.2), 3)
    assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert paired_difference({4: 0.5}, {4: 0.25}) == (0.25, None, 1)


def test_paired_difference_without_common_seeds_is_refused():
    with pytest.raises(ValueError, match="none in common"):
        paired_difference({0: 0.5}, {1: 0.5})
