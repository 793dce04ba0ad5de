"""What quality control drops, and why."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.evaluation.evaluator import Evaluator
from clpeft.strategies import readings
from clpeft.strategies.base import Strategy
from clpeft.strategies.quality_control import (
    QualityControl,
    QualityControlConfig,
    without_frame,
)
from tests.running import Outcome, compose_only, run_it, same_bits

OFF: dict[str, Any] = {
    "min_tokens": None,
    "max_tokens": None,
    "max_loss": None,
    "min_confidence": None,
    "label_agreement": False,
    "duplicates": False,
    "near_duplicates": None,
    "ngram": 2,
    "min_distance": None,
}

Overrides = Callable[..., list[str]]
Finished = Callable[..., Outcome]


def controlling(frame: list[int] | None = None, **settings: Any) -> QualityControl:
    """Quality control with all filters off but those given; prompts are framed by `frame`."""
    control = QualityControl(QualityControlConfig(**(OFF | settings)))
    control._shown, control._dropped = 0, torch.zeros(8, dtype=torch.int64)
    control._encoder = SimpleNamespace(bare=lambda task: frame or [])  # type: ignore[assignment]
    return control


TASK: Any = SimpleNamespace(name="a", index=0, task=SimpleNamespace(labels=()))


@pytest.mark.parametrize(
    ("tokens", "frame", "own"),
    [
        ([1, 2, 50, 51, 3, 4], [1, 2, 3, 4], [50, 51]),
        ([1, 2, 3, 4], [1, 2, 3, 4], []),
        ([1, 2, 3, 3, 4], [1, 2, 3, 4], [3]),
        ([1, 2, 2, 3, 4], [1, 2, 3, 4], [2]),
        # the frame's tokens are not counted twice: what is left of it after its beginning is "3 4"
        ([1, 2, 1, 2, 3, 4], [1, 2, 3, 4], [1, 2]),
        ([7, 8], [1, 2], [7, 8]),
        ([7, 8], [], [7, 8]),
        ([7], [7, 7, 7], []),
        ([1, 50], [1, 2, 3], [50]),  # cut off before the end
    ],
)
def test_frame_is_taken_off(tokens: list[int], frame: list[int], own: list[int]) -> None:
    assert without_frame(np.array(tokens), np.array(frame, dtype=int)).tolist() == own


def test_length_is_of_the_input_itself(bigrams: Any, examples: Any) -> None:
    # two tokens of the prompt before each, one after it, and two of the answer
    inputs = [[], [10], [10, 11], [10, 11, 12], [10, 11, 12, 13]]
    shown = [
        examples([[1, 2, *own, 3, 20, 21]], prompt_length=3 + len(own), task=0) for own in inputs
    ]
    control = controlling([1, 2, 3], min_tokens=1, max_tokens=3)

    found = control.objections(bigrams(30), TASK, concatenate_datasets(shown), None, "replay")
    assert found == {0: "too_short", 4: "too_long"}
    assert control.facts() == {"shown": 5, "too_short": 1, "too_long": 1}


def test_loss_is_per_token_of_the_answer(bigrams: Any, examples: Any) -> None:
    run = bigrams(4)
    with torch.no_grad():
        run.model.table[1] = torch.tensor([0.0, 0.0, math.log(6.0), 0.0])  # p(2 | 1) = 6/9
        run.model.table[2] = torch.tensor([0.0, math.log(2.0), 0.0, math.log(5.0)])
    # 2 after 1, then 1 after 2: −log(6/9) − log(2/9) = 0.405 + 1.504, and 3 after 2: −log(5/9) =
    # 0.588; 0.405 per token alone
    shown = examples([[3, 1, 2, 1], [3, 1, 2, 3]], prompt_length=2)
    single = examples([[3, 1, 2]], prompt_length=2)
    everything = concatenate_datasets([shown, single])

    losses = [(math.log(9 / 6) + math.log(9 / 2)) / 2, (math.log(9 / 6) + math.log(9 / 5)) / 2]
    assert losses == pytest.approx([0.955, 0.497], abs=1e-3)
    for limit, dropped in ((1.0, []), (0.9, [0]), (0.45, [0, 1]), (0.4, [0, 1, 2])):
        control = controlling(max_loss=limit)
        assert list(control.objections(run, TASK, everything, None, "replay")) == dropped


@pytest.fixture
def asked(regression: Any) -> Callable[..., Any]:
    """A run whose model gives label 1 the probability σ(x), and a task with two labels."""

    def make() -> tuple[Any, Any]:
        # token 1 stands for log 3: p(1) = 3/4; token 2 for −log 4: p(1) = 1/5
        run = regression((0.0, math.log(3.0), -math.log(4.0)), (0.0, 1.0))
        run.stream = SimpleNamespace(
            stream=SimpleNamespace(scenario="task", candidates=lambda index, seen, given: [0, 1])
        )
        task = SimpleNamespace(
            name="a", index=0, task=SimpleNamespace(labels=("no", "yes"), index=0)
        )
        return run, task

    return make


def test_confidence_by_hand(asked: Any, examples: Any) -> None:
    run, task = asked()
    shown = examples([[1], [1], [2], [2]], labels=[1, 0, 1, 0])

    probabilities, own = readings.answer_probabilities(run, task, shown)
    expected = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.8, 0.2], [0.8, 0.2]])
    torch.testing.assert_close(probabilities, expected)
    assert own.tolist() == [1, 0, 1, 0]
    for least, dropped in ((0.1, []), (0.22, [2]), (0.5, [1, 2]), (0.78, [0, 1, 2])):
        control = controlling(min_confidence=least)
        found = control.objections(run, task, shown, None, "replay")
        assert found == dict.fromkeys(dropped, "confidence")


def test_only_generated_examples_must_agree(asked: Any, examples: Any) -> None:
    run, task = asked()
    shown = examples([[1], [1], [2], [2]], labels=[1, 0, 1, 0])
    control = controlling(label_agreement=True)

    assert control.objections(run, task, shown, None, "replay") == {}
    ids = np.array([-1, -2, 7, -4])
    written = shown.remove_columns("example_id").add_column("example_id", ids)
    # the second and the third have the less likely label, and the third was not generated
    assert control.objections(run, task, written, None, "generative_replay") == {1: "label"}
    assert controlling().objections(run, task, written, None, "generative_replay") == {}


def test_model_is_not_asked_for_nothing(
    asked: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, task = asked()
    monkeypatch.setattr(readings, "read", None)
    control = controlling(label_agreement=True, duplicates=True, min_tokens=1)
    assert control.objections(run, task, examples([[1], [2]]), None, "replay") == {}


def test_inputs_that_are_there_already(bigrams: Any, examples: Any) -> None:
    rows = [[1, 10, 11, 20], [1, 12, 13, 20], [1, 10, 11, 21], [1, 10, 11, 20]]
    shown = examples(rows, prompt_length=3)
    control = controlling([1], duplicates=True)

    # whatever their answers
    assert control.objections(bigrams(30), TASK, shown, None, "replay") == {
        2: "duplicate",
        3: "duplicate",
    }
    beside = examples([[1, 12, 13, 22]], prompt_length=3)
    found = control.objections(bigrams(30), TASK, shown, beside, "replay")
    assert found == dict.fromkeys([1, 2, 3], "duplicate")


def test_inputs_that_are_nearly_there(bigrams: Any, examples: Any) -> None:
    # pairs of the inputs themselves: {10 11, 11 12, 12 13}, {10 11, 11 12, 12 14}: 2 of 4; the
    # prompt's and the answer's would make it 5 of 7
    rows = [[1, 2, 10, 11, 12, 13, 3, 20], [1, 2, 10, 11, 12, 14, 3, 20], [1, 2, 15, 16, 3, 20]]
    parts = [examples([row], prompt_length=len(row) - 1) for row in rows]
    shown = concatenate_datasets(parts)
    run = bigrams(30)

    control = controlling([1, 2, 3], near_duplicates=0.5)
    assert control.objections(run, TASK, shown, None, "replay") == {1: "near_duplicate"}
    assert control.objections(run, TASK, shown, parts[1], "replay") == {
        0: "near_duplicate",
        1: "near_duplicate",
    }
    control = controlling([1, 2, 3], near_duplicates=0.51)
    assert control.objections(run, TASK, shown, None, "replay") == {}


def test_features_too_near(bigrams: Any, examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # each example's feature is the vector that its first token stands for
    vectors = {5: [1.0, 0.0], 6: [0.6, 0.8], 7: [0.0, 1.0]}

    def features(run: Any, dataset: Any) -> torch.Tensor:
        return torch.tensor([vectors[ids[0]] for ids in dataset["input_ids"]])

    monkeypatch.setattr(readings, "features", features)
    control = controlling(min_distance=0.3)
    shown = examples([[5], [7], [6], [5]], prompt_length=1)
    assert control.objections(bigrams(9), TASK, shown, None, "replay") == {
        2: "similar",
        3: "similar",
    }
    beside = examples([[6]], prompt_length=1)
    found = control.objections(bigrams(9), TASK, shown, beside, "replay")
    assert found == dict.fromkeys([1, 2, 3], "similar")


def test_each_example_is_dropped_for_one_reason(bigrams: Any, examples: Any) -> None:
    """What is dropped for itself is no duplicate, and makes none of others."""
    rows = [[10, 11, 12, 20], [10, 11, 12, 20], [10, 20], [10, 11, 20], [10, 11, 20]]
    parts = [examples([row], prompt_length=len(row) - 1) for row in rows]
    control = controlling(min_tokens=2, max_tokens=2, duplicates=True, near_duplicates=0.1)

    found = control.objections(bigrams(30), TASK, concatenate_datasets(parts), None, "replay")
    assert found == {0: "too_long", 1: "too_long", 2: "too_short", 4: "duplicate"}
    run: Any = None
    assert control.transform_gradients(run) == {
        "quality/too_short": 1,
        "quality/too_long": 2,
        "quality/duplicate": 1,
        "quality/near_duplicate": 0,
        "quality/dropped": 4,
    }


def test_counts_add_up_and_are_kept(bigrams: Any, examples: Any) -> None:
    control = controlling(duplicates=True)
    for _ in range(2):
        control.objections(bigrams(9), TASK, examples([[1], [1], [2]]), None, "replay")
    other = controlling(duplicates=True)
    other.load_state_dict(control.state_dict())
    other.objections(bigrams(9), TASK, examples([[1], [1]]), None, "replay")

    assert control.facts() == {"shown": 6, "duplicate": 2}
    assert other.facts() == {"shown": 8, "duplicate": 3}


def test_nothing_left_is_a_warning(
    bigrams: Any, examples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="clpeft")
    control = controlling(min_tokens=2)
    control.objections(bigrams(9), TASK, examples([[1], [2, 3]]), None, "replay")
    control.objections(bigrams(9), TASK, examples([[1], [2]]), None, "replay")
    # a generator may write more, and tells of it if that does not help
    written = examples([[1]]).remove_columns("example_id").add_column("example_id", [-1])
    control.objections(bigrams(9), TASK, written, None, "generative_replay")

    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]
    assert caplog.messages == [
        "quality_control: 1 of 2 examples of 'a' may enter replay, 1 too_short",
        "quality_control: 0 of 2 examples of 'a' may enter replay, 2 too_short",
        "quality_control: 0 of 1 examples of 'a' may enter generative_replay, 1 too_short",
    ]


class Objecting(Strategy):
    """Objects to examples by their first token, and remembers which it was asked about."""

    def __init__(self, token: int, reason: str) -> None:
        super().__init__(None)
        self.token, self.reason = token, reason
        self.asked: list[Any] = []

    def objections(
        self, run: Any, task: Any, examples: Any, beside: Any, source: str
    ) -> dict[int, str]:
        self.asked.append((examples["example_id"][:], beside, source))
        first = [ids[0] for ids in examples["input_ids"]]
        return {row: self.reason for row, token in enumerate(first) if token == self.token}


def test_each_strategy_judges_what_none_before_it_objected_to(bigrams: Any, examples: Any) -> None:
    run: Any = bigrams(9)
    five, six = Objecting(5, "five"), Objecting(6, "six")
    run.strategies = [five, Strategy(None), six]
    shown = examples([[6], [5], [7], [6], [5]])

    found = run.objections("task", shown, "someone", beside="those")
    assert found == {0: "six", 1: "five", 3: "six", 4: "five"}
    assert five.asked == [([0, 1, 2, 3, 4], "those", "someone")]
    assert six.asked == [([0, 2, 3], "those", "someone")]
    assert run.admitted("task", shown, "someone")["example_id"][:] == [2]
    assert run.admitted("task", examples([[7], [8]]), "someone")["example_id"][:] == [0, 1]


# In runs.


@pytest.mark.parametrize("scenario", ["task", "class"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert", "tiny_t5"])
def test_likeliest_answers_are_those_that_are_scored(
    finished: Finished, model: str, scenario: str
) -> None:
    run = finished("finetune", "stream.num_tasks=2", f"stream.scenario={scenario}", model=model).run
    evaluator = Evaluator(run, task_id_given=scenario == "task")
    for task in run.stream.tasks:
        probabilities, own = readings.answer_probabilities(run, task, task.test)
        assert probabilities.shape == (16, 4 if scenario == "task" else 8)
        # float32 sums of 4 or 8
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(16))
        right = (probabilities.argmax(dim=1) == own).double().mean()
        assert float(right) == evaluator.score(task, 2)
        places = {int(place) for place in own}
        assert places == {*range(4)} if scenario == "task" or task.index == 0 else {*range(4, 8)}


def test_answer_that_tasks_share_is_one_candidate(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished("finetune", "stream.num_tasks=2", "stream.scenario=class").run
    shared = run.stream.answers[:4]
    monkeypatch.setattr(run, "stream", dataclasses.replace(run.stream, answers=shared * 2))
    task = run.stream.tasks[1]
    probabilities, own = readings.answer_probabilities(run, task, task.test)
    labels = torch.tensor(task.test["label"])

    assert probabilities.shape == (16, 4)
    assert own.tolist() == (labels - 4).tolist()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(16))


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert", "tiny_t5"])
def test_targets_are_counted_as_in_training(finished: Finished, model: str) -> None:
    run = finished("finetune", "stream.num_tasks=2", "stream.scenario=task", model=model).run
    task = run.stream.tasks[0]
    loader = run.loader(task.train, shuffle=False)
    expected = sum(batch.num_targets for batch in loader)
    assert int(readings.num_targets(task.train).sum()) == expected


def test_order_of_strategies_does_not_matter(
    finished: Finished, tiny: Overrides, tmp_path: Path
) -> None:
    first = finished("quality_control")
    settings = [o for o in tiny("quality_control") if "quality_control." in o]
    second = run_it(tiny("replay+quality_control", *settings), tmp_path)

    assert list(second.results["strategies"]) == ["replay", "quality_control"]
    assert same_bits(second.after, first.after)
    assert first.results["strategies"] == ["quality_control", "replay"]


def test_memory_holds_what_was_admitted(finished: Finished) -> None:
    outcome = finished("quality_control")
    facts = outcome.results["cost"]["facts"]
    seen = outcome.state(3)["strategies"]["1"]["memory"]["seen"]
    dropped = sum(n for name, n in facts[-1]["quality_control"].items() if name != "shown")

    assert facts[-1]["quality_control"]["shown"] == 96
    assert 0 < dropped < 96
    assert seen == 96 - dropped
    assert outcome.logged_steps[-1]["train/quality/near_duplicate"] > 0


@pytest.mark.parametrize("selection", ["reservoir", "herding"])
def test_empty_memory_is_told_and_trained_without(
    finished: Finished, tiny: Overrides, tmp_path: Path, selection: str
) -> None:
    more = (
        f"strategies.replay.selection={selection}",
        "strategies.quality_control.min_tokens=1000",
    )
    outcome = run_it(tiny("quality_control", *more), tmp_path)

    assert same_bits(outcome.after, finished("finetune").after)
    log = (tmp_path / "run.log").read_text()
    assert log.count("may enter replay, 32 too_short") == 3
    assert "0 of 32 examples of 'ashford' may enter replay, 32 too_short" in log
    facts = json.loads((tmp_path / "results.json").read_text())["cost"]["facts"]
    assert facts[-1]["replay"]["memory_examples"] == 0


REFUSED = {
    "alone": (["strategy=quality_control"], r"does neither; combine it with agem or .*replay\.$"),
    "beside none that keeps examples": (
        ["strategy=[ewc,quality_control]"],
        r"screens what a memory keeps or a generator writes, and strategy=\[ewc,quality_control\]",
    ),
    "no filter": (
        [
            "strategy=[replay,quality_control]",
            "strategies.quality_control.min_tokens=null",
            "strategies.quality_control.near_duplicates=null",
            "strategies.quality_control.label_agreement=false",
            "strategies.quality_control.duplicates=false",
        ],
        "All filters of quality_control are switched off",
    ),
    "bounds that exclude each other": (
        ["strategy=[replay,quality_control]", "strategies.quality_control.min_tokens=9",
         "strategies.quality_control.max_tokens=8"],
        "min_tokens=9 is more than max_tokens=8",
    ),
    "asks a model that has not learned the task": (
        ["strategy=[gdumb,quality_control]", "strategies.quality_control.min_confidence=0.5"],
        r"min_confidence judges by what the model makes of an example, but gdumb remembers",
    ),
    "a threshold that everything reaches": (
        ["strategy=[replay,quality_control]", "strategies.quality_control.near_duplicates=0"],
        "near_duplicates=0.0 is too small",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused(mistake: str) -> None:
    overrides, told = REFUSED[mistake]
    with pytest.raises(ConfigError, match=told):
        settle(compose_only(overrides))
