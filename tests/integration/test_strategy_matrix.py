"""Every registered strategy through what "done" means (trained, resumed, frozen, combined, seeded).

Driven by the one table in tests/settings.py: a new strategy adds a row there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from clpeft import experiment
from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.evidence import Verdict
from clpeft.models.objective import CausalObjective
from clpeft.registry import STRATEGIES
from clpeft.strategies.memory import Memory
from clpeft.streams import batching
from clpeft.training.run import Run
from tests.running import Outcome, compose_only, run_it, same_bits
from tests.settings import (
    SCENARIOS,
    STRATEGY_SETTINGS,
    TASK_TYPES,
    VARIED,
    base_of,
    in_turns,
    models_of,
    scenarios_of,
    side_by_side,
)

NAMES = sorted(STRATEGY_SETTINGS)
CHANGED_BY = [name for name in NAMES if STRATEGY_SETTINGS[name].trace]
COMBINABLE = [name for name in NAMES if not STRATEGIES[name].target.is_reference]


def works_with(name: str, model: str) -> bool:
    """Whether a strategy is for models of this kind."""
    return TASK_TYPES[model] in STRATEGIES[name].target.task_types


Overrides = Callable[..., list[str]]
Finished = Callable[..., Outcome]


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without the time of day."""
    return [{key: value for key, value in event.items() if key != "time"} for event in history]


def tensors(state: Any) -> list[Tensor]:
    """The tensors in a nested state."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    if isinstance(state, list):
        return [tensor for value in state for tensor in tensors(value)]
    return []


def without_generators(state: Any) -> Any:
    """A nested state without random states, which are never all zero."""
    if isinstance(state, dict):
        return {k: without_generators(v) for k, v in state.items() if k != "generator"}
    return [without_generators(v) for v in state] if isinstance(state, list) else state


def traced(outcome: Outcome, trace: str | None, task: int) -> list[float]:
    """The values that a trace has at the steps of a task; 0 where it is absent."""
    return [step.get(trace, 0.0) for step in outcome.steps(task)]


def test_every_registered_strategy_has_a_row() -> None:
    assert NAMES == [entry.name for entry in STRATEGIES]


def test_every_method_has_a_trace() -> None:
    assert set(CHANGED_BY) == set(COMBINABLE)


@pytest.mark.parametrize("name", COMBINABLE)
def test_declared_evidence_is_logged_from_the_second_task_on(finished: Finished, name: str) -> None:
    declared = {f"train/{key}" for key in STRATEGIES[name].target.evidence}

    assert STRATEGY_SETTINGS[name].trace in declared
    for task in (1, 2):
        assert all(step.keys() >= declared for step in finished(name).steps(task))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_says_that_it_does_nothing(finished: Finished, name: str) -> None:
    warnings = finished(name).results["warnings"]

    assert [w["text"] for w in warnings if w["verdict"] == Verdict.NOTHING] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "finetune"])
def test_weights_differ_from_finetune(finished: Finished, name: str) -> None:
    # one that has nothing to do alone must change what the other does
    other = STRATEGY_SETTINGS[name].beside or "finetune"
    outcome, plain = finished(name), finished(other, like=name)

    assert outcome.trainable.keys() == plain.trainable.keys()
    assert all(
        not torch.equal(outcome.trainable[parameter], plain.trainable[parameter])
        for parameter in plain.trainable
    )


@pytest.mark.parametrize("name", CHANGED_BY)
def test_trace_appears_with_the_second_task(finished: Finished, name: str) -> None:
    outcome = finished(name)

    assert len(outcome.steps(0)) == 8  # two epochs of 32 examples in batches of 8
    trace = STRATEGY_SETTINGS[name].trace
    assert traced(outcome, trace, 0) == [0.0] * 8
    # together, because a gradient may happen not to conflict during one whole task
    assert any(value != 0.0 for task in (1, 2) for value in traced(outcome, trace, task))


@pytest.mark.parametrize("name", ["ewc", "olora"])
def test_total_loss_is_the_sum_of_its_named_parts(finished: Finished, name: str) -> None:
    trace = STRATEGY_SETTINGS[name].trace
    for step in finished(name).steps(2):
        # both sums are of two doubles
        assert step["train/loss"] == step["train/loss/task"] + step[trace]
        ratio = step[trace.replace("/loss/", "/ratio/")]
        assert ratio == step[trace] / step["train/loss/task"]


def test_ewc_starts_each_task_on_its_latest_anchor(finished: Finished) -> None:
    first_of_second = finished("ewc").steps(1)[0]

    # (θ − θ*)² = 0 before the first step of task 2
    assert first_of_second["train/loss/ewc"] == 0.0
    assert all(step["train/loss/ewc"] > 0.0 for step in finished("ewc").steps(1)[1:])


def test_cumulative_trains_on_all_data_so_far(finished: Finished) -> None:
    # task t has 32 t examples: 2 epochs of 4 t batches
    assert [len(finished("cumulative").steps(task)) for task in range(3)] == [8, 16, 24]


def test_joint_trains_once_on_everything(finished: Finished) -> None:
    outcome = finished("joint")

    assert [len(outcome.steps(task)) for task in range(3)] == [0, 0, 24]
    assert outcome.results["matrix"][1:3] == [[None] * 3] * 2
    assert None not in outcome.results["matrix"][3]
    assert sorted(folder.name[0] for folder in (outcome.directory / "adapters").iterdir()) == ["3"]


def test_independent_keeps_each_task_as_it_was_learned(finished: Finished) -> None:
    outcome = finished("independent")
    matrix = outcome.results["matrix"]
    kept = {tasks: outcome.state(tasks)["strategies"]["0"]["adapters"] for tasks in (1, 2, 3)}

    assert [matrix[3][task] for task in range(3)] == [matrix[task + 1][task] for task in range(3)]
    assert sorted(kept[3]) == ["0", "1", "2"]
    for task in ("0", "1"):
        later = {str(i): tensor for i, tensor in enumerate(kept[3][task])}
        assert same_bits(later, {str(i): tensor for i, tensor in enumerate(kept[2][task])})
    # what is trained at the end is the last task's
    assert all(
        torch.equal(one, other)
        for one, other in zip(kept[3]["2"], outcome.trainable.values(), strict=True)
    )


def test_cost_counts_what_was_done(finished: Finished) -> None:
    # 3 tasks of 32 examples, two epochs in batches of 8; .45 examples replayed with each one
    # of the last two tasks, 57.6 in 16 steps
    for name, examples in (("finetune", 192), ("replay", 192 + 57), ("cumulative", 64 + 128 + 192)):
        cost = finished(name).results["cost"]
        assert cost["examples"] == examples
        assert cost["steps"] == (48 if name == "cumulative" else 24)
        parts = [cost[f"{part}_seconds"] for part in ("train", "strategy", "evaluation")]
        assert min(parts) > 0
        assert cost["total_seconds"] == pytest.approx(sum(parts))
    # eight examples' gradients one by one, after each task
    fisher, nothing = (finished(n).results["cost"]["strategy_seconds"] for n in ("ewc", "finetune"))
    assert fisher > 5 * nothing


@pytest.mark.parametrize("name", NAMES)
def test_state_after_the_first_task(finished: Finished, name: str) -> None:
    state = finished(name).state(1)["strategies"]["0"]

    if STRATEGY_SETTINGS[name].keeps_state:
        assert any(tensor.count_nonzero() > 0 for tensor in tensors(without_generators(state)))
    else:
        assert state == {}


TOGETHER = ["ewc+replay", "olora+replay", "quality_control+generative_replay"]
RESUMED = [(name, models_of(name)[0]) for name in NAMES]
RESUMED += [(name, "tiny_llama") for name in TOGETHER]
RESUMED += [
    pytest.param(name, model, marks=pytest.mark.slow)
    for name in NAMES
    for model in models_of(name)[1:]
]


@pytest.mark.parametrize(("name", "model"), RESUMED)
def test_interrupted_at_every_boundary_it_ends_in_the_same_bits(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str, model: str
) -> None:
    whole = finished(name, model=model)
    overrides = tiny(name, model=model)
    for boundary in (1, 2, 3):
        stopped = run_it(overrides, tmp_path / "run", interrupt_after=boundary)
        assert stopped.status["status"] == "preempted"
        assert not (stopped.directory / "results.json").exists()
    resumed = run_it(overrides, tmp_path / "run")

    assert resumed.status["status"] == "completed"
    assert same_bits(resumed.trainable, whole.trainable)
    assert resumed.results["matrix"] == whole.results["matrix"]
    assert resumed.results["metrics"] == whole.results["metrics"]
    assert resumed.results["undefined"] == whole.results["undefined"]
    assert resumed.results["digests"] == whole.results["digests"]
    assert resumed.results["warnings"] == whole.results["warnings"]
    assert untimed(resumed.history) == untimed(whole.history)
    for part in ("steps", "examples", "state_bytes"):
        assert resumed.results["cost"][part] == whole.results["cost"][part]
    for one, other in zip(
        sorted((resumed.directory / "adapters").glob("*/*.safetensors")),
        sorted((whole.directory / "adapters").glob("*/*.safetensors")),
        strict=True,
    ):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_stay_bit_identical(
    finished: Finished, name: str, optimizer: str
) -> None:
    # weight decay is on in every tiny run
    more = ("optimizer=sgd", "optimizer.momentum=0.9") if optimizer == "sgd" else ()
    outcome = finished(name, *more)
    frozen = outcome.before.keys() - outcome.trainable.keys()
    after = outcome.after
    moved = {p for p in frozen if not torch.equal(outcome.before[p], after[p])}

    assert outcome.run.config.optimizer.weight_decay == 0.1
    assert frozen
    assert all(after[parameter].grad is None for parameter in frozen)
    if name == "olora":
        # the weights under the adapters, which the earlier updates were merged into
        expected = {p.replace("lora_A.default", "base_layer") for p in after if "lora_A" in p}
        assert moved == expected
    else:
        assert moved == set()


def test_olora_base_moves_by_exactly_the_merged_updates(finished: Finished) -> None:
    outcome = finished("olora")
    state = outcome.state(3)["strategies"]["0"]
    r, scaling = 8, 16 / 8

    for path, rows in state["previous_a"].items():
        a, b = rows.double(), state["previous_b"][path].double()
        # the first two tasks' updates; the third is still beside the base
        merged = scaling * sum(b[:, k : k + r] @ a[k : k + r] for k in (0, r))
        weight = f"{path}.base_layer.weight"
        change = outcome.after[weight].double() - outcome.before[weight].double()
        # float32 additions onto weights of size 1 or so: 2⁻²³ each
        torch.testing.assert_close(change, merged, rtol=0, atol=1e-6)
        assert merged.abs().max() > 1e-4


def test_olora_keeps_earlier_subspaces_bit_identical(finished: Finished) -> None:
    outcome = finished("olora")
    for part, dim in (("previous_a", 0), ("previous_b", 1)):
        states = [outcome.state(tasks)["strategies"]["0"][part] for tasks in (1, 2, 3)]
        for path in states[0]:
            assert [state[path].shape[dim] for state in states] == [8, 16, 24]
            assert torch.equal(states[2][path].narrow(dim, 0, 16), states[1][path])
            assert torch.equal(states[1][path].narrow(dim, 0, 8), states[0][path])


@pytest.mark.parametrize(
    ("name", "model"), [*[(name, models_of(name)[0]) for name in NAMES], ("finetune", "tiny_bert")]
)
def test_adapter_on_disk_is_the_model_that_was_trained(
    finished: Finished, bases: Callable[[str], Path], name: str, model: str
) -> None:
    outcome = finished(name, model=model)
    run, (folder,) = outcome.run, (outcome.directory / "adapters").glob("3_*")
    auto = AutoModelForCausalLM if model == "tiny_llama" else AutoModelForSequenceClassification
    labels = {} if model == "tiny_llama" else {"num_labels": run.model.config.num_labels}
    loaded = PeftModel.from_pretrained(auto.from_pretrained(bases(model), **labels), folder)
    batch = run.loader(run.stream.tasks[0].test, shuffle=False).batch(0)
    with torch.no_grad():
        found = loaded.eval()(**batch.inputs).logits
        expected = run.model.eval()(**batch.inputs).logits

    if name == "olora":  # one product of rank 24 against three, two of them added to the base
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, expected)


BESIDE_REPLAY = [name for name in NAMES if "replay" not in side_by_side(name)]


@pytest.mark.parametrize("name", in_turns(BESIDE_REPLAY, 1))
def test_combined_with_replay(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str
) -> None:
    combined = f"{name}+replay"
    if name not in COMBINABLE:
        with pytest.raises(ConfigError, match=f"'{name}' is a reference .* so it runs alone"):
            settle(compose_only(tiny(combined)))
        return
    if reason := STRATEGIES[name].target.conflicts.get("replay"):
        with pytest.raises(ConfigError, match=f"'replay' cannot be combined: {reason}"):
            settle(compose_only(tiny(combined)))
        return
    outcome = finished(combined)

    for part in (name, "replay"):
        setting = STRATEGY_SETTINGS[part]
        trace = setting.beside_replay or setting.trace
        assert traced(outcome, trace, 0) == [0.0] * 8
        assert any(value != 0.0 for task in (1, 2) for value in traced(outcome, trace, task))
    assert not same_bits(outcome.trainable, finished(name).trainable)
    assert not same_bits(outcome.trainable, finished("replay", like=name).trainable)


@pytest.mark.parametrize("name", in_turns(NAMES, 0))
def test_seed_decides_every_bit(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str
) -> None:
    first = finished(name)
    again = run_it(tiny(name), tmp_path / "again")
    other = run_it(tiny(name, "seed=1"), tmp_path / "other")

    assert same_bits(again.after, first.after)
    assert again.results["matrix"] == first.results["matrix"]
    assert untimed(again.history) == untimed(first.history)
    assert all(
        not torch.equal(other.trainable[parameter], value)
        for parameter, value in first.trainable.items()
    )


@pytest.mark.parametrize("name", in_turns(VARIED, 0, 2))
def test_accumulated_micro_batches_make_the_step_of_one_batch(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Two micro-batches of 4 against one batch of 8, over two tasks.

    What differs for reasons of its own is held still: the loader would put other examples together,
    so it cuts the batches of 8 in two; a memory that is drawn from once per micro-batch would draw
    other examples, so it deals them out in their order, each of a micro-batch's draws for itself;
    dropout would draw other masks. SGD rather than Adam, whose division by √v blows the rounding of
    tiny gradients up.
    """
    draws = STRATEGY_SETTINGS[base_of(name)].draws
    bucketed = batching.bucketed_batches

    def halves(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
        eights = bucketed(lengths, 8, seed=seed, epoch=epoch)
        return [part for rows in eights for part in np.split(rows, 8 // batch_size)]

    def dealt(
        self: Memory, count: int, rows: Tensor | None = None, chances: Tensor | None = None
    ) -> Tensor:
        turn = vars(self).setdefault("turn", 0)
        self.turn = (turn + 1) % draws  # type: ignore[attr-defined]
        dealt = vars(self).setdefault("dealt", [0] * draws)
        start, dealt[turn] = dealt[turn], dealt[turn] + count
        among = torch.arange(len(self)) if rows is None else rows
        return among[torch.arange(start, start + count) % len(among)]

    monkeypatch.setattr(batching, "bucketed_batches", halves)
    monkeypatch.setattr(Memory, "sample", dealt)
    sgd = ("optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9", "peft.dropout=0")
    sgd += ("stream.num_tasks=2",)
    one = run_it(tiny(name, *sgd), tmp_path / "one")
    two = run_it(
        tiny(name, *sgd, "training.batch_size=4", "training.gradient_accumulation=2"),
        tmp_path / "two",
    )

    for task in range(2):
        for step, other in zip(one.steps(task), two.steps(task), strict=True):
            assert step.keys() == other.keys()
            for key in step.keys() - {"event", "time"}:
                # float32 sums in another order, carried through up to 24 steps
                assert step[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    for parameter, value in one.trainable.items():
        torch.testing.assert_close(two.trainable[parameter], value, rtol=1e-3, atol=1e-5)
        assert not torch.equal(value, one.before[parameter])


@pytest.mark.parametrize("name", in_turns(NAMES, 1))
def test_bf16_trains(finished: Finished, name: str) -> None:
    short = ("stream.num_tasks=2", "training.epochs=1")
    outcome, full = finished(name, *short, "training.precision=bf16"), finished(name, *short)
    steps, exact = outcome.logged_steps, full.logged_steps

    assert all(math.isfinite(step["train/loss"]) for step in steps)
    # bfloat16 has 8 significant bits: two digits and a half of a loss of 1 to 6
    assert steps[0]["train/loss"] == pytest.approx(exact[0]["train/loss"], rel=0.01)
    assert steps[0]["train/loss"] != exact[0]["train/loss"]
    assert all(value.dtype == torch.float32 for value in outcome.trainable.values())
    assert all(
        not torch.equal(value, full.trainable[parameter])
        for parameter, value in outcome.trainable.items()
    )


def test_bf16_holds_for_every_task(
    finished: Finished, tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, torch.dtype]] = []
    original = CausalObjective.forward

    def forward(self: CausalObjective, model: Any, batch: Any) -> Any:
        layer = model.get_base_model().model.layers[0].mlp.down_proj

        def note(module: Any, inputs: Any, output: Tensor) -> None:
            seen.append((int(batch.task_ids[0]), output.dtype))

        handle = layer.register_forward_hook(note)
        try:
            return original(self, model, batch)
        finally:
            handle.remove()

    monkeypatch.setattr(CausalObjective, "forward", forward)
    run_it(tiny("finetune", "training.precision=bf16"), tmp_path / "run")

    assert seen == [(task, torch.bfloat16) for task in range(3) for _ in range(8)]


WITHOUT_ADAPTER = [
    name for name in NAMES if STRATEGIES[name].target.peft_types in (None, frozenset({"full"}))
]


@pytest.mark.parametrize("name", in_turns(WITHOUT_ADAPTER, 2))
def test_full_fine_tuning(tiny: Overrides, tmp_path: Path, name: str) -> None:
    full = tiny(name, "stream.num_tasks=2", "training.epochs=1", peft="full")
    whole = run_it(full, tmp_path / "whole")
    run_it(full, tmp_path / "run", interrupt_after=1)
    resumed = run_it(full, tmp_path / "run")

    assert whole.trainable.keys() == whole.before.keys()
    assert whole.results["parameters"]["percent"] == 100
    moved = [p for p, value in whole.after.items() if not torch.equal(value, whole.before[p])]
    assert len(moved) == len(whole.before)
    if STRATEGY_SETTINGS[name].trace:
        assert any(traced(whole, STRATEGY_SETTINGS[name].trace, 1))
    assert not (whole.directory / "adapters").exists()
    assert same_bits(resumed.after, whole.after)
    assert resumed.results["matrix"] == whole.results["matrix"]


@pytest.mark.parametrize("name", in_turns(NAMES, 2))
def test_gradient_checkpointing_gives_the_same_bits(finished: Finished, name: str) -> None:
    # dropout, which is on, is drawn again alike when a layer is recomputed
    outcome = finished(name, "training.gradient_checkpointing=true")

    assert outcome.run.model.is_gradient_checkpointing
    assert same_bits(outcome.after, finished(name).after)
    assert outcome.results["matrix"] == finished(name).results["matrix"]


CELLS = [
    (model, scenario, name)
    for name in NAMES
    for model in models_of(name)
    for scenario in scenarios_of(name)
]
REFUSED = [
    (model, scenario, name)
    for name in NAMES
    for model in TASK_TYPES
    for scenario in SCENARIOS
    if (model, scenario, name) not in CELLS
]
# every model, scenario and strategy at least once
QUICK = {
    ("tiny_llama", "task", "ewc"),
    ("tiny_llama", "class", "replay"),
    ("tiny_llama", "class", "independent"),
    ("tiny_bert", "task", "agem"),
    ("tiny_bert", "class", "olora"),
    ("tiny_bert", "task", "lwf"),
    ("tiny_bert", "class", "cumulative"),
    ("tiny_bert", "domain", "ewc"),
    ("tiny_bert", "class", "prioritized_replay"),
    ("tiny_t5", "task", "prioritized_replay"),
    ("tiny_bert", "task", "gdumb"),
    ("tiny_t5", "task", "finetune"),
    ("tiny_t5", "class", "joint"),
    ("tiny_t5", "domain", "olora"),
}


@pytest.mark.parametrize(
    ("model", "scenario", "name"),
    [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CELLS],
)
def test_every_task_type_and_scenario(
    finished: Finished, model: str, scenario: str, name: str
) -> None:
    short = ("stream.num_tasks=2", f"stream.scenario={scenario}")
    outcome = finished(name, *short, model=model)
    results = outcome.results

    assert (results["scenario"], results["strategies"]) == (scenario, side_by_side(name))
    assert results["task_type"] == outcome.run.config.model.task_type
    for trained, row in enumerate(results["matrix"]):
        if name == "joint" and trained == 1:
            assert row == [None, None]
        else:
            assert all(score * 16 in range(17) for score in row)  # 16 test examples
    assert all(math.isfinite(step["train/loss"]) for step in outcome.logged_steps)
    if STRATEGY_SETTINGS[name].trace:
        assert outcome.logged_steps[-1].keys() >= {STRATEGY_SETTINGS[name].trace}
    assert all(
        not torch.equal(value, outcome.before[parameter])
        for parameter, value in outcome.trainable.items()
    )
    if name != "finetune":
        plain = finished(STRATEGY_SETTINGS[name].beside or "finetune", *short, model=model)
        assert not same_bits(outcome.trainable, plain.trainable)


@pytest.mark.parametrize(("model", "scenario", "name"), REFUSED)
def test_task_type_or_scenario_is_refused(
    tiny: Overrides, model: str, scenario: str, name: str
) -> None:
    overrides = tiny(name, f"stream.scenario={scenario}", model=model)
    possible = TASK_TYPES[model] in STRATEGIES[name].target.task_types
    told = f"stream.scenario={scenario}" if possible else f"model.task_type={TASK_TYPES[model]}"
    with pytest.raises(ConfigError, match=f"The strategy '{name}' .*{told}"):
        settle(compose_only(overrides))


@pytest.mark.parametrize(
    ("scenario", "labels"), [("task", [4, 4]), ("class", [4, 8]), ("domain", [4, 4])]
)
def test_labels_that_compete_decide_the_first_loss(
    tiny: Overrides, tmp_path: Path, scenario: str, labels: list[int]
) -> None:
    """A head whose logits are all 0 has the loss log K at a task's first step."""
    overrides = tiny(
        "independent", f"stream.scenario={scenario}", "stream.num_tasks=2", model="tiny_bert"
    )
    build = experiment.build_run

    def headless(*arguments: Any) -> Run:
        run = build(*arguments)
        with torch.no_grad():
            for parameter in run.model.classifier.modules_to_save.default.parameters():
                parameter.zero_()
        return run

    with mock.patch.object(experiment, "build_run", headless):
        outcome = run_it(overrides, tmp_path / "run")

    for task, count in enumerate(labels):
        # float32 log-softmax of zeros
        assert outcome.steps(task)[0]["train/loss/task"] == pytest.approx(math.log(count), rel=1e-6)
