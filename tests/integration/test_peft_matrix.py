"""Every PEFT method on the toy stream: trained, saved, loaded, switched, killed and gone on with.

Driven by PEFT_SETTINGS in tests/settings.py: a new method adds a row there.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import clpeft
from clpeft.composition import settle
from clpeft.config import ConfigError
from clpeft.export import export
from clpeft.launching import check
from tests.running import Outcome, build_it, compose_only, killed_at, run_it, same_run
from tests.settings import PEFT_SETTINGS, TASK_TYPES, base_of

NAMES = sorted(PEFT_SETTINGS)
WHOLE = {"full", "lisa_layerwise"}  # train the base itself
UNMERGED = {"bottleneck", "lisa_hybrid", "p_tuning", "prefix", "prompt"}
LOST = {"p_tuning"}  # the network that makes its prompt
ADAPTERS = [name for name in NAMES if name not in WHOLE]
AUTO = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
}
SHORT = ("stream.num_tasks=2", "training.epochs=1")  # tasks of four steps

Overrides = Callable[..., list[str]]
Finished = Callable[..., Outcome]
Bases = Callable[[str], Path]

# without nvcc there is no CUDA extension of BOFT's; it is not needed for one butterfly factor
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    # PEFT takes AdaLoRA's, which names parameters, for LoRA's, which names modules
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]


def cells(names: list[str]) -> list[Any]:
    """Methods with each kind of model that they are for; CI runs the first of each."""
    return [
        pytest.param(name, model, marks=[pytest.mark.slow] if place else [])
        for name in names
        for place, model in enumerate(PEFT_SETTINGS[name].models)
    ]


def loaded(outcome: Outcome, base: Path, *tasks: int) -> Any:
    """A model from its source, with the adapters of some tasks, as PEFT alone loads them."""
    kind = outcome.run.config.model.task_type
    labels = len(outcome.run.stream.stream.label_names)
    more = {"num_labels": labels} if kind == "sequence_classification" else {}
    folders = [next((outcome.directory / "adapters").glob(f"{task}_*")) for task in tasks]
    model = AUTO[kind].from_pretrained(base, **more)
    adapted = PeftModel.from_pretrained(model, folders[0], adapter_name=f"task{tasks[0]}")
    for task, folder in zip(tasks[1:], folders[1:], strict=True):
        adapted.load_adapter(folder, adapter_name=f"task{task}")
    return adapted.eval()


@torch.no_grad()
def logits(outcome: Outcome, model: Any) -> Tensor:
    """What a model makes of the first test examples."""
    run = outcome.run
    batch = run.loader(run.stream.tasks[0].test, shuffle=False).batch(0)
    return run.objective.forward(model.eval(), batch).logits


def test_every_method_has_a_row() -> None:
    shipped = {item.name for item in (resources.files("clpeft.conf") / "peft").iterdir()}

    assert {f"{base_of(name)}.yaml" for name in NAMES} == shipped


@pytest.mark.parametrize(("name", "model"), cells(NAMES))
def test_all_that_is_to_train_does_and_nothing_else(
    finished: Finished, name: str, model: str
) -> None:
    # of T5's four layers one at a time would not all have their turn in eight steps
    more = ["peft.active_layers=2"] if (name, model) == ("lisa_layerwise", "tiny_t5") else []
    outcome = finished("finetune", *SHORT, *more, model=model, peft=name)
    frozen = outcome.before.keys() - outcome.trainable.keys()
    after = outcome.after

    assert outcome.trainable
    assert bool(frozen) == (name not in WHOLE)
    assert [p for p in frozen if not torch.equal(outcome.before[p], after[p])] == []
    assert all(after[parameter].grad is None for parameter in frozen)
    still = [p for p in outcome.trainable if torch.equal(outcome.before[p], after[p])]
    assert [p for p in still if not p.endswith(PEFT_SETTINGS[name].resting)] == []
    assert outcome.results["peft"] == outcome.run.config.peft.kind
    assert outcome.results["parameters"]["trainable"] == sum(
        p.numel() for p in outcome.trainable.values()
    )


@pytest.mark.parametrize(("name", "model"), cells(NAMES))
def test_bytes_are_those_on_the_disk_and_of_the_plain_base(
    finished: Finished, bases: Bases, name: str, model: str
) -> None:
    outcome = finished("finetune", *SHORT, model=model, peft=name)
    cost = outcome.results["cost"]

    assert cost["trained_bytes"] == sum(p.nbytes for p in outcome.trainable.values())
    if name in WHOLE:
        assert cost["adapter_bytes"] is None
        assert cost["base_bytes"] == 0
        return
    (file,) = (outcome.directory / "adapters").glob("2_*/*.safetensors")
    assert cost["adapter_bytes"] == sum(tensor.nbytes for tensor in load_file(file).values())
    labels = len(outcome.run.stream.stream.label_names)
    more = {"num_labels": labels} if model == "tiny_bert" else {}
    plain = AUTO[TASK_TYPES[model]].from_pretrained(bases(model), **more)
    assert cost["base_bytes"] == sum(parameter.nbytes for parameter in plain.parameters())


@pytest.mark.parametrize(("name", "model"), cells(ADAPTERS))
def test_saved_adapters_are_the_model_that_was_trained(
    finished: Finished, bases: Bases, name: str, model: str
) -> None:
    """Each task's adapter by itself, and both in one model, one after the other."""
    outcome = finished("finetune", *SHORT, model=model, peft=name)
    base = bases(model)
    alone = [logits(outcome, loaded(outcome, base, task)) for task in (1, 2)]
    together = loaded(outcome, base, 1, 2)

    trained = logits(outcome, outcome.run.model)
    if PEFT_SETTINGS[name].exact:
        assert torch.equal(alone[1], trained)
    else:  # float32 sums of fewer terms
        torch.testing.assert_close(alone[1], trained, rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone[0], alone[1])
    for task in (2, 1, 2):
        together.set_adapter(f"task{task}")
        assert torch.equal(logits(outcome, together), alone[task - 1])


@pytest.mark.parametrize(("name", "model"), cells(ADAPTERS))
def test_a_run_goes_on_from_its_adapter(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str, model: str
) -> None:
    outcome = finished("finetune", *SHORT, model=model, peft=name)
    folder = next((outcome.directory / "adapters").glob("2_*"))
    overrides = tiny("finetune", *SHORT, f"model.path={folder}", model=model, peft=name)
    if base_of(name) in LOST:
        with pytest.raises(ConfigError, match="holds what a network made that was not saved"):
            check(compose_only(overrides), tmp_path)
        return
    check(compose_only(overrides), tmp_path)
    run = build_it(overrides, tmp_path)

    # float32 sums of fewer terms, where not exact
    trained = logits(outcome, outcome.run.model)
    torch.testing.assert_close(logits(outcome, run.model), trained, rtol=1e-4, atol=1e-5)
    # once, and nothing beside it
    shapes = {name: p.shape for name, p in run.trainable.items()}
    assert shapes == {name: p.shape for name, p in outcome.trainable.items()}
    assert len(list(run.model.parameters())) == len(outcome.before)


@pytest.mark.parametrize(("name", "model"), cells(NAMES))
def test_its_models_are_served_and_exported(
    finished: Finished, tmp_path: Path, name: str, model: str
) -> None:
    outcome = finished("finetune", *SHORT, model=model, peft=name)
    stream, matrix = outcome.run.stream.stream, outcome.results["matrix"]
    trained = logits(outcome, outcome.run.model)
    served = clpeft.load(outcome.directory, 2 if name in WHOLE else "all")
    for number in (2,) if name in WHOLE else (1, 2):
        letters = stream.tasks[number - 1].test
        answers = served.use(number).predict(letters["text"])
        wanted = [stream.label_names[label] for label in letters["label"]]
        assert sum(map(str.__eq__, answers, wanted)) / 16 == matrix[number][number - 1]
    folder = export(outcome.directory, to=tmp_path / "export").folder
    for again in (served, clpeft.load(folder)):
        # float32 sums of fewer terms, where not exact
        torch.testing.assert_close(logits(outcome, again.model), trained, rtol=1e-4, atol=1e-5)
    if base_of(name) in UNMERGED:
        with pytest.raises(ConfigError, match=r"cannot be merged into .* without --merge\.$"):
            export(outcome.directory, merge=True, to=tmp_path / "merged")
    else:
        done = export(outcome.directory, merge=True, to=tmp_path / "merged")
        assert done.difference < 3e-5  # type: ignore[operator]


@pytest.mark.parametrize(("name", "model"), cells(NAMES))
def test_killed_in_the_second_task_it_ends_in_the_same_bits(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str, model: str
) -> None:
    every = "training.checkpoint.every_steps=1"
    # the second step of the second task's four
    killed_at(tiny("finetune", *SHORT, every, model=model, peft=name), tmp_path / "run", 6)
    resumed = run_it(tiny("finetune", *SHORT, every, model=model, peft=name), tmp_path / "run")

    assert resumed.status["attempt"] == 2
    same_run(resumed, finished("finetune", *SHORT, model=model, peft=name))


@pytest.mark.parametrize(
    ("name", "model"),
    [(name, m) for name in NAMES for m in TASK_TYPES if m not in PEFT_SETTINGS[name].models],
)
def test_other_kinds_of_model_are_refused(tiny: Overrides, name: str, model: str) -> None:
    with pytest.raises(
        ConfigError, match=f"does not work with model.task_type={TASK_TYPES[model]}"
    ):
        settle(compose_only(tiny("finetune", model=model, peft=name)))
