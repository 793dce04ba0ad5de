"""Methods that learn prompts in whole runs: they learn, are saved, loaded, and gone on with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
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
from clpeft.strategies.der import DER
from clpeft.strategies.fisher import fisher_diagonal
from clpeft.strategies.teacher import teacher_of
from clpeft.training.run import Run
from tests.integration.test_interruption import killed_at, same_run
from tests.peft_methods.learned_prompts import METHODS, overridden
from tests.running import Outcome, compose, run_it, same_bits
from tests.strategies.test_per_example import looped

Overrides = Callable[..., list[str]]

MODELS = {
    "tiny_llama": AutoModelForCausalLM,
    "tiny_bert": AutoModelForSequenceClassification,
    "tiny_t5": AutoModelForSeq2SeqLM,
}
# in CI each method with one kind of model; a soft prompt with LoRA, which is ours, with two
CHOSEN = {
    "prompt": ["tiny_bert"],
    "p_tuning:mlp": ["tiny_t5"],
    "p_tuning:lstm": ["tiny_llama"],
    "prefix": ["tiny_llama"],
    "prefix:projection": ["tiny_bert"],
    "lisa_hybrid": ["tiny_llama", "tiny_t5"],
}
PAIRS = [
    pytest.param(method, model, marks=[] if model in CHOSEN[method] else [pytest.mark.slow])
    for method in METHODS
    for model in MODELS
]
# three steps more than a checkpoint's, of eight in a task
EVERY = "training.checkpoint.every_steps=3"


@pytest.fixture(scope="module")
def trained(
    tiny: Overrides, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Outcome]:
    """A finished run of each method on each kind of model."""
    done: dict[tuple[str, str], Outcome] = {}

    def outcome(method: str, model: str) -> Outcome:
        if (method, model) not in done:
            directory = tmp_path_factory.mktemp("trained") / "run"
            overrides = overridden(tiny("finetune", EVERY, model=model), method)
            done[method, model] = run_it(overrides, directory)
        return done[method, model]

    return outcome


def some_batch(run: Run) -> Any:
    """Texts of unequal lengths."""
    batch = run.loader(run.stream.tasks[0].test, shuffle=False).batch(0)
    assert not batch.inputs["attention_mask"].all()
    return batch


@torch.no_grad()
def answers(run: Run, model: Any) -> Tensor:
    model.eval()
    batch = some_batch(run)
    return run.objective.forward(model, batch).logits


def folder(outcome: Outcome, task: int) -> Path:
    (found,) = (outcome.directory / "adapters").glob(f"{task}_*")
    return found


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_all_that_trains_moves_and_the_base_stays(
    trained: Callable[..., Outcome], method: str, model: str
) -> None:
    outcome = trained(method, model)
    run = outcome.run
    frozen = outcome.before.keys() - run.trainable.keys()

    assert same_bits(
        {name: outcome.before[name] for name in frozen},
        {name: outcome.after[name] for name in frozen},
    )
    for name, parameter in run.trainable.items():
        assert not torch.equal(parameter, outcome.before[name]), name


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_what_is_saved_answers_alike(
    trained: Callable[..., Outcome], bases: Callable[[str], Path], method: str, model: str
) -> None:
    outcome = trained(method, model)
    run, answered = outcome.run, answers(outcome.run, outcome.run.model)
    labels = {"num_labels": len(run.stream.stream.label_names)} if model == "tiny_bert" else {}

    def base() -> Any:
        return MODELS[model].from_pretrained(bases(model), **labels).eval()

    loaded = PeftModel.from_pretrained(base(), str(folder(outcome, 3)))
    # what a projection makes is made for each example there and is only read here
    torch.testing.assert_close(answers(run, loaded), answered, rtol=1e-5, atol=1e-5)

    # the first task's beside it, each by its name
    first = PeftModel.from_pretrained(base(), str(folder(outcome, 1)))
    expected = answers(run, first)
    assert (expected - answered).abs().max() > 1e-2
    loaded.load_adapter(str(folder(outcome, 1)), "first")
    for name, told in (("first", expected), ("default", answered), ("first", expected)):
        loaded.set_adapter(name)
        torch.testing.assert_close(answers(run, loaded), told, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_killed_within_a_task_it_ends_in_the_same_bits(
    trained: Callable[..., Outcome], tiny: Overrides, tmp_path: Path, method: str, model: str
) -> None:
    overrides = overridden(tiny("finetune", EVERY, model=model), method)
    killed_at(overrides, tmp_path / "run", 13)

    resumed = run_it(overrides, tmp_path / "run")
    assert resumed.status["attempt"] == 2
    same_run(resumed, trained(method, model))


@pytest.fixture
def run_of(tiny: Overrides, tmp_path: Path) -> Callable[..., Run]:
    """A run in its first task, away from the weights that it starts from."""

    def make(method: str, model: str) -> Run:
        _, config = compose(overridden(tiny("finetune", model=model), method))
        run = experiment.build_run(config, tmp_path)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in run.trainable.values():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        run.begin(run.stream.tasks[0])
        return run

    return make


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_it_learns(run_of: Callable[..., Run], method: str, model: str) -> None:
    run = run_of(method, model)
    batch = run.loader(run.stream.tasks[0].train).batch(0)
    optimizer = torch.optim.Adam(run.trainable.values(), lr=run.config.optimizer.lr)
    losses = []
    for _ in range(40):
        loss = run.mean_loss(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert losses[-1] < losses[0] - 0.1  # nats per target


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_gradients_of_single_examples(run_of: Callable[..., Run], method: str, model: str) -> None:
    run = run_of(method, model)
    # nine examples in batches of four: the last batch has one
    run.config.training.batch_size = 4
    dataset = run.stream.tasks[0].train.select(range(9))

    found = fisher_diagonal(
        run, dataset, kind="empirical", examples=9, generator=torch.Generator().manual_seed(0)
    )
    for name, one, other in zip(
        run.trainable, found, looped(run, dataset, "empirical"), strict=True
    ):
        assert other.abs().max() > 0, name
        # squares of float32 gradients, in other orders of summation
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(
    ("method", "model"), [pair for pair in PAIRS if not str(pair.values[0]).startswith("prefix")]
)
def test_gradient_checkpointing_changes_none(
    run_of: Callable[..., Run], method: str, model: str
) -> None:
    run = run_of(method, model)
    batch = run.loader(run.stream.tasks[0].train).batch(0)
    run.model.train()
    found = []
    for _ in range(2):
        torch.manual_seed(0)  # dropout's
        found.append(run.gradients(batch))
        run.model.gradient_checkpointing_enable({"use_reentrant": False})

    for name, one, other in zip(run.trainable, *found, strict=True):
        torch.testing.assert_close(one, other, msg=name)
        assert one.abs().max() > 0, name


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_a_teacher_has_its_own_prompt(run_of: Callable[..., Run], method: str, model: str) -> None:
    run = run_of(method, model)
    batch = some_batch(run)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in run.trainable.items()
    }
    other = copy.deepcopy(run.model).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    with torch.no_grad():
        expected, _ = run.objective.unmasked(run.objective.forward(other, batch), batch)
        own, _ = run.objective.unmasked(run.objective.forward(run.model.eval(), batch), batch)

    said, _ = teacher_of(run, weights)(batch)
    torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-5)
    assert (said - own).abs().max() > 1e-2
    # and the student has its own again
    with torch.no_grad():
        again, _ = run.objective.unmasked(run.objective.forward(run.model, batch), batch)
    assert torch.equal(again, own)


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_what_der_holds_is_what_the_model_says(
    tiny: Overrides, tmp_path: Path, method: str, model: str
) -> None:
    overrides = overridden(tiny("der", model=model), method)
    run = experiment.build_run(compose(overrides)[1], tmp_path)
    (strategy,) = run.strategies
    assert isinstance(strategy, DER)
    strategy.setup(run)
    first, second = run.stream.tasks[:2]
    run.begin(first)
    strategy.after_task(run, first)
    run.begin(second)
    run.model.eval()
    # a batch of other texts, padded otherwise than when the logits were read
    batch = strategy.transform_batch(run, run.loader(second.train).batch(0))
    run.count_targets([batch])

    with torch.no_grad():
        held = strategy.loss_terms(run, batch, run.objective.forward(run.model, batch))["der"]
        for parameter in run.trainable.values():
            parameter += 1
        moved = strategy.loss_terms(run, batch, run.objective.forward(run.model, batch))["der"]
    assert batch.parts["der"].num_examples > 0
    assert float(held) < 1e-8  # squares of float32 rounding
    assert float(moved) > 1e-4
