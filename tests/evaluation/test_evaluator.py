"""Scores of tasks, with models whose answers are written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as Rows
from torch import Tensor, nn

from clpeft.evaluation import answers as module
from clpeft.evaluation.evaluator import Evaluator
from clpeft.strategies.base import Strategy
from clpeft.streams.batching import Collator
from tests.running import Outcome, run_it, same_bits


class Table(nn.Module):
    """Logits by the first token of a text."""

    def __init__(self, rows: dict[int, list[float]]) -> None:
        super().__init__()
        self.rows = rows
        self.widths: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert not self.training
        self.widths.append(input_ids.shape[1])
        logits = torch.tensor([self.rows[token] for token in input_ids[:, 0].tolist()])
        return SimpleNamespace(logits=logits)


def encoded(rows: Sequence[list[int]], labels: Sequence[int], prompt: int | None) -> Dataset:
    columns: dict[str, Any] = {
        "input_ids": rows,
        "label": labels,
        "task_id": [0] * len(rows),
        "example_id": list(range(len(rows))),
    }
    types = {"input_ids": Rows(Value("int32"))}
    types |= {name: Value("int64") for name in ("label", "task_id", "example_id")}
    if prompt is not None:
        columns["prompt_length"] = [prompt] * len(rows)
        types["prompt_length"] = Value("int32")
    return Dataset.from_dict(columns, features=Features(types))


def make_evaluator(
    model: Any,
    task_type: str,
    candidates: Any,
    *,
    answers: Sequence[tuple[int, ...]] = (),
    strategies: Sequence[Strategy] = (),
    task_id_given: bool = False,
    **settings: Any,
) -> Evaluator:
    values = {"batch_size": 2, "mode": "rank", "split": "test", "ahead": True, "max_new_tokens": 5}
    run: Any = SimpleNamespace(
        model=model,
        device=torch.device("cpu"),
        tokenizer=None,
        objective=None,
        strategies=list(strategies),
        acting=list(strategies),
        collator=Collator(task_type, 0),
        accelerator=SimpleNamespace(autocast=nullcontext),
        rank=0,
        world_size=1,
        summed=lambda numbers: numbers,
        config=SimpleNamespace(
            evaluation=SimpleNamespace(**(values | settings)),
            model=SimpleNamespace(task_type=task_type),
        ),
        stream=SimpleNamespace(
            stream=SimpleNamespace(candidates=candidates), answers=tuple(answers), tasks=()
        ),
    )
    return Evaluator(run, task_id_given)


def make_task(test: Dataset, validation: Dataset | None = None, **facts: Any) -> Any:
    values = {"labels": ("a", "b"), "answer_words": ("a", "b"), "metric": "accuracy"}
    return SimpleNamespace(
        index=0, test=test, validation=validation, task=SimpleNamespace(**(values | facts))
    )


# five texts of unlike length; the first token says which
TEXTS = [[1, 0], [2, 9, 9, 9], [3], [4, 9, 9], [5, 9, 9, 9, 9]]
LOGITS = {
    1: [3.0, 1.0, 2.0, 5.0],
    2: [0.0, 1.0, 9.0, 0.0],
    3: [2.0, 1.0, 0.0, 0.0],
    4: [0.0, 4.0, 0.0, 3.0],
    5: [1.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize(
    ("competing", "right"),
    [
        # predicted 0 1 0 1 0
        ([0, 1], [1, 1, 0, 1, 0]),
        # predicted 3 2 0 1 0
        ([0, 1, 2, 3], [0, 0, 0, 1, 0]),
        # predicted 1 1 1 1 1: every other label is out
        ([1], [0, 1, 1, 1, 1]),
    ],
)
def test_only_competing_labels_can_win(competing: list[int], right: list[int]) -> None:
    task = make_task(encoded(TEXTS, [0, 1, 1, 1, 1], None))
    evaluator = make_evaluator(Table(LOGITS), "sequence_classification", lambda *_: competing)

    assert evaluator.score(task, 1) == sum(right) / 5
    # by example, in the data set's order although batches go by length
    evaluator.run.model.eval()
    assert evaluator._scores(task, 1, lambda: None).tolist() == right
    assert evaluator.run.model.widths[:3] == [5, 3, 1]  # type: ignore[union-attr,index]


def test_what_competes_is_asked_of_the_stream() -> None:
    asked = []

    def candidates(*arguments: Any) -> list[int]:
        asked.append(arguments)
        return [0, 1]

    task = make_task(encoded(TEXTS, [0] * 5, None))
    for given in (True, False):
        make_evaluator(
            Table(LOGITS), "sequence_classification", candidates, task_id_given=given
        ).score(task, 3)

    assert asked == [(0, 3, True), (0, 3, False)]


def test_split() -> None:
    task = make_task(encoded([[1]], [3], None), encoded([[1], [1], [2], [2]], [3, 3, 2, 0], None))
    for split, score in (("test", 1.0), ("validation", 0.75)):
        evaluator = make_evaluator(
            Table(LOGITS), "sequence_classification", lambda *_: [0, 1, 2, 3], split=split
        )
        assert evaluator.score(task, 1) == score


def test_ranking_takes_the_likeliest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # labels 0 and 2 have one answer, as two tasks' labels may
    answers = [(7,), (8,), (7,), (9, 9)]
    seen: list[Any] = []

    def scorer(model: Any, tokenizer: Any) -> Any:
        def score(prompts: Any, candidates: Any) -> Tensor:
            seen.append((prompts, candidates))
            # by the prompt's first token: how likely 7, 8 and 9 9 are
            table = {1: [-1.0, -2.0, -3.0], 2: [-5.0, -4.0, -4.5], 3: [-9.0, -8.0, -0.5]}
            return torch.tensor([table[prompt[0]] for prompt in prompts])

        return score

    monkeypatch.setattr(module, "causal_scorer", scorer)
    rows = [[1, 5, 7], [2, 5, 8], [3, 5, 9], [1, 5, 7], [2, 5, 7]]
    task = make_task(encoded(rows, [0, 1, 3, 2, 2], 2))
    evaluator = make_evaluator(
        nn.Linear(1, 1), "causal_lm", lambda *_: [0, 1, 2, 3], answers=answers
    )

    # 7, 8, 9 9 and 7 are right, label 2's 7 against 8 is not
    assert evaluator._scores(task, 2, lambda: None).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert evaluator.score(task, 2) == 0.8
    # the answer is not shown
    assert {tuple(prompt) for prompts, _ in seen for prompt in prompts} == {(1, 5), (2, 5), (3, 5)}
    assert all(candidates == [(7,), (8,), (9, 9)] for _, candidates in seen)


@pytest.mark.parametrize(
    ("metric", "scores"), [("exact_match", [1.0, 0.0]), ("rougeL", [1.0, 0.8])]
)
def test_generation_is_compared_with_the_references(
    monkeypatch: pytest.MonkeyPatch, metric: str, scores: list[float]
) -> None:
    written = {1: "a dog", 2: "the cat sat"}
    limits = []

    def generate(model: Any, tokenizer: Any, prompts: Any, limit: int) -> list[str]:
        limits.append(limit)
        return [written[prompt[0]] for prompt in prompts]

    monkeypatch.setattr(module, "generate", generate)
    test: Any = encoded([[1, 5, 7], [2, 5, 5, 8]], [-1, -1], 2)
    task = make_task(test, labels=(), metric=metric)
    task.task.test = {"references": [["the dog", "a dog"], ["the cat"]]}
    evaluator = make_evaluator(nn.Linear(1, 1), "causal_lm", lambda *_: [])

    assert evaluator._scores(task, 1, lambda: None).tolist() == pytest.approx(scores)
    assert limits == [5]


def test_labels_may_be_generated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def generate(model: Any, tokenizer: Any, prompts: Any, limit: int) -> list[str]:
        limits.append(limit)
        return ["North"] * len(prompts)

    monkeypatch.setattr(module, "generate", generate)
    task = make_task(
        encoded([[1, 5, 7]] * 4, [0, 1, 0, 0], 2),
        labels=("n", "s"),
        answer_words=("north", "south"),
    )
    task.task.test = {"label": [0, 1, 0, 0]}
    evaluator = make_evaluator(
        nn.Linear(1, 1),
        "causal_lm",
        lambda *_: [0, 1],
        answers=[(7, 2), (8, 8, 2)],
        mode="generate",
    )

    assert evaluator.score(task, 1) == 0.75
    assert set(limits) == {3}  # the longest answer, its end included


def test_rows_of_the_matrix() -> None:
    for ahead, rows in (
        (True, ["abc", "ab", "abc", "abc"]),
        (False, ["abc", "a", "ab", "abc"]),
    ):
        evaluator = make_evaluator(None, "causal_lm", None, ahead=ahead)
        evaluator.run.stream.tasks = tuple("abc")  # type: ignore[misc,assignment]
        assert ["".join(evaluator.tasks_of_row(trained)) for trained in range(4)] == rows  # type: ignore[arg-type]


def test_giving_up_between_batches_leaves_the_model_as_it_was() -> None:
    left = []

    class Routing(Strategy):
        @contextmanager
        def evaluating(self, run: Any, task: Any) -> Any:
            try:
                yield
            finally:
                left.append(task)

    model = Table(LOGITS)
    evaluator = make_evaluator(
        model, "sequence_classification", lambda *_: [0, 1], strategies=[Routing(None)]
    )
    calls = iter([None, KeyboardInterrupt])

    def between() -> None:
        if error := next(calls):
            raise error

    with pytest.raises(KeyboardInterrupt):
        evaluator.score(make_task(encoded(TEXTS, [0, 1, 1, 1, 1], None)), 1, between)

    assert len(model.widths) == 2  # of three batches
    assert left == [None]
    assert model.training


@pytest.mark.parametrize("given", [True, False])
def test_strategies_route_with_the_task_only_where_it_is_given(given: bool) -> None:
    told = []

    class Routing(Strategy):
        @contextmanager
        def evaluating(self, run: Any, task: Any) -> Any:
            told.append(task)
            yield
            told.append("left")

    task = make_task(encoded([[1]], [3], None))
    make_evaluator(
        Table(LOGITS),
        "sequence_classification",
        lambda *_: [0, 3],
        strategies=[Routing(None)],
        task_id_given=given,
    ).score(task, 1)

    assert told == [task if given else None, "left"]


@pytest.mark.parametrize("mode", ["rank", "generate"])
@pytest.mark.parametrize("name", ["olora", "independent"])
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(
    finished: Callable[..., Outcome], name: str, mode: str, training: bool
) -> None:
    run = finished(name).run
    evaluator = Evaluator(run, task_id_given=True)
    evaluator.config = SimpleNamespace(**vars(evaluator.config) | {"mode": mode})  # type: ignore[assignment]
    run.model.train(training)
    before = {key: value.detach().clone() for key, value in run.model.state_dict().items()}
    random, own = torch.get_rng_state(), run.generator.get_state()

    tasks = evaluator.tasks_of_row(2)
    first, second = ([evaluator.score(task, 2) for task in tasks] for _ in range(2))

    assert first == second  # dropout is off
    assert run.model.training is training
    assert same_bits(run.model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(run.generator.get_state(), own)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    run.model.eval()


def test_how_a_run_is_evaluated_does_not_change_it(
    finished: Callable[..., Outcome], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    ranked = finished("finetune")
    more = ("evaluation.mode=generate", "evaluation.untrained=false", "evaluation.ahead=false")
    generated = run_it(tiny("finetune", *more), tmp_path / "run")

    assert same_bits(generated.after, ranked.after)
    matrix = generated.results["matrix"]
    assert [[score is None for score in row] for row in matrix] == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert generated.results["evaluation"]["mode"] == "generate"
    assert "forward_transfer" in generated.results["undefined"]
