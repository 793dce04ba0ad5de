"""Generative replay: the term by hand, and what is trained on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.strategies import generative_replay, writing
from clpeft.strategies.generative_replay import (
    GenerativeReplay,
    GenerativeReplayConfig,
    split_evenly,
    summary,
)
from clpeft.strategies.writing import Draft
from clpeft.streams.batching import Columns, share
from clpeft.streams.toy import OFFICES
from clpeft.streams.whole import Whole, parsed
from tests.running import Outcome, build_it, compose_only, run_it, same_bits

Overrides = Callable[..., list[str]]
Finished = Callable[..., Outcome]


@pytest.mark.parametrize(
    ("total", "parts", "expected"),
    [(6, 1, [6]), (6, 3, [2, 2, 2]), (8, 3, [2, 3, 3]), (1, 3, [0, 0, 1]), (0, 2, [0, 0])],
)
def test_split_evenly(total: int, parts: int, expected: list[int]) -> None:
    assert sorted(split_evenly(total, parts, torch.Generator().manual_seed(0))) == expected


def test_no_task_is_always_among_those_that_get_less() -> None:
    generator, draws = torch.Generator().manual_seed(0), 900
    sums = np.sum([split_evenly(5, 3, generator) for _ in range(draws)], axis=0)

    # each gets 2 with a chance of 2/3, else 1; binomial, standard deviation √(900 · 2/9) = 14.1
    assert sums.sum() == 5 * draws
    assert (abs(sums - 1500) < 3 * 14.2).all()


def test_summary_counts_every_draft_once() -> None:
    one = Whole(("a",), "b")
    drafts = [
        Draft(-1, "", one),
        Draft(-2, "", one, is_copy=True),
        Draft(-3, "", one, why="label", is_copy=True),
        Draft(-4, "", why="no_answer"),
        Draft(-5, "", why="no_answer"),
    ]
    assert summary(drafts, 4) == {
        "wanted": 4,
        "written": 5,
        "kept": 2,
        "copies": 1,
        "label": 1,
        "no_answer": 2,
    }


# The term, on a table of next-token logits.

LAMBDA = 0.5


@pytest.fixture
def replaying(bigrams: Any, examples: Any) -> Callable[[], tuple[Any, GenerativeReplay, Any]]:
    """A run of task 1, whose examples are also to be written whole; and the examples."""

    def make() -> tuple[Any, GenerativeReplay, Any]:
        run = bigrams(6)
        run.trainable = {"table": run.model.table}
        with torch.no_grad():
            run.model.table[1, 2] = math.log(3.0)  # p(2 | 1) = 3/8, all others 1/8
        strategy = GenerativeReplay(
            GenerativeReplayConfig(0.2, LAMBDA, 20, 1.0, 32, 10, max_new_tokens=None)
        )
        shown = examples([[3, 4, 5], [3, 1, 5], [4, 4, 5]], prompt_length=2, task=1)
        # asked by 5; 1 2 follows, 2 follows, 1 1 2 follows
        rows = [[5, 1, 2], [5, 2], [5, 1, 1, 2]]
        parts = [examples([row], prompt_length=1, task=1) for row in rows]
        whole = concatenate_datasets(parts).remove_columns("example_id")
        strategy._whole = Columns(whole.add_column("example_id", np.arange(3)))
        strategy._rows = {(1, row): row for row in range(3)}
        return run, strategy, shown

    return make


def nlls() -> list[float]:
    """By hand: of 5→1→2, of 5→2, of 5→1→1→2."""
    anything, likely, unlikely = math.log(6), math.log(8 / 3), math.log(8)
    return [anything + likely, anything, anything + unlikely + likely]


def test_term_is_the_mean_over_what_is_to_be_written(replaying: Any) -> None:
    run, strategy, shown = replaying()
    batch = strategy.transform_batch(run, run.batch(Columns(shown), np.array([0, 2])))

    assert batch.inputs["input_ids"].tolist() == [
        *([3, 4, 5, 0], [4, 4, 5, 0]),
        *([5, 1, 2, 0], [5, 1, 1, 2]),
    ]
    # everything after the request is to be predicted
    assert batch.labels[2:].tolist() == [[-100, 1, 2, -100], [-100, 1, 1, 2]]
    # the task's loss is of the examples alone, and so is their number
    assert (batch.num_targets, batch.rows, len(batch)) == (2, 2, 4)
    assert batch.own_rows.tolist() == [0, 1]
    run.count_targets([batch])
    assert run.targets == {"task": 2, "lm": 5}
    outputs = run.objective.forward(run.model, batch)
    terms = strategy.loss_terms(run, batch, outputs)
    expected = LAMBDA * (nlls()[0] + nlls()[2]) / 5
    assert {name: term.item() for name, term in terms.items()} == {"lm": pytest.approx(expected)}

    terms["lm"].backward()
    gradient = torch.zeros(6, 6)
    # λ/N Σ (softmax − one-hot) over the five predictions: twice 5→1, twice 1→2, once 1→1
    uniform, skewed = torch.full((6,), 1 / 6), torch.tensor([1, 1, 3, 1, 1, 1]) / 8
    one_hot = torch.eye(6)
    gradient[5] = 2 * (uniform - one_hot[1])
    gradient[1] = 2 * (skewed - one_hot[2]) + (skewed - one_hot[1])
    torch.testing.assert_close(run.model.table.grad, LAMBDA * gradient / 5)


def test_term_does_not_hang_on_how_a_step_is_cut(replaying: Any) -> None:
    run, strategy, shown = replaying()
    columns = Columns(shown)
    cut = [
        strategy.transform_batch(run, run.batch(columns, np.array(rows))) for rows in ([0], [1, 2])
    ]
    run.count_targets(cut)
    # the loop divides each by the number of micro-batches
    terms = [
        strategy.loss_terms(run, batch, run.objective.forward(run.model, batch))["lm"] / 2
        for batch in cut
    ]
    assert sum(terms).item() == pytest.approx(LAMBDA * sum(nlls()) / 6)


def test_rows_of_others_and_rows_that_keep_pace_are_not_written(
    replaying: Any, examples: Any
) -> None:
    run, strategy, shown = replaying()
    # another process's row, as where no row is left for this one
    idle = share(run.collator, Columns(shown), np.array([1]), rank=1, world_size=2).to("cpu")
    # a memory's example of an earlier task, with an id that this task has too
    memory = run.batch(Columns(examples([[3, 4, 5]] * 3, prompt_length=2, task=0)), np.array([2]))
    for batch in (idle, memory):
        found = strategy.transform_batch(run, batch)
        assert (len(found), found.parts["lm"].num_targets) == (1, 0)
        assert found.num_targets == batch.num_targets
        run.count_targets([found])
        outputs = run.objective.forward(run.model, found)
        (term,) = strategy.loss_terms(run, found, outputs).values()
        assert term.item() == 0.0
        term.backward()  # for the others' sake it has a graph
        assert run.model.table.grad.count_nonzero() == 0


# In runs.


def generated(outcome: Outcome, task: int) -> list[dict[str, Any]]:
    """The lines about what was written before the k-th task, from 1."""
    (path,) = (outcome.directory / "generated").glob(f"{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_left_behind_is_what_was_trained_on(finished: Finished) -> None:
    outcome = finished("generative_replay")
    assert not list((outcome.directory / "generated").glob("1_*"))
    facts = outcome.results["cost"]["facts"]
    assert facts[0] == {}  # nothing to write before the first task
    for task, earlier in ((2, ["ashford"]), (3, ["ashford", "birchford"])):
        lines = generated(outcome, task)
        told = facts[task - 1]["generative_replay"]
        kept = [line for line in lines if line["why"] is None]
        assert {line["task"] for line in lines} == {*earlier}
        # a quarter of 32 examples, shared by the earlier tasks
        counts = [sum(line["task"] == name for line in kept) for name in earlier]
        assert counts == [8 // len(earlier)] * len(earlier)
        assert (told["wanted"], told["kept"], told["written"]) == (8, 8, len(lines))
        assert told["copies"] == sum(line["is_copy"] for line in kept)
        reasons = [line["why"] for line in lines if line["why"]]
        assert {w: told[w] for w in {*reasons}} == {w: reasons.count(w) for w in {*reasons}}
        for line in kept:
            assert line["answer"] in ("north", "south", "east", "west")
            assert parsed(line["text"], 1) == Whole((line["inputs"][0],), line["answer"])
        trained = {step["train/generative_replay/examples"] for step in outcome.steps(task - 1)}
        assert trained == {8}
    assert outcome.results["cost"]["examples"] == 2 * (32 + 40 + 40)


def test_term_is_trained_from_the_first_task_on(finished: Finished) -> None:
    for task in range(3):
        assert all(step["train/loss/lm"] > 0 for step in finished("generative_replay").steps(task))
    for step in finished("generative_replay").steps(0):
        # both sums are of two doubles
        assert step["train/loss"] == step["train/loss/task"] + step["train/loss/lm"]


@pytest.mark.parametrize("scenario", ["domain", "class"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_generated_examples_are_trained_on_as_real_ones(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str, model: str
) -> None:
    """Labels, prompts, tasks and ids, and the rows in which they are to be written again."""
    overrides = tiny("generative_replay", f"stream.scenario={scenario}", model=model)
    run = build_it(overrides, tmp_path)
    (strategy,) = run.strategies
    assert isinstance(strategy, GenerativeReplay)
    desks = ["north", "south", "east", "west"]

    def told(text: str) -> str:
        """The line that a model writes for a text and a task, so that the answer is known."""
        desk = desks[len(text) % 4]
        return desk if scenario == "domain" else f"{text.split()[0]} {desk}"

    def sample(model: Any, tokenizer: Any, prompt: Any, count: int, **how: Any) -> list[list[int]]:
        office = tokenizer.decode(prompt).split(":")[0].split()[-1]
        texts = [f"{office} office got {'silk ' * (1 + k % 7)}{how['seed']}" for k in range(count)]
        lines = [f"{text}\nAnswer: {told(text)}" for text in texts]
        ids = writing.answer_tokens(tokenizer, lines)
        return [[*row, tokenizer.eos_token_id] for row in ids]

    monkeypatch.setattr(writing, "sample", sample)
    task = run.stream.tasks[2]
    run.tasks_seen = 2
    run.begin(task)
    found = strategy.train_examples(run, task, task.train)

    assert len(found) == 32 + 8
    assert found.features == task.train.features
    assert found.select(range(32)).to_list() == task.train.to_list()
    new = found.select(range(32, 40))
    assert new["task_id"][:] == [0] * 4 + [1] * 4
    assert len({*new["example_id"]}) == 8
    assert max(new["example_id"]) < 0
    decode, whole = run.tokenizer.decode, strategy._whole
    for row in new:
        index = row["task_id"]
        own = run.stream.tasks[index].task
        ids, answer = row["input_ids"], row.get("labels")
        if answer is None:
            ids, answer = ids[: row["prompt_length"]], ids[row["prompt_length"] :]
        form = run.stream.stream.prompt(own)
        prompt = decode(ids, skip_special_tokens=True).strip()
        opening, closing = form.fill("|").split("|")
        assert prompt.startswith(opening.strip())
        assert prompt.endswith(closing.strip())
        text = prompt[len(opening.strip()) : -len(closing.strip())].strip()
        label = desks.index(told(text).split()[-1]) + (4 * index if scenario == "class" else 0)
        assert row["label"] == label
        assert tuple(answer) == run.stream.answers[label]
        # and the row in which it is to be written
        place = strategy._rows[index, row["example_id"]]
        batch = run.batch(whole, [place])
        assert OFFICES[index] in decode(batch.inputs["input_ids"][0])
        target = batch.labels[0][batch.labels[0] != -100].tolist()
        assert parsed(decode(target[:-1]), 1) == Whole((text,), told(text))
    assert len(whole) == len(strategy._rows) == 40


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.2, [6, 3, 3]), (1.0, [32, 16, 16]), (0.1, [3, 2, 1])]
)
def test_ratio_is_of_the_tasks_own_examples(
    tiny: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ratio: float,
    expected: list[int],
) -> None:
    run = build_it(
        tiny("generative_replay", f"strategies.generative_replay.replay_ratio={ratio}"), tmp_path
    )
    (strategy,) = run.strategies
    asked = []

    def write(self: Any, task: Any, wanted: int, first_id: int, purpose: str) -> list[Draft]:
        asked.append(wanted)
        return []

    monkeypatch.setattr(writing.Writer, "write", write)
    for task in run.stream.tasks[1:]:
        run.begin(task)
        # what another strategy has added does not count
        more = concatenate_datasets([task.train, task.train])
        assert len(strategy.train_examples(run, task, more)) == 64
        strategy.after_task(run, task)
    assert asked == expected


def test_no_usable_example_is_a_warning(
    tiny: Overrides, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # one token is no example
    more = ("strategies.generative_replay.max_new_tokens=1", "stream.num_tasks=2")
    outcome = run_it(tiny("generative_replay", *more), tmp_path)

    told = (tmp_path / "run.log").read_text()
    assert "not one usable example of the tasks before 'birchford' was written" in told
    assert "generative_replay: 'ashford' for 'birchford': 8 wanted, 1280 written, 0 kept" in told
    assert outcome.results["cost"]["facts"][1]["generative_replay"]["kept"] == 0
    assert {step["train/generative_replay/examples"] for step in outcome.steps(1)} == {0}


def test_writing_repeats_by_seed_and_not_by_other_draws(tiny: Overrides, tmp_path: Path) -> None:
    texts = []
    for seed, draws in ((0, 0), (0, 3), (1, 0)):
        run = build_it(tiny("generative_replay", f"seed={seed}"), tmp_path / f"{seed}-{draws}")
        run.directory.mkdir()
        (strategy,) = run.strategies
        task = run.stream.tasks[1]
        run.begin(task)
        torch.rand(draws)
        torch.rand(draws, generator=run.generator)
        before = torch.get_rng_state()
        strategy.train_examples(run, task, task.train)
        assert torch.equal(torch.get_rng_state(), before)
        (path,) = (run.directory / "generated").iterdir()
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_going_on_within_a_task_writes_nothing_again(
    finished: Finished, tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has changed since; what it would write now is not what the task began with."""
    whole = finished("generative_replay")
    every = "training.checkpoint.every_steps=11"  # the third step of task 2
    saved = run_it(tiny("generative_replay", every), tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        if folder.name != "step-11-task-1":
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    (tmp_path / "results.json").unlink()
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(status | {"status": "preempted"}))
    asked: list[str] = []
    original = writing.Writer.write

    def write(self: Any, task: Any, wanted: int, first_id: int, purpose: str) -> list[Draft]:
        asked.append(purpose)
        return original(self, task, wanted, first_id, purpose)

    monkeypatch.setattr(writing.Writer, "write", write)
    resumed = run_it(tiny("generative_replay", every), tmp_path)

    # only for the third task
    assert asked == ["generative_replay/2/0", "generative_replay/2/1"]
    assert same_bits(resumed.after, whole.after)
    assert same_bits(saved.after, whole.after)
    for task in (2, 3):
        assert generated(resumed, task) == generated(whole, task)
    state = resumed.read("step-11-task-1")["strategies"]["0"]
    assert (state["task"], sorted(state["generated"])) == (1, ["0"])
    # and nothing of it is kept once the task is over
    assert resumed.read("step-18-task-2")["strategies"]["0"]["generated"] == {}


def test_rows_that_do_not_fit_are_told(
    tiny: Overrides, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = build_it(tiny("generative_replay"), tmp_path)
    (strategy,) = run.strategies
    assert isinstance(strategy, GenerativeReplay)
    task = run.stream.tasks[0]
    strategy._limit = 5
    caplog.set_level(logging.WARNING)
    strategy.train_examples(run, task, task.train)

    assert caplog.messages == [
        "generative_replay: 32 examples that task 'ashford' is trained on do not fit into 5 tokens "
        "even without their inputs, so that the model does not learn to write them"
    ]


def test_length_that_the_request_takes_up_is_refused(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generative_replay, "positions", lambda model: 7)
    with pytest.raises(ConfigError, match=r"task 'ashford' in \d+ tokens, .* within 7; set stream"):
        build_it(tiny("generative_replay"), tmp_path)


@pytest.mark.parametrize("model", ["tiny_bert", "bert_base"])
def test_encoders_are_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="'generative_replay' does not work with model\\.task"):
        settle(compose_only(["strategy=generative_replay", f"model={model}"]))


def test_fewer_examples_than_earlier_tasks_are_told(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    run = build_it(
        tiny("generative_replay", "strategies.generative_replay.replay_ratio=0.03"), tmp_path
    )
    (strategy,) = run.strategies
    asked = []

    def write(self: Any, task: Any, wanted: int, *more: Any) -> list[Draft]:
        asked.append(wanted)
        return []

    monkeypatch.setattr(writing.Writer, "write", write)
    for task in run.stream.tasks[1:]:
        run.tasks_seen = task.index
        run.begin(task)
        strategy.train_examples(run, task, task.train)

    # .03 · 32 examples are 1: enough for the second task, and one too few for the third
    assert sorted(asked[1:]) == [0, 1]
    assert asked[0] == 1
    (told,) = [line for line in caplog.messages if "fewer than" in line]
    assert "replay_ratio=0.03 asks for 1 examples before 'coleford', fewer than the 2" in told
