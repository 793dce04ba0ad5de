"""Layers in turn: who trains when, what is left of the others, and beside which strategies."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.models.layers import layers_of
from clpeft.peft_methods.lisa_layerwise import (
    LayersInTurn,
    LisaLayerwiseSettings,
    apply_lisa_layerwise,
    drawn_layers,
)
from clpeft.strategies.base import Strategy
from clpeft.strategies.finetune import Finetune
from clpeft.strategies.fisher import fisher_diagonal
from clpeft.strategies.si import SI
from clpeft.training.build import build_run
from clpeft.training.loop import Loop
from clpeft.training.run import Run
from tests.running import Outcome, compose, compose_only, run_it, same_bits

LAYERS, ACTIVE, EVERY = 4, 2, 3

Overrides = Callable[..., list[str]]


@pytest.fixture(scope="session")
def deep(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with four layers, not warmed up."""
    folder = tmp_path_factory.mktemp("deep")
    config = AutoConfig.from_pretrained(bases("tiny_llama"), num_hidden_layers=LAYERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bases("tiny_llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def turns(tiny: Overrides, deep: Path) -> Overrides:
    """Overrides of a tiny run in which two of four layers train for three steps at a time."""

    def overrides(strategy: str, *more: str) -> list[str]:
        kept = [o for o in tiny(strategy) if not o.startswith(("peft.", "model.path="))]
        return [
            *kept,
            f"model.path={deep}",
            "peft=lisa_layerwise",
            f"peft.active_layers={ACTIVE}",
            f"peft.every={EVERY}",
            "stream.num_tasks=2",
            "optimizer.lr=1e-3",
            "evaluation.untrained=false",
            "evaluation.ahead=false",
            *more,
        ]

    return overrides


@pytest.fixture
def run(turns: Overrides, tmp_path: Path) -> Run:
    """A run whose companion is set up, with an optimizer."""
    _, config = compose(turns("finetune"))
    run = build_run(config, tmp_path)
    for strategy in run.acting:
        strategy.setup(run)
    run.begin(run.stream.tasks[0])
    run.optimizer = torch.optim.AdamW(run.trainable.values())
    return run


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter is in; None outside of all."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


@dataclass
class Step:
    """What a step was made with and what it left."""

    period: int
    on: set[int]  # layers that asked for gradients in the forward pass
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    stated: set[str]  # parameters with a state in the optimizer afterwards
    graded: set[str]  # those with a gradient as the optimizer saw them


def followed(overrides: list[str], directory: Path) -> tuple[Outcome, list[Step]]:
    """Runs, and watches every step from outside."""
    steps: list[Step] = []
    original = Loop._step

    def watched(self: Loop, batches: Any) -> Any:
        trainable = self.run.trainable
        before = {name: p.detach().clone() for name, p in trainable.items()}
        seen: dict[str, set[Any]] = {}
        forward, make = self.run.objective.forward, self.run.optimizer.step

        def recorded(model: Any, batch: Any) -> Any:
            if model is self.run.prepared:
                asking = [layer_of(n) for n, p in trainable.items() if p.requires_grad]
                seen["on"] = {layer for layer in asking if layer is not None}
            return forward(model, batch)

        def stepped() -> None:
            seen["graded"] = {name for name, p in trainable.items() if p.grad is not None}
            make()

        with (
            mock.patch.object(self.run.objective, "forward", recorded),
            mock.patch.object(self.run.optimizer, "step", stepped),
        ):
            period = self.run.step // EVERY
            logs = original(self, batches)
        state = self.run.optimizer.state
        steps.append(
            Step(
                period,
                seen["on"],
                before,
                {name: p.detach().clone() for name, p in trainable.items()},
                {name for name, p in trainable.items() if p in state},
                seen["graded"],
            )
        )
        return logs

    with mock.patch.object(Loop, "_step", watched):
        outcome = run_it(overrides, directory)
    return outcome, steps


# The layers, and the draw.


def sized(kind: str, auto: Any, **sizes: Any) -> Any:
    return auto.from_config(AutoConfig.for_model(kind, vocab_size=40, pad_token_id=0, **sizes))


def test_layers_are_those_that_are_stacked() -> None:
    hidden = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
    parts = {f"{p}_{w}": n for p in ("encoder", "decoder") for w, n in (("attention_heads", 4),)}
    for model, expected in (
        (
            sized("llama", AutoModelForCausalLM, num_hidden_layers=3, bos_token_id=1, **hidden),
            [f"model.layers.{i}" for i in range(3)],
        ),
        (
            sized("bert", AutoModelForSequenceClassification, num_hidden_layers=2, **hidden),
            [f"bert.encoder.layer.{i}" for i in range(2)],
        ),
        (
            sized("t5", AutoModelForSeq2SeqLM, d_model=16, d_kv=4, d_ff=16, num_layers=2),
            [*(f"encoder.block.{i}" for i in range(2)), *(f"decoder.block.{i}" for i in range(2))],
        ),
        (
            sized(
                "bart",
                AutoModelForSeq2SeqLM,
                **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, **parts},
            ),
            ["model.encoder.layers.0", "model.decoder.layers.0", "model.decoder.layers.1"],
        ),
    ):
        found = layers_of(model)
        assert [id(layer) for layer in found] == [id(model.get_submodule(p)) for p in expected]
        inside = {id(p) for layer in found for p in layer.parameters()}
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            if embedding is not None:
                assert not inside & {id(p) for p in embedding.parameters()}


def test_every_pair_of_layers_is_drawn_as_often(run: Run) -> None:
    pairs = list(combinations(range(5), 2))
    counts = Counter(
        tuple(sorted(drawn_layers(5, 2, run.generator_for(f"lisa_layerwise/{period}"))))
        for period in range(3000)
    )

    assert set(counts) == set(pairs)
    # the seed decides the draws: no chance, once it holds
    assert chisquare([counts[pair] for pair in pairs]).pvalue > 0.01


def test_seed_decides_the_draws(turns: Overrides, tmp_path: Path) -> None:
    drawn = {}
    for label, seed in (("one", 0), ("same", 0), ("other", 1)):
        run = build_run(settle(compose_only(turns("finetune", f"seed={seed}"))), tmp_path / label)
        torch.manual_seed(len(drawn))  # what else a process has drawn plays no part
        owners = [f"lisa_layerwise/{period}" for period in range(40)]
        drawn[label] = [drawn_layers(LAYERS, ACTIVE, run.generator_for(name)) for name in owners]

    assert drawn["one"] == drawn["same"]
    assert drawn["one"] != drawn["other"]


# What a step does.


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        *((strategy, "adamw") for strategy in ("finetune", "ewc+replay", "agem", "si")),
        *((strategy, "sgd") for strategy in ("finetune", "ewc")),
    ],
)
def test_only_layers_of_the_draw_move(
    turns: Overrides, tmp_path: Path, strategy: str, optimizer: str
) -> None:
    more = ["optimizer=sgd", "optimizer.momentum=0.9"] if optimizer == "sgd" else []
    outcome, steps = followed(turns(strategy, *more), tmp_path)

    assert outcome.run.config.optimizer.weight_decay == 0.1
    assert len(steps) == 16
    first = next(iter(outcome.run.trainable.values()))
    assert first.requires_grad
    for step in steps:
        generator = outcome.run.generator_for(f"lisa_layerwise/{step.period}")
        on = set(torch.randperm(LAYERS, generator=generator)[:ACTIVE].tolist())
        assert step.on == on
        training = {name for name in step.before if layer_of(name) in {None, *on}}
        moved = {n for n in step.before if not torch.equal(step.before[n], step.after[n])}
        assert moved == step.graded == step.stated == training
    # 16 steps are six periods: layers went off and came on again
    assert len({frozenset(step.on) for step in steps}) > 2


def test_a_layer_begins_anew_when_its_turn_comes_again(turns: Overrides, tmp_path: Path) -> None:
    """Adam's count of a layer's steps is that since it went on."""
    counts: list[dict[int | None, set[int]]] = []
    original = LayersInTurn.transform_batch

    def counted(self: LayersInTurn, run: Run, batch: Any) -> Any:
        found: dict[int | None, set[int]] = {}
        batch = original(self, run, batch)
        for name, parameter in run.trainable.items():
            if parameter in run.optimizer.state:
                steps = int(run.optimizer.state[parameter]["step"])
                found.setdefault(layer_of(name), set()).add(steps)
        counts.append(found)
        return batch

    with mock.patch.object(LayersInTurn, "transform_batch", counted):
        _, steps = followed(turns("finetune"), tmp_path)
    since: Counter[int | None] = Counter()
    for number, (step, found) in enumerate(zip(steps, counts, strict=True)):
        if number == 8:  # a task's optimizer is its own
            since = Counter()
        since = Counter({key: n for key, n in since.items() if key in {None, *step.on}})
        assert found == {key: {n} for key, n in since.items()}
        since.update([None, *step.on])


def test_accumulation_counts_optimizer_steps(turns: Overrides, tmp_path: Path) -> None:
    more = ("training.gradient_accumulation=2", "training.batch_size=4")
    _, steps = followed(turns("finetune", *more), tmp_path)

    assert [step.period for step in steps] == [n // EVERY for n in range(16)]
    for step in steps:
        moved = {n for n in step.before if not torch.equal(step.before[n], step.after[n])}
        assert {layer_of(name) for name in moved} == {None, *step.on}


def test_optimizer_holds_what_is_on(turns: Overrides, tmp_path: Path) -> None:
    every = "training.checkpoint.every_steps=1"
    outcome = run_it(turns("finetune", every), tmp_path)
    layers = layers_of(outcome.run.model)
    in_a_layer = sum(p.numel() for p in layers[0].parameters())
    total = sum(p.numel() for p in outcome.run.model.parameters())

    for step in range(1, 8):
        state = outcome.read(f"step-{step}-task-0")
        assert sum(value.numel() for value in state["parameters"].values()) == total
        kept = state["course"]["optimizer"]["state"].values()
        moments = sum(entry[key].numel() for entry in kept for key in ("exp_avg", "exp_avg_sq"))
        assert moments == 2 * (total - (LAYERS - ACTIVE) * in_a_layer)


class Rogue(Finetune):
    """Writes where it should not: a gradient for everything that ever trains."""

    def transform_gradients(self, run: Run) -> dict[str, float]:
        for parameter in run.trainable.values():
            parameter.grad = torch.ones_like(parameter)
        return {}


def test_gradients_that_a_strategy_makes_up_move_no_layer_that_is_off(
    turns: Overrides, tmp_path: Path
) -> None:
    with mock.patch.object(Finetune, "transform_gradients", Rogue.transform_gradients):
        _, steps = followed(turns("finetune"), tmp_path)

    for step in steps:
        moved = {n for n in step.before if not torch.equal(step.before[n], step.after[n])}
        assert {layer_of(name) for name in moved} == {None, *step.on}


def test_share_that_trains_is_logged(turns: Overrides, tmp_path: Path) -> None:
    outcome = run_it(turns("finetune"), tmp_path)
    layers = layers_of(outcome.run.model)
    in_a_layer = sum(p.numel() for p in layers[0].parameters())
    total = sum(p.numel() for p in outcome.run.model.parameters())
    expected = 1 - (LAYERS - ACTIVE) * in_a_layer / total

    for step in outcome.logged_steps:
        assert step["train/lisa_layerwise/active_share"] == pytest.approx(expected)


# What strategies see.


def test_everything_trains_in_a_runs_eyes(run: Run) -> None:
    names = [name for name, _ in run.model.named_parameters()]
    run.refresh_trainable()
    before = list(run.trainable)
    run.acting[-1].transform_batch(run, mock.Mock())
    off = {name for name, p in run.trainable.items() if not p.requires_grad}
    run.acting[-1].after_task(run, run.stream.tasks[0])
    run.refresh_trainable()

    assert before == list(run.trainable) == list(run.changed) == names
    assert len({layer_of(name) for name in off}) == LAYERS - ACTIVE
    assert all(p.requires_grad for p in run.trainable.values())


def test_gradients_on_another_batch_are_those_of_the_layers_that_are_on(run: Run) -> None:
    batch = run.loader(run.stream.tasks[0].train, shuffle=False).batch(0)
    run.model.eval()
    whole = run.gradients(batch)
    run.acting[-1].transform_batch(run, batch)
    found = run.gradients(batch)

    on = 0
    for (name, parameter), one, other in zip(run.trainable.items(), found, whole, strict=True):
        assert other.count_nonzero(), name
        if parameter.requires_grad:
            on += 1
            # kernels differ by whether a weight trains
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        else:
            assert one.shape == parameter.shape
            assert not one.any()
        assert parameter.grad is None
    assert 0 < on < len(whole)


def test_filled_gradients_of_layers_that_are_off_lead_nowhere(run: Run) -> None:
    run.acting[-1].transform_batch(run, mock.Mock())
    filled = run.filled_gradients()
    for gradient in filled:
        gradient += 1.0

    for parameter, gradient in zip(run.trainable.values(), filled, strict=True):
        assert gradient.shape == parameter.shape
        assert (parameter.grad is gradient) == parameter.requires_grad
        assert (parameter.grad is None) != parameter.requires_grad


def test_fisher_is_of_the_whole_model(run: Run) -> None:
    run.acting[-1].transform_batch(run, mock.Mock())
    run.acting[-1].after_task(run, run.stream.tasks[0])
    generator = torch.Generator().manual_seed(0)
    found = fisher_diagonal(
        run, run.stream.tasks[0].train, kind="empirical", examples=4, generator=generator
    )

    assert all(tensor.count_nonzero() for tensor in found)


def test_path_integral_stands_still_while_a_layer_is_off(turns: Overrides, tmp_path: Path) -> None:
    grown: list[set[int | None]] = []
    original = SI.after_step

    def followed_step(self: SI, run: Run) -> None:
        before = [integral.clone() for integral in self._integral]
        original(self, run)
        pairs = zip(run.trainable, before, self._integral, strict=True)
        grown.append({layer_of(n) for n, one, other in pairs if not torch.equal(one, other)})

    with mock.patch.object(SI, "after_step", followed_step):
        outcome, steps = followed(turns("si"), tmp_path)
    assert grown == [{None, *step.on} for step in steps]
    # the layers that were on in the first task have gained importance by it, and no others
    state = outcome.state(1)["strategies"]["0"]
    gained = {
        layer_of(n) for n, w in zip(outcome.trainable, state["curvature"], strict=True) if w.any()
    }
    assert gained == {None}.union(*(step.on for step in steps[:8]))


def test_a_step_left_out_at_a_tasks_end_leaves_all_layers_on(
    turns: Overrides, tmp_path: Path
) -> None:
    original = Loop._backward

    def backward(self: Loop, batches: Any) -> Any:
        logs = original(self, batches)
        if self.run.step == 7:
            logs["train/loss/task"] = torch.tensor(float("nan"))
        return logs

    seen: list[bool] = []

    def after_task(self: Strategy, run: Run, task: Any) -> None:
        seen.append(all(p.requires_grad for p in run.model.parameters()))

    with (
        mock.patch.object(Loop, "_backward", backward),
        mock.patch.object(Finetune, "after_task", after_task),
    ):
        outcome = run_it(turns("finetune", "training.on_nan=skip"), tmp_path)
    assert outcome.results["cost"]["skipped_steps"] == 1
    assert seen == [True, True]


# Going on.


@pytest.mark.parametrize(
    "strategy",
    [
        *("finetune", "ewc", "si", "agem"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mas", "replay", "gem", "lwf", "independent", "derpp", "gdumb")
        ),
    ],
)
def test_stopped_within_a_period_it_ends_in_the_same_bits(
    turns: Overrides, tmp_path: Path, strategy: str
) -> None:
    overrides = turns(strategy)
    whole = run_it(overrides, tmp_path / "whole")
    original, calls = Loop._backward, iter(range(1, 100))

    def backward(self: Loop, batches: Any) -> Any:
        if next(calls) in (5, 11):  # of periods of three: within one, in each task
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with mock.patch.object(Loop, "_backward", backward):
        for step, task in ((5, 0), (11, 1)):
            stopped = run_it(overrides, tmp_path / "run", interrupted=True)
            assert (stopped.directory / "checkpoints" / f"step-{step}-task-{task}").is_dir()
    resumed = run_it(overrides, tmp_path / "run")

    assert resumed.status["status"] == "completed"
    assert same_bits(resumed.after, whole.after)
    assert resumed.results["matrix"] == whole.results["matrix"]
    histories = [
        [{k: v for k, v in event.items() if k != "time"} for event in outcome.history]
        for outcome in (resumed, whole)
    ]
    assert histories[0] == histories[1]


def test_checkpoint_is_the_whole_model_and_no_adapter_is_written(
    turns: Overrides, tmp_path: Path
) -> None:
    outcome = run_it(turns("finetune"), tmp_path)
    saved = outcome.state(2)["parameters"]

    assert same_bits(saved, outcome.after)
    assert not (outcome.directory / "adapters").exists()
    assert outcome.results["peft"] == "lisa_layerwise"


@pytest.mark.parametrize(
    ("model", "rate", "below"),
    [
        ("tiny_llama", "3e-3", 0.1),
        pytest.param("tiny_t5", "3e-3", 0.3, marks=pytest.mark.slow),
        # a coin is tossed between the two labels left of four: ln 2 is 0.69
        pytest.param("tiny_bert", "1e-3", 0.8, marks=pytest.mark.slow),
    ],
)
def test_it_learns(tiny: Overrides, tmp_path: Path, model: str, rate: str, below: float) -> None:
    kept = [o for o in tiny("finetune", model=model) if not o.startswith("peft.")]
    more = ["peft=lisa_layerwise", "peft.active_layers=1", f"peft.every={EVERY}"]
    sizes = ["stream.num_tasks=1", "stream.train_size=256", "training.epochs=6"]
    overrides = [*kept, *more, *sizes, "scheduler=constant", f"optimizer.lr={rate}"]
    outcome = run_it(overrides, tmp_path)
    losses = [step["train/loss/task"] for step in outcome.steps(0)]
    before, after = (outcome.results["matrix"][row][0] for row in (0, 1))

    assert sum(losses[-8:]) / 8 < below < sum(losses[:8]) / 8
    assert after > before


# What is refused.


def test_model_without_layers() -> None:
    settings = LisaLayerwiseSettings(method="lisa_layerwise", active_layers=1, every=5)
    model: Any = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError) as refused:
        apply_lisa_layerwise(model, settings, "causal_lm", [])
    assert str(refused.value) == (
        "peft=lisa_layerwise finds no layers in Linear, which has no nn.ModuleList; use peft=full."
    )


def test_more_layers_than_there_are() -> None:
    settings = LisaLayerwiseSettings(method="lisa_layerwise", active_layers=3, every=5)
    hidden = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
    model = sized("bert", AutoModelForSequenceClassification, num_hidden_layers=2, **hidden)
    with pytest.raises(ConfigError) as refused:
        apply_lisa_layerwise(model, settings, "sequence_classification", [])
    assert str(refused.value) == (
        "peft.active_layers=3 is too large: BertForSequenceClassification has 2 layers; set it to "
        "2 or less, or train them all with peft=full."
    )


def test_quantized_base() -> None:
    with pytest.raises(ConfigError, match=r"trains the base's own weights in floating point"):
        settle(compose_only(["peft=lisa_layerwise", "quantization=nf4"]))


def test_running_fisher() -> None:
    with pytest.raises(ConfigError) as refused:
        settle(compose_only(["peft=lisa_layerwise", "strategy=rwalk"]))
    assert str(refused.value) == (
        "The strategy 'rwalk' does not work with peft=lisa_layerwise: its running Fisher needs "
        "every weight's gradient at every step, and layers that are off have none."
    )


def test_every_strategy_it_refuses_exists() -> None:
    from clpeft.registry import STRATEGIES

    assert all(name in STRATEGIES for name in LisaLayerwiseSettings.conflicts)
