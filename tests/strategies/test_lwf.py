"""LwF's term, against values worked out by hand and a second implementation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from clpeft import experiment
from clpeft.config import ConfigError
from clpeft.models.objective import ClassificationObjective
from clpeft.stopping import StopRequests
from clpeft.strategies.lwf import LwF, LwFConfig, among, distillation, old_labels
from clpeft.streams.batch import Batch, concatenate
from clpeft.streams.batching import Columns
from clpeft.tracking.base import Observer
from clpeft.training.checkpoint import Checkpoints
from clpeft.training.loop import Loop
from tests.integration.test_interruption import killed_at
from tests.running import Outcome, compose, run_it, same_bits

Fixture = Callable[..., Any]
Overrides = Callable[..., list[str]]
TEACHERS = ["cached", "live"]


def divergence(old: Sequence[float], new: Sequence[float], temperature: float = 1.0) -> float:
    """KL(softmax(old/T) ‖ softmax(new/T)) by the book, without T²."""
    p, q = (
        [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in row) for x in row]
        for row in (old, new)
    )
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# The pure functions.


def test_two_labels_by_hand() -> None:
    old, new = torch.tensor([math.log(3.0), 0.0]), torch.zeros(2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    # not the other way round, which would be ½ log(½/¾) + ½ log(½/¼)
    assert float(distillation(old, new, 1.0)) == pytest.approx(expected)
    # twice the logits at twice the temperature: the same probabilities, times 2²
    assert float(distillation(2 * old, new, 2.0)) == pytest.approx(4 * expected)


def test_each_row_of_logits_has_its_own_value() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    found = distillation(old, new, 1.7)
    for b in range(2):
        for t in range(3):
            expected = 1.7**2 * divergence(old[b, t].tolist(), new[b, t].tolist(), 1.7)
            assert float(found[b, t]) == pytest.approx(expected, rel=1e-12)
    assert distillation(old, old, 1.7).count_nonzero() == 0


def test_gradient_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    old, new = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    temperature, h = 3.0, 1e-5
    leaf = new.clone().requires_grad_()
    (found,) = torch.autograd.grad(distillation(old, leaf, temperature).sum(), [leaf])
    for index in range(new.numel()):
        bump = torch.zeros(new.numel(), dtype=torch.float64)
        bump[index] = h
        bump = bump.view_as(new)
        difference = (
            distillation(old, new + bump, temperature) - distillation(old, new - bump, temperature)
        ).sum() / (2 * h)
        # central differences: an error of h² = 1e-10
        assert float(found.flatten()[index]) == pytest.approx(float(difference), abs=1e-9)
    closed = temperature * ((new / temperature).softmax(-1) - (old / temperature).softmax(-1))
    torch.testing.assert_close(found, closed, rtol=1e-10, atol=1e-12)


def test_gradient_does_not_vanish_as_the_temperature_grows() -> None:
    """T² KL tends to half the variance of the difference of the logits."""
    old = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    new = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    expected = 0.5 * (old - new).var(unbiased=False)
    # the next order is of size 1/T
    assert float(distillation(old, new, 1e4)) == pytest.approx(float(expected), rel=1e-3)


def test_labels_that_do_not_compete_say_nothing() -> None:
    inf = math.inf
    old = torch.tensor([1.0, -inf, 2.0, -inf], dtype=torch.float64)
    new = torch.tensor([0.5, -inf, -1.0, -inf], dtype=torch.float64, requires_grad=True)
    value = distillation(old, new, 2.0)
    assert float(value.detach()) == pytest.approx(4 * divergence([1.0, 2.0], [0.5, -1.0], 2.0))
    (gradient,) = torch.autograd.grad(value, [new])
    assert gradient[[1, 3]].tolist() == [0.0, 0.0]
    assert gradient.isfinite().all()


def stream_of(scenario: str, sizes: Sequence[int]) -> Any:
    """As much of a stream as says which labels compete; tasks with so many labels each."""
    first = [sum(sizes[:k]) for k in range(len(sizes))]

    def candidates(task: int) -> list[int]:
        if scenario == "domain":
            return list(range(sizes[0]))
        own = list(range(first[task], first[task] + sizes[task]))
        return list(range(first[task] + sizes[task])) if scenario == "class" else own

    return SimpleNamespace(scenario=scenario, training_candidates=candidates)


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("task", [[0, 1, -1], [2, 3, 4]]),  # one softmax per earlier task
        ("class", [[0, 1, 2, 3, 4]]),  # one over all of them, none of the current task's
        ("domain", [[0, 1]]),
    ],
)
def test_old_labels(scenario: str, expected: list[list[int]]) -> None:
    found = old_labels(stream_of(scenario, [2, 3, 2]), 2)
    assert found.tolist() == expected


def test_logits_among_labels() -> None:
    logits = torch.tensor([[10.0, 11.0, 12.0, 13.0]])
    found = among(logits, torch.tensor([[2, -1], [3, 0]]))
    assert found.tolist() == [[[12.0, -math.inf], [13.0, 10.0]]]


# The strategy, on models small enough for paper.


class Lesson:
    """A strategy in the task that follows: its teacher has one set of weights, the model another.

    Args:
        run: A run of a model with one parameter.
        examples: Of the task being learned.
        old: The weights after the task before.
        new: The weights now.
        tasks: Index of the current task, and so how many were learned.
        settings: Of LwF.
    """

    def __init__(
        self,
        run: Any,
        examples: Any,
        old: Tensor,
        new: Tensor,
        *,
        stream: Any = None,
        tasks: int = 1,
        **settings: Any,
    ) -> None:
        values = {"lambda_": 1.0, "temperature": 1.0, "teacher": "live", "cache_gib": 1.0}
        self.run, self.columns = run, Columns(examples)
        run.task = SimpleNamespace(index=tasks, name="second", train=examples)
        run.stream = SimpleNamespace(
            tasks=(SimpleNamespace(index=0, name="first", train=examples), run.task), stream=stream
        )
        self.strategy = LwF(LwFConfig(**{**values, **settings}))
        self.strategy.setup(run)
        (self.parameter,) = run.trainable.values()
        first: Any = SimpleNamespace(index=tasks - 1)
        assert self.strategy.train_examples(run, first, examples) is examples
        self._put(old)
        self.strategy.after_task(run, first)
        assert self.strategy.train_examples(run, run.task, examples) is examples
        self._put(new)
        if self.strategy._cache is not None:
            self.strategy._teacher = refuse  # it was asked in advance

    def _put(self, value: Tensor) -> None:
        with torch.no_grad():
            self.parameter.copy_(value)

    def batch(self, rows: Sequence[int]) -> Batch:
        return self.run.batch(self.columns, rows)

    def term(self, batch: Batch) -> Tensor:
        self.run.targets = {"task": float(batch.num_targets)}
        outputs = self.run.objective.forward(self.run.model, batch)
        (found,) = self.strategy.loss_terms(self.run, batch, outputs).values()
        return found

    def value(self, batch: Batch) -> float:
        return float(self.term(batch).detach())


def refuse(batch: Batch) -> Any:
    raise AssertionError("the teacher was asked again")


def of_task(batch: Batch, task: int) -> Batch:
    batch.task_ids.fill_(task)
    return batch


@pytest.mark.parametrize("teacher", TEACHERS)
def test_term_of_two_labels_by_hand(regression: Fixture, examples: Fixture, teacher: str) -> None:
    run = regression((0.0, 1.0, 2.0), (0.0, 0.0))
    lesson = Lesson(
        run,
        examples([[1], [2]], labels=[0, 1], task=1),
        torch.tensor([math.log(3.0), 0.0]),
        torch.zeros(2),
        stream=stream_of("domain", [2]),
        lambda_=0.7,
        temperature=2.0,
        teacher=teacher,
    )
    # inputs 1 and 2 at T = 2: logits ½ log 3 and log 3, so that the second is ¾ to ¼
    root = math.sqrt(3.0)
    p = root / (1 + root)
    first = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    second = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert lesson.value(lesson.batch([0, 1])) == pytest.approx(0.7 * 4 * (first + second) / 2)
    # in another order and in part
    assert lesson.value(lesson.batch([1])) == pytest.approx(0.7 * 4 * second)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("scenario", ["task", "class"])
def test_old_heads(regression: Fixture, examples: Fixture, scenario: str, teacher: str) -> None:
    """Two labels and three of earlier tasks, two of the current one, which are not distilled."""
    old = [0.3, -1.0, 2.0, 0.5, -0.2, 1.0, 4.0]
    new = [-0.5, 0.1, 0.2, 1.5, 1.0, -3.0, 0.0]
    run = regression((0.0, 1.0, 2.0), [0.0] * 7)
    allowed = torch.zeros(3, 7, dtype=torch.bool)
    allowed[2, 5:] = True  # the loss masks what the term is about
    run.objective = ClassificationObjective(allowed)
    lesson = Lesson(
        run,
        examples([[1], [2]], labels=[5, 6], task=2),
        torch.tensor(old),
        torch.tensor(new),
        stream=stream_of(scenario, [2, 3, 2]),
        tasks=2,
        temperature=1.5,
        teacher=teacher,
    )
    groups = [slice(0, 2), slice(2, 5)] if scenario == "task" else [slice(0, 5)]
    expected = sum(
        divergence([x * w for w in old[group]], [x * w for w in new[group]], 1.5)
        for x in (1.0, 2.0)
        for group in groups
    )
    found = lesson.term(lesson.batch([0, 1]))
    assert float(found.detach()) == pytest.approx(1.5**2 * expected / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(found, [lesson.parameter])
    assert (gradient[:5] != 0).all()
    assert gradient[5:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_labels_that_another_strategy_leaves_out_are_distilled(
    regression: Fixture, examples: Fixture, teacher: str
) -> None:
    """As ER-ACE does: a new example's loss is over new labels only, its distillation is not."""
    lesson = Lesson(
        regression((0.0, 1.0, 2.0), [0.0] * 4),
        examples([[1], [2]], labels=[2, 3], task=1),
        torch.tensor([math.log(3.0), 0.0, 5.0, 6.0]),
        torch.zeros(4),
        stream=stream_of("class", [2, 2]),
        teacher=teacher,
    )
    batch = lesson.batch([0])
    candidates = torch.tensor([[False, False, True, True]])
    # of input 1, the old labels at 3 to 1 where the student has them at 1 to 1
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = lesson.term(batch.altered(candidates=candidates))
    assert float(found.detach()) == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(found, [lesson.parameter])
    assert gradient.tolist() == pytest.approx([0.5 - 0.75, 0.5 - 0.25, 0.0, 0.0])


@pytest.mark.parametrize("teacher", TEACHERS)
def test_term_of_a_language_model_by_hand(
    bigrams: Fixture, examples: Fixture, teacher: str
) -> None:
    """The logits after a token are its row of a table; prompts and padding have none."""
    rows = ([1, 2, 0, 3], [3, 1], [2, 3, 1, 0, 1])
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(4, 4, generator=generator) for _ in range(2))
    run = bigrams(4)
    lesson = Lesson(
        run,
        examples(rows, prompt_length=1, task=1),
        old,
        new,
        temperature=2.0,
        lambda_=3.0,
        teacher=teacher,
    )
    for chosen in ([0, 1, 2], [2, 0], [1]):
        readers = [token for row in chosen for token in rows[row][:-1]]
        expected = sum(
            4 * divergence(old[token].tolist(), new[token].tolist(), 2.0) for token in readers
        )
        found = lesson.value(lesson.batch(chosen))
        # the mean over answer tokens, not over examples
        assert found == pytest.approx(3.0 * expected / len(readers), rel=1e-5)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_examples_of_other_tasks_and_rows_without_targets_have_no_term(
    regression: Fixture, examples: Fixture, teacher: str
) -> None:
    data = examples([[1], [2]], labels=[0, 1], task=1)
    lesson = Lesson(
        regression((0.0, 1.0, 2.0), (0.0, 0.0)),
        data,
        torch.tensor([1.0, 0.0]),
        torch.zeros(2),
        stream=stream_of("domain", [2]),
        teacher=teacher,
    )
    alone = lesson.value(lesson.batch([0]))
    replayed = of_task(lesson.batch([1]), 0)
    replayed.example_ids.fill_(77)  # of another task's examples, unknown here
    mixed = concatenate([lesson.batch([0]), replayed], 0)
    assert alone == pytest.approx(divergence([1.0, 0.0], [0.0, 0.0]))
    # a sum over the new ones, divided by all as the task's loss is
    assert lesson.value(mixed) == pytest.approx(alone / 2)
    empty = lesson.batch([0])
    empty.labels.fill_(-100)
    empty.counted(0, 0, 1)
    outputs = lesson.run.objective.forward(lesson.run.model, empty)
    lesson.run.targets = {"task": 1.0}
    term = lesson.strategy.loss_terms(lesson.run, empty, outputs)["lwf"]
    assert float(term.detach()) == 0.0
    (gradient,) = torch.autograd.grad(term, [lesson.parameter])
    assert gradient.tolist() == [0.0, 0.0]


def test_teacher_says_the_same_without_dropout(regression: Fixture, examples: Fixture) -> None:
    found = []
    for teacher in TEACHERS:
        run = regression((0.0, 1.0), (0.0, 0.0), dropout=0.5)
        run.model.train()
        lesson = Lesson(
            run,
            examples([[1]], labels=[0], task=1),
            torch.tensor([1.0, 0.0]),
            torch.zeros(2),  # whatever is dropped of the student, its logits are 0
            stream=stream_of("domain", [2]),
            teacher=teacher,
        )
        found += [lesson.value(lesson.batch([0])) for _ in range(8)]
        assert run.model.training
    assert found == pytest.approx([divergence([1.0, 0.0], [0.0, 0.0])] * 16)


def test_no_term_in_the_first_task(regression: Fixture, examples: Fixture) -> None:
    run = regression((0.0, 1.0), (1.0, 2.0))
    data = examples([[1]], labels=[0])
    run.task = SimpleNamespace(index=0, name="first", train=data)
    strategy = LwF(LwFConfig(lambda_=1.0, temperature=2.0, teacher="auto", cache_gib=1.0))
    strategy.setup(run)
    strategy.train_examples(run, run.task, data)
    batch = run.batch(Columns(data), [0])
    assert strategy.loss_terms(run, batch, run.objective.forward(run.model, batch)) == {}
    assert strategy.state_dict() == {"teacher": {}}


def test_only_examples_of_the_current_task_are_asked_about(
    regression: Fixture, examples: Fixture
) -> None:
    """What a strategy puts into the training set from earlier tasks may have any id."""
    from datasets import concatenate_datasets

    both = concatenate_datasets([examples([[1], [2], [1]], task=0), examples([[2], [1]], task=1)])
    lesson = Lesson(
        regression((0.0, 1.0, 2.0), (0.0, 0.0)),
        both,
        torch.tensor([1.0, 0.0]),
        torch.zeros(2),
        stream=stream_of("domain", [2]),
        teacher="cached",
    )
    assert lesson.strategy._cache is not None
    # longest first, of two of one length in their order
    assert lesson.strategy._cache.values.tolist() == [[2.0, 0.0], [1.0, 0.0]]
    found = lesson.value(lesson.batch([0, 1, 2, 3, 4]))
    expected = divergence([2.0, 0.0], [0.0, 0.0]) + divergence([1.0, 0.0], [0.0, 0.0])
    assert found == pytest.approx(expected / 5)


# Where the teacher's answers are kept.

THREE = ([1, 2, 0, 3], [3, 1], [2, 3, 1, 0, 1])  # 3 + 1 + 4 answer tokens
BYTES = 4 * 8 * 4  # of 4 logits each in float32


def lesson_of(bigrams: Fixture, examples: Fixture, steps: int | None = None, **given: Any) -> LwF:
    run = bigrams(4)
    run.config.training.max_steps = steps
    data = examples(THREE, prompt_length=1, task=1)
    return Lesson(run, data, torch.zeros(4, 4), torch.zeros(4, 4), **given).strategy


def test_cached_where_it_fits(
    bigrams: Fixture, examples: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for spare, cached in ((0, True), (-1, False)):
        caplog.clear()
        gib = (BYTES + spare) / 2**30
        strategy = lesson_of(bigrams, examples, teacher="auto", cache_gib=gib)
        assert (strategy._cache is not None) == cached
        (told,) = caplog.messages
        assert ("are cached" if cached else "more than strategies.lwf.cache_gib=") in told


def test_few_steps_are_not_worth_a_cache(bigrams: Fixture, examples: Fixture) -> None:
    # 8 examples to a batch, of which there are 3
    assert lesson_of(bigrams, examples, 1, teacher="auto")._cache is not None
    run = bigrams(4)
    run.config.training.max_steps, run.config.training.batch_size = 2, 1
    data = examples(THREE, prompt_length=1, task=1)
    zeros = torch.zeros(4, 4)
    assert Lesson(run, data, zeros, zeros, teacher="auto").strategy._cache is None
    assert Lesson(run, data, zeros, zeros, teacher="cached").strategy._cache is not None
    assert lesson_of(bigrams, examples, teacher="live")._cache is None


def test_cache_that_will_not_fit_is_refused_before_training(
    bigrams: Fixture, examples: Fixture
) -> None:
    run = bigrams(4)
    data = examples(THREE, prompt_length=1, task=1)
    run.stream = SimpleNamespace(
        tasks=tuple(SimpleNamespace(index=k, name=f"task{k}", train=data) for k in range(2))
    )
    strategy = LwF(LwFConfig(lambda_=1.0, temperature=2.0, teacher="cached", cache_gib=1e-9))
    with pytest.raises(ConfigError, match=r"needs 0.00 GiB for the task 'task1', but .* is 1e-09"):
        strategy.setup(run)
    strategy.config.cache_gib = BYTES / 2**30
    strategy.setup(run)


def test_cached_and_live_train_alike(tiny: Overrides, tmp_path: Path) -> None:
    """With dropout, which the teacher must not draw for.

    Batches that were put together otherwise round otherwise, which SGD carries on and Adam would
    blow up.
    """
    sgd = ("optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9", "stream.num_tasks=2")
    cached, live = (
        run_it(tiny("lwf", f"strategies.lwf.teacher={teacher}", *sgd), tmp_path / teacher)
        for teacher in TEACHERS
    )
    for step, other in zip(cached.steps(1), live.steps(1), strict=True):
        # float32 sums in another order
        assert step["train/loss/lwf"] == pytest.approx(other["train/loss/lwf"], rel=1e-4, abs=1e-6)
    assert cached.steps(1)[-1]["train/loss/lwf"] > 0.01
    for name, value in cached.trainable.items():
        torch.testing.assert_close(live.trainable[name], value, rtol=1e-3, atol=1e-5)


# The teacher of real runs.


def told(outcome: Outcome, model: str, base: Path, task: int, scenario: str) -> Any:
    """The model as it was saved after a task, on the base as it lies on disk."""
    if model == "tiny_bert":
        labels = 4 if scenario == "domain" else 12
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    else:
        auto = AutoModelForCausalLM if model == "tiny_llama" else AutoModelForSeq2SeqLM
        plain = auto.from_pretrained(base)
    (folder,) = (outcome.directory / "adapters").glob(f"{task}_*")
    return PeftModel.from_pretrained(plain, folder).eval()


def expected_term(
    model: str, old: Tensor, new: Tensor, batch: Batch, groups: list[slice], temperature: float
) -> float:
    """T² KL summed over targets and softmaxes, over the number of targets; token by token."""
    labels = batch.labels
    if model == "tiny_llama":
        old, new, labels = old[:, :-1], new[:, -labels.shape[1] : -1], labels[:, 1:]
        old, labels = old[:, -new.shape[1] :], labels[:, -new.shape[1] :]
    total, targets = 0.0, 0
    for index in (labels != -100).nonzero().tolist():
        targets += 1
        for group in groups:
            p = (old[tuple(index)][group].double() / temperature).softmax(-1)
            q = (new[tuple(index)][group].double() / temperature).softmax(-1)
            total += float((p * (p.log() - q.log())).sum())
    return temperature**2 * total / targets


@pytest.mark.parametrize(
    ("model", "scenario", "teacher"),
    [
        ("tiny_llama", "domain", "cached"),
        ("tiny_llama", "task", "live"),
        ("tiny_bert", "task", "cached"),
        ("tiny_bert", "class", "cached"),
        ("tiny_bert", "class", "live"),
        ("tiny_bert", "domain", "live"),
        ("tiny_t5", "domain", "cached"),
        ("tiny_t5", "class", "live"),
    ],
)
def test_teacher_is_the_adapter_of_the_task_before(
    tiny: Overrides,
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    scenario: str,
    teacher: str,
) -> None:
    """In task 3 it is the one saved after task 2: not that after task 1, and not the base."""
    seen: list[tuple[Batch, Tensor, float]] = []
    original = LwF.loss_terms

    def spying(self: LwF, run: Any, batch: Batch, outputs: Any) -> Any:
        terms = original(self, run, batch, outputs)
        if terms:
            seen.append((batch, outputs.logits.detach().clone(), float(terms["lwf"].detach())))
        return terms

    monkeypatch.setattr(LwF, "loss_terms", spying)
    outcome = run_it(
        tiny(
            "lwf",
            f"strategies.lwf.teacher={teacher}",
            "strategies.lwf.lambda_=0.7",
            "strategies.lwf.temperature=3",
            f"stream.scenario={scenario}",
            model=model,
        ),
        tmp_path,
    )
    batch, new, term = seen[-1]
    assert batch.task_ids.tolist() == [2] * 8
    assert len(seen) == 16
    groups = {
        "tiny_bert-task": [slice(0, 4), slice(4, 8)],
        "tiny_bert-class": [slice(0, 8)],
    }.get(f"{model}-{scenario}", [slice(None)])

    def expected(one: Any) -> float:
        inputs = dict(batch.inputs)
        if model == "tiny_t5":
            inputs["labels"] = batch.labels
        with torch.no_grad():
            old = one(**inputs).logits
        return 0.7 * expected_term(model, old, new, batch, groups, 3.0)

    before = told(outcome, model, bases(model), 2, scenario)
    # float32 sums in another order
    assert term == pytest.approx(expected(before), rel=1e-3, abs=1e-5)
    assert abs(term - expected(told(outcome, model, bases(model), 1, scenario))) > 0.02 * term
    with before.disable_adapter():
        assert abs(term - expected(before)) > 0.02 * term


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_live_teacher_computes_as_the_student_does(
    tiny: Overrides, tmp_path: Path, precision: str
) -> None:
    """Before the first step their weights are the same, and so is every bit that they say."""
    outcome = run_it(
        tiny(
            "lwf",
            "strategies.lwf.teacher=live",
            "peft.dropout=0",
            "stream.num_tasks=2",
            "training.epochs=1",
            f"training.precision={precision}",
        ),
        tmp_path,
    )
    terms = [step["train/loss/lwf"] for step in outcome.steps(1)]
    assert terms[0] == 0.0
    assert min(terms[1:]) > 1e-4


def test_cached_teacher_computes_in_the_students_precision(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked before the model is prepared for its steps."""
    kept: list[Tensor] = []
    original = LwF.train_examples

    def spying(self: LwF, run: Any, task: Any, examples: Any) -> Any:
        found = original(self, run, task, examples)
        kept.extend([self._cache.values] if self._cache is not None else [])
        return found

    monkeypatch.setattr(LwF, "train_examples", spying)
    short = ("stream.num_tasks=2", "training.epochs=1", "peft.dropout=0")
    outcome = run_it(tiny("lwf", "training.precision=bf16", *short), tmp_path)
    (values,) = kept
    assert torch.equal(values, values.bfloat16().float())
    terms = [step["train/loss/lwf"] for step in outcome.steps(1)]
    # the same weights in batches put together otherwise: two digits and a half, squared
    assert 0.0 <= terms[0] < 0.01 * terms[-1]


def test_live_teacher_survives_being_killed(
    finished: Fixture, tiny: Overrides, tmp_path: Path
) -> None:
    live = "strategies.lwf.teacher=live"
    whole = finished("lwf", live)
    overrides = tiny("lwf", live, "training.checkpoint.every_steps=3")
    killed_at(overrides, tmp_path / "run", 14)
    resumed = run_it(overrides, tmp_path / "run")
    assert same_bits(resumed.after, whole.after)


def test_cache_of_a_resumed_run_has_the_same_bits(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the teacher's weights, long after the model's own have moved on."""
    kept: list[Tensor] = []
    original = LwF.train_examples

    def spying(self: LwF, run: Any, task: Any, examples: Any) -> Any:
        found = original(self, run, task, examples)
        kept.extend([self._cache.values] if self._cache is not None else [])
        return found

    monkeypatch.setattr(LwF, "train_examples", spying)
    overrides = tiny("lwf", "stream.num_tasks=2", "training.checkpoint.every_steps=3")
    run_it(overrides, tmp_path / "whole")
    killed_at(overrides, tmp_path / "run", 14)
    run_it(overrides, tmp_path / "run")
    first, again = kept
    assert torch.equal(first, again)


# Portions of a step.


def opened(overrides: list[str], directory: Path) -> Loop:
    """A loop in its second task, whose weights have moved on from the first one's."""
    _, config = compose(overrides)
    run = experiment.build_run(config, directory)
    checkpoints = Checkpoints(directory, config.training.checkpoint, {})
    loop = experiment.make_loop(run, Observer(), checkpoints, StopRequests())
    for strategy in run.strategies:
        strategy.setup(run)
    for task in run.stream.tasks[:2]:
        examples = loop.open_task(task)
        if task.index == 0:
            loop.train_task(task, examples)
            for strategy in run.strategies:
                strategy.after_task(run, task)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.trainable.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return loop


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert", "tiny_t5"])
def test_unequal_micro_batches_make_the_step_of_one_batch(
    tiny: Overrides, tmp_path: Path, model: str, teacher: str
) -> None:
    overrides = tiny(
        "lwf",
        f"strategies.lwf.teacher={teacher}",
        "peft.dropout=0",
        "training.epochs=1",
        model=model,
    )
    loop = opened(overrides, tmp_path)
    run = loop.run
    run.model.eval()  # some models have dropout of their own
    new, old = (Columns(run.stream.tasks[index].train) for index in (1, 0))

    def rows(columns: Columns, *indices: int) -> Batch:
        return run.batch(columns, indices)

    def mixed(one: Batch, other: Batch) -> Batch:
        return concatenate([one, other], run.collator.pad_token_id)

    portions = {
        "one": [mixed(rows(new, *range(9)), rows(old, 0, 1, 2))],
        "several": [
            rows(new, *range(5)),
            mixed(rows(new, 5), rows(old, 0)),
            rows(old, 1, 2),
            rows(new, 6, 7, 8),
        ],
    }
    logs, gradients = {}, {}
    for name, batches in portions.items():
        logs[name] = loop._backward(batches)
        gradients[name] = [p.grad.clone() for p in run.trainable.values() if p.grad is not None]
        run.model.zero_grad()
    for key in ("train/loss/task", "train/loss/lwf"):
        # float32 sums in another order, of logits of about 1
        expected = pytest.approx(float(logs["several"][key]), rel=1e-4, abs=1e-6)
        assert float(logs["one"][key]) == expected
    assert float(logs["one"]["train/loss/lwf"]) > 1e-4
    for one, other in zip(gradients["one"], gradients["several"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
