"""DER's distances against values worked out by hand, and what its memory keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.models.objective import ClassificationObjective
from clpeft.strategies.der import DER, DERPP, DERConfig, DERPPConfig, distances, kept_logits
from clpeft.streams.batching import Columns
from clpeft.training.state import read_state, write_state
from tests.running import compose_only, run_it

Examples = Callable[..., Any]

SETTINGS: dict[str, Any] = {
    "memory_size": 20,
    "selection": "reservoir",
    "budget": "total",
    "alpha": 1.0,
    "ratio": 1.0,
    "top_k": 2,
}


def make(run: Any, **changes: Any) -> Any:
    """DER, or DER++ where beta is given, set up."""
    given = SETTINGS | changes
    der = DERPP(DERPPConfig(**given)) if "beta" in given else DER(DERConfig(**given))
    der.setup(run)
    return der


def remember(run: Any, der: DER, data: Any) -> None:
    der.after_task(run, SimpleNamespace(train=data))  # type: ignore[arg-type]


def terms(run: Any, der: DER, batches: list[Any]) -> dict[str, Tensor]:
    """The terms of a step, as the loop adds them up."""
    micro_batches = [der.transform_batch(run, batch) for batch in batches]
    run.count_targets(micro_batches)
    total: dict[str, Any] = {}
    for batch in micro_batches:
        outputs = run.objective.forward(run.model, batch)
        for name, term in der.loss_terms(run, batch, outputs).items():
            total[name] = total.get(name, 0.0) + term / len(micro_batches)
    return total


# Distances.


def test_distance_of_a_head_by_hand() -> None:
    logits = torch.tensor([[[1.0, 2.0, 4.0]], [[0.0, 0.0, 0.0]]])
    kept = torch.tensor([[[1.0, 0.0, 1.0]], [[9.0, 9.0, 9.0]]])
    ids = torch.tensor([[[0, 1, 2]]] * 2)

    found = distances(logits, torch.tensor([[7], [-100]]), kept, ids)

    # (0² + 2² + 3²)/3; nothing of an example without a target
    assert found.tolist() == pytest.approx([13 / 3, 0.0])


def test_distance_of_answers_by_hand() -> None:
    # targets at columns 1 and 3; what stands elsewhere does not count
    logits = torch.full((1, 4, 5), 99.0)
    logits[0, 1] = torch.tensor([1.0, 0.0, 3.0, 0.0, 0.0])
    logits[0, 3] = torch.tensor([0.0, 2.0, 0.0, 0.0, 5.0])
    kept = torch.tensor([[[2.0, 1.0], [4.0, 2.0], [77.0, 77.0]]])
    ids = torch.tensor([[[2, 0], [4, 1], [3, 3]]], dtype=torch.int32)

    found = distances(logits, torch.tensor([[-100, 2, -100, 0]]), kept, ids)

    # ((3 − 2)² + (1 − 1)²)/2 and ((5 − 4)² + (2 − 2)²)/2: both ½, as is their mean
    assert found.tolist() == pytest.approx([0.5])


def test_long_answer_counts_as_a_short_one() -> None:
    logits = torch.ones(2, 3, 4)
    kept, ids = torch.zeros(2, 3, 1), torch.zeros(2, 3, 1, dtype=torch.int32)

    found = distances(logits, torch.tensor([[1, -100, -100], [1, 1, 1]]), kept, ids)

    assert found.tolist() == [1.0, 1.0]


def test_largest_logits_are_kept_in_the_order_of_the_targets() -> None:
    logits = torch.tensor(
        [
            [[9.0, 9.0, 9.0], [1.0, 3.0, 2.0], [9.0, 9.0, 9.0], [6.0, 4.0, 5.0]],
            [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0], [-1.0, -3.0, -2.0], [9.0, 9.0, 9.0]],
        ]
    )
    labels = torch.tensor([[-100, 0, -100, 0], [-100, -100, 0, -100]])

    values, ids = kept_logits(logits, labels, 2)

    assert values.tolist() == [[[3.0, 2.0], [6.0, 5.0]], [[-1.0, -2.0], [0.0, 0.0]]]
    assert ids.tolist() == [[[1, 2], [0, 2]], [[0, 2], [0, 0]]]
    assert (values.dtype, ids.dtype) == (torch.float32, torch.int32)


def test_no_more_than_there_are_is_kept() -> None:
    values, ids = kept_logits(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[0]]), 50)
    assert values.tolist() == [[[3.0, 1.0]]]
    assert ids.tolist() == [[[1, 0]]]


@pytest.mark.parametrize("move", [0, 1, 5])
def test_answers_stay_aligned_however_they_are_padded(move: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 9, generator=generator)
    labels = torch.tensor([[-100, 1, 2, 3, -100, -100], [-100, -100, -100, 4, 5, -100]])
    values, ids = kept_logits(logits, labels, 3)

    # the same answers between more tokens on the left, and fewer or more on the right
    wide, shifted = (
        torch.randn(2, 6 + move, 9, generator=generator),
        torch.full((2, 6 + move), -100),
    )
    wide[:, move:], shifted[:, move:] = logits, labels
    for change in (0.0, 2.0):
        found = distances(wide + change, shifted, values, ids)
        # all differ by 2: 4
        assert found.tolist() == pytest.approx([change**2] * 2, rel=1e-6)
    cut = distances(logits[:, :5], labels[:, :5], values, ids)
    assert cut.tolist() == [0.0, 0.0]


def test_distance_is_taken_in_float32() -> None:
    logits = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    # 1.001 is 1 in bfloat16
    kept = torch.full((1, 1, 2), 1.001)

    found = distances(logits, torch.tensor([[0]]), kept, torch.tensor([[[0, 1]]]))

    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(1e-6, rel=1e-3)


# The term.


def test_term_of_a_head_and_its_gradient_by_hand(regression: Examples, examples: Examples) -> None:
    inputs, before = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.tensor([0.5, -1.0, 2.0])
    run = regression(inputs.tolist(), before.tolist())
    der = make(run, alpha=0.7, memory_size=3)
    remember(run, der, examples([[1], [2], [3]], labels=[0, 1, 2]))
    (weight,) = run.trainable.values()
    after = torch.tensor([1.0, 0.0, -1.0])
    with torch.no_grad():
        weight.copy_(after)
    new = run.batch(Columns(examples([[1]] * 3, labels=[0] * 3)), [0, 1, 2])

    term = terms(run, der, [new])["der"]
    term.backward()

    # h − z = x (w − w₀): α · mean over three examples and three logits of its square
    squares = (inputs[1:, None] * (after - before)).square()
    assert term.item() == pytest.approx(0.7 * float(squares.sum()) / 9, rel=1e-6)
    slope = 0.7 * 2 * (inputs[1:] ** 2).sum() * (after - before) / 9
    torch.testing.assert_close(weight.grad, slope, rtol=1e-6, atol=0)


def test_labels_that_do_not_compete_are_held_too(regression: Examples, examples: Examples) -> None:
    run = regression([0.0, 1.0], [0.0, 0.0, 0.0])
    der = make(run)
    remember(run, der, examples([[1]], labels=[0]))
    # a third label comes with the next task; the old example had a logit for it all the same
    run.objective = ClassificationObjective(torch.tensor([[True, True, False]]))
    (weight,) = run.trainable.values()
    with torch.no_grad():
        weight.copy_(torch.tensor([0.0, 0.0, 3.0]))
    new = run.batch(Columns(examples([[1]], labels=[0])), [0])

    assert terms(run, der, [new])["der"].item() == pytest.approx(9 / 3)


def test_term_of_a_language_model_has_the_slope_of_finite_differences(
    bigrams: Examples, examples: Examples
) -> None:
    run = bigrams(9)
    (table,) = run.trainable.values()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        table.copy_(torch.randn(9, 9, generator=generator))
    der = make(run, alpha=0.3, memory_size=2)
    remember(run, der, examples([[5, 1, 2, 3], [6, 4]], prompt_length=1))
    run.model.double()
    direction = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    new = run.batch(Columns(examples([[7, 8]] * 2, prompt_length=1)), [0, 1])

    with torch.no_grad():
        table += direction  # away from what was stored, where the slope is 0
    term = terms(run, der, [new])["der"]
    term.backward()
    ends = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            table += step * direction
            ends.append(terms(run, der, [new])["der"].item())
            table -= step * direction

    # float32 differences of numbers near 1, over 2e-2; a parabola's central difference is exact
    slope = (ends[0] - ends[1]) / 2e-2
    assert float((table.grad * direction).sum()) == pytest.approx(slope, rel=1e-3)
    assert slope > 0.1


def test_mean_is_over_examples_of_the_whole_step(bigrams: Examples, examples: Examples) -> None:
    run = bigrams(9)
    # drawn: one example with the first micro-batch, two with the second, of unequal lengths
    der = make(run, alpha=1.0, memory_size=3, ratio=1.0)
    remember(run, der, examples([[5, 1], [6, 1, 2], [7, 1, 2, 3, 4]], prompt_length=1))
    (table,) = run.trainable.values()
    with torch.no_grad():  # z = 0, so an example's distance is what its first token says
        table[5:8] = torch.tensor([1.0, 2.0, 3.0])[:, None]
    rows = iter([torch.tensor([0]), torch.tensor([2, 1])])
    der._memory.sample = lambda count, of=None: next(rows)
    columns = Columns(examples([[8, 8]] * 3, prompt_length=1))
    new = [run.batch(columns, [0]), run.batch(columns, [0, 1])]

    term = terms(run, der, new)["der"]

    # 1², 2²/2 (one of two tokens), 3²/4: a mean over three examples, not over seven tokens
    assert term.item() == pytest.approx((1 + 2 + 9 / 4) / 3, rel=1e-6)


def test_second_draw_is_trained_on_its_labels(regression: Examples, examples: Examples) -> None:
    run = regression([0.0, 1.0, 2.0], [0.0, 0.0, 0.0])
    der = make(run, beta=0.4, alpha=0.5, memory_size=2)
    remember(run, der, examples([[1], [2]], labels=[0, 2]))
    (weight,) = run.trainable.values()
    values = torch.tensor([0.3, -0.2, 1.0])
    with torch.no_grad():
        weight.copy_(values)
    new = run.batch(Columns(examples([[1]], labels=[0])), [0])
    rows = iter([torch.tensor([0]), torch.tensor([1])])
    der._memory.sample = lambda count, of=None: next(rows)

    found = terms(run, der, [new])

    assert found.keys() == {"derpp", "derpp_labels"}
    # x′ = 1 and z′ = 0; x″ = 2 with the label 2
    distance = 0.5 * float((values**2).mean())
    assert found["derpp"].item() == pytest.approx(distance, rel=1e-6)
    loss = -0.4 * float(torch.log_softmax(2 * values, 0)[2])
    assert found["derpp_labels"].item() == pytest.approx(loss, rel=1e-6)


def test_rows_without_a_share_add_nothing(bigrams: Examples, examples: Examples) -> None:
    run = bigrams(9)
    der = make(run, beta=1.0, alpha=1.0)
    remember(run, der, examples([[5, 1, 2]], prompt_length=1))
    (table,) = run.trainable.values()
    with torch.no_grad():
        table += 1.0
    new = run.batch(Columns(examples([[7, 8]], prompt_length=1)), [0])
    # the second of two processes: the one example drawn is the first one's
    run.accelerator.process_index, run.accelerator.num_processes = 1, 2
    run.summed = lambda counts: counts + np.array([1.0, 2.0, 2.0, 1.0, 1.0])  # the first one's

    found = terms(run, der, [new])

    assert {name: term.item() for name, term in found.items()} == {"derpp": 0, "derpp_labels": 0}
    # per process: half of the one example, half of its two tokens
    assert run.examples == {"derpp": 0.5, "derpp_labels": 0.5}
    assert run.targets == {"task": 1.0, "derpp": 1.0, "derpp_labels": 1.0}


# Draws and notes.


def of_part(batch: Any, name: str) -> list[int]:
    return batch.example_ids[batch.parts[name].rows].tolist()


def test_two_draws_are_independent(bigrams: Examples, examples: Examples) -> None:
    run = bigrams(30)
    der = make(run, beta=1.0)
    remember(run, der, examples([[10 + i, 1] for i in range(10)], prompt_length=1))
    new = run.batch(Columns(examples([[7, 8]], prompt_length=1)), [0])
    pairs = []
    for _ in range(400):
        mixed = der.transform_batch(run, new)
        assert len(mixed) == 3
        pairs.append((of_part(mixed, "derpp")[0], of_part(mixed, "derpp_labels")[0]))

    # the same example in both with probability 1/10: 40, with a standard deviation of 6. One draw
    # for both would give 400, and one draw shared out between them 0
    assert 16 < sum(one == other for one, other in pairs) < 64
    assert {one for one, _ in pairs} == {other for _, other in pairs} == set(range(10))


def test_stored_logits_go_with_their_rows(regression: Examples, examples: Examples) -> None:
    inputs = [float(x) for x in range(12)]
    run = regression(inputs, [1.0, -0.5])
    der = make(run, beta=1.0)
    remember(run, der, examples([[1 + i] for i in range(10)], labels=[0] * 10))
    new = run.batch(Columns(examples([[7]] * 4, labels=[0] * 4)), range(4))

    for _ in range(20):
        mixed = der.transform_batch(run, new)
        part = mixed.parts["derpp"]
        for example, logits, ids in zip(
            of_part(mixed, "derpp"), part.notes["logits"], part.notes["ids"], strict=True
        ):
            x = inputs[1 + example]
            assert dict(zip(ids[0].tolist(), logits[0].tolist(), strict=True)) == {
                0: x,
                1: -0.5 * x,
            }
    assert mixed.own_rows.tolist() == [0, 1, 2, 3]


def test_what_was_stored_stays_while_the_memory_shrinks(
    regression: Examples, examples: Examples
) -> None:
    inputs = [float(x) for x in range(40)]
    run = regression(inputs, [0.0, 0.0])
    run.objective.allowed = torch.ones(3, 2, dtype=torch.bool)
    der = make(run, memory_size=9, selection="task_balanced")
    (weight,) = run.trainable.values()
    levels = [1.0, 10.0, 100.0]
    for task, level in enumerate(levels):
        with torch.no_grad():
            weight.copy_(torch.tensor([level, -level]))
        rows = [[1 + 10 * task + i] for i in range(10)]
        remember(run, der, examples(rows, labels=[0] * 10, task=task))

    kept = der._memory.examples
    assert [kept["task_id"].count(task) for task in range(3)] == [3, 3, 3]
    for row, logits, ids in zip(
        kept, der._memory.notes["logits"], der._memory.notes["ids"], strict=True
    ):
        # what the model said after the example's own task, whatever it says now
        said = inputs[row["input_ids"][0]] * levels[row["task_id"]]
        assert dict(zip(ids[0].tolist(), logits[0].tolist(), strict=True)) == {0: said, 1: -said}


def test_notes_widen_for_longer_answers_and_go_through_the_disk(
    bigrams: Examples, examples: Examples, tmp_path: Path
) -> None:
    run = bigrams(9)
    (table,) = run.trainable.values()
    with torch.no_grad():
        table.copy_(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))
    der = make(run, top_k=3)
    answers = [[1], [2, 3, 4], [5, 6]]  # longer and then shorter ones
    for task, answer in enumerate(answers):
        data = examples([[7, 8, *answer]], prompt_length=2, task=task)
        remember(run, der, data)

    notes = der._memory.notes
    assert notes["logits"].shape == notes["ids"].shape == (3, 3, 3)
    for row, answer in enumerate(answers):
        read = [8, *answer[:-1]]  # each token is said by the one before it
        values, ids = table[read].topk(3)
        assert torch.equal(notes["logits"][row, : len(answer)], values)
        assert torch.equal(notes["ids"][row, : len(answer)].long(), ids)
        assert notes["logits"][row, len(answer) :].count_nonzero() == 0

    write_state(tmp_path / "state", der.state_dict())
    other = make(run, top_k=3)
    other.load_state_dict(read_state(tmp_path / "state"))
    for name, note in notes.items():
        assert torch.equal(other._memory.notes[name], note)
        assert other._memory.notes[name].dtype == note.dtype
    with torch.no_grad():
        table += 0.5
    new = run.batch(Columns(examples([[7, 8]] * 3, prompt_length=1)), range(3))
    one, two = (terms(run, each, [new, new])["der"].item() for each in (der, other))
    assert one == two
    assert one == pytest.approx(0.25, rel=1e-5)  # every logit is ½ off


def test_fractions_of_an_example_add_up_also_across_a_resume(
    bigrams: Examples, examples: Examples
) -> None:
    run = bigrams(30)
    der = make(run, ratio=0.125)
    remember(run, der, examples([[10 + i, 1] for i in range(10)], prompt_length=1))
    new = run.batch(Columns(examples([[7, 8]] * 4, prompt_length=1)), range(4))

    # half an example a batch of four: one with every second batch
    sizes = [len(der.transform_batch(run, new)) for _ in range(3)]
    other = make(run, ratio=0.125)
    other.load_state_dict(der.state_dict())
    sizes += [len(other.transform_batch(run, new)) for _ in range(3)]

    assert sizes == [4, 5, 4, 5, 4, 5]
    assert der.loss_terms(run, new, None) == {}  # a batch that brought none has no term


def test_without_a_memory_the_batch_is_left_alone(bigrams: Examples, examples: Examples) -> None:
    run = bigrams(30)
    der = make(run, beta=1.0)
    given = run.batch(Columns(examples([[7, 8]] * 4, prompt_length=1)), range(4))

    assert der.transform_batch(run, given) is given
    assert der.loss_terms(run, given, None) == {}


def test_logits_are_read_without_dropout(regression: Examples, examples: Examples) -> None:
    run = regression([0.0] + [1.0] * 20, [1.0, 2.0], dropout=0.5)
    run.model.train()
    der = make(run)
    remember(run, der, examples([[1 + i] for i in range(20)], labels=[0] * 20))

    assert der._memory.notes["logits"][:, 0].tolist() == [[2.0, 1.0]] * 20
    assert run.model.training


def test_derpp_beside_der_is_refused() -> None:
    with pytest.raises(ConfigError, match="derpp is der with one term more"):
        settle(compose_only(["strategy=[der,derpp]"]))


def test_derpp_has_the_values_of_der_and_its_own() -> None:
    both = settle(compose_only(["strategy=derpp"])).strategies
    der = vars(settle(compose_only(["strategy=der"])).strategies["der"])
    derpp = vars(both["derpp"])

    assert type(both["derpp"]) is DERPPConfig
    assert derpp.keys() - der.keys() == {"beta"}
    assert {key: derpp[key] for key in der} == der


def test_beside_olora_whose_adapters_come_and_go(tiny: Examples, tmp_path: Path) -> None:
    outcome = run_it(tiny("olora+derpp"), tmp_path)

    for task in (1, 2):
        for term in ("derpp", "derpp_labels", "orthogonality"):
            assert all(step[f"train/loss/{term}"] > 0 for step in outcome.steps(task))
    # each task's new adapter starts without an update: the model says what it said, but for dropout
    for task in (1, 2):
        first, *rest = (step["train/loss/derpp"] for step in outcome.steps(task))
        assert first < max(rest)
