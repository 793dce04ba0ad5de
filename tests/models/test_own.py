"""A model of one's own, the one that docs/your_own_model.md shows: adapted, trained, reloaded."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch import nn

import clpeft
from clpeft.composition import register_schemas, settle
from clpeft.config import ConfigError
from clpeft.export import export
from clpeft.models.own import OwnModelConfig, build_own, check_answers, check_forward, check_own
from clpeft.models.targets import find_targets
from clpeft.registry import MODELS, Entry
from clpeft.training.loop import Loop
from tests.running import Outcome, build_it, compose_only, run_it, same_bits
from tests.settings import TINY

PAGE = Path(__file__).parents[2] / "docs" / "your_own_model.md"
TASK_TYPES = ("causal_lm", "sequence_classification")


@pytest.fixture(scope="session")
def small_gpt(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module that the page shows, registered."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    path = tmp_path_factory.mktemp("package") / "small_gpt.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("small_gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_gpt"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def own(small_gpt: ModuleType, cache_dir: Path) -> Callable[..., list[str]]:
    """Overrides of a tiny run of it."""

    def overrides(task_type: str, *more: str) -> list[str]:
        return [
            *TINY,
            "model=small_gpt",
            f"model.task_type={task_type}",
            "model.width=32",
            "peft.target=[w_q,w_v]",
            f"paths.cache_dir={cache_dir}",
            *more,
        ]

    return overrides


Own = Callable[..., list[str]]


@pytest.fixture(scope="session")
def done() -> dict[str, Outcome]:
    """Finished runs, by task type."""
    return {}


def finished(own: Own, done: dict[str, Outcome], task_type: str, tmp_path: Path) -> Outcome:
    if task_type not in done:
        done[task_type] = run_it(own(task_type), tmp_path / "whole")
    return done[task_type]


def adapter(outcome: Outcome, number: int) -> Path:
    (folder,) = (outcome.directory / "adapters").glob(f"{number}_*")
    return folder


def plain(small_gpt: ModuleType, outcome: Outcome) -> nn.Module:
    """The base of a run, built by the page's function and nothing of clpeft's."""
    config, stream = outcome.run.config.model, outcome.run.stream.stream
    torch.manual_seed(config.weights_seed)
    return small_gpt.small_gpt(config, outcome.run.tokenizer, len(stream.label_names)).eval()


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_it_goes_through_a_stream(
    own: Own, done: dict[str, Outcome], tmp_path: Path, task_type: str
) -> None:
    outcome = finished(own, done, task_type, tmp_path)
    trained = {
        f"base_model.model.layers.{layer}.{name}.lora_{letter}.default.weight"
        for layer in (0, 1)
        for name in ("w_q", "w_v")
        for letter in "AB"
    }
    if task_type == "sequence_classification":
        kinds = ("weight", "bias")
        trained |= {f"base_model.model.answer.modules_to_save.default.{kind}" for kind in kinds}

    assert outcome.trainable.keys() == trained
    for name, value in outcome.after.items():
        assert torch.equal(value, outcome.before[name]) == (name not in trained), name
    losses = [step["train/loss/task"] for step in outcome.steps(0)]
    assert losses[-1] < losses[0]
    assert outcome.results["model"] == "small_gpt"
    assert all(0 <= score <= 1 for score in outcome.results["matrix"][-1])
    saved = json.loads((adapter(outcome, 3) / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["w_q", "w_v"]


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_a_saved_adapter_answers_the_same_on_a_base_built_anew(
    own: Own, done: dict[str, Outcome], small_gpt: ModuleType, tmp_path: Path, task_type: str
) -> None:
    outcome = finished(own, done, task_type, tmp_path)
    base, ids = plain(small_gpt, outcome), torch.tensor([[7, 3, 90, 41, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    before = base(ids, mask).logits
    loaded = PeftModel.from_pretrained(base, adapter(outcome, 3)).eval()
    trained = outcome.run.model.eval()(input_ids=ids, attention_mask=mask).logits

    assert torch.equal(loaded(ids, mask).logits, trained)
    assert not torch.allclose(before, trained, atol=1e-3)


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_stopped_within_a_task_it_ends_in_the_same_bits(
    own: Own, done: dict[str, Outcome], tmp_path: Path, task_type: str
) -> None:
    whole = finished(own, done, task_type, tmp_path)
    overrides = own(task_type, "training.checkpoint.every_steps=3")
    original = Loop._pause

    def pause(self: Loop, **given: bool) -> None:
        original(self, **given)
        if self.run.step == 13:  # of 24, in the middle of the second task
            raise KeyboardInterrupt

    with mock.patch.object(Loop, "_pause", pause):
        run_it(overrides, tmp_path / "run", interrupted=True)
    torch.manual_seed(99)
    resumed = run_it(overrides, tmp_path / "run")

    assert resumed.status["attempt"] == 2
    assert same_bits(resumed.after, whole.after)
    assert resumed.results["matrix"] == whole.results["matrix"]
    assert resumed.results["digests"]["base"] == whole.results["digests"]["base"]


def test_it_starts_from_an_adapter_of_its_own(
    own: Own, done: dict[str, Outcome], tmp_path: Path
) -> None:
    first = finished(own, done, "causal_lm", tmp_path)
    run = build_it(own("causal_lm", f"model.path={adapter(first, 3)}"), tmp_path / "run")

    assert same_bits({n: p.detach() for n, p in run.trainable.items()}, first.trainable)
    assert run.base != first.results["digests"]["base"]


def test_all_seeds_adapt_one_base_and_other_weights_are_another(own: Own, tmp_path: Path) -> None:
    one = build_it(own("causal_lm"), tmp_path / "one")
    seed = build_it(own("causal_lm", "seed=1"), tmp_path / "seed")
    other = build_it(own("causal_lm", "model.weights_seed=1"), tmp_path / "other")
    wider = build_it(own("causal_lm", "model.longest=600"), tmp_path / "wider")

    assert one.base == seed.base
    assert len({one.base, other.base, wider.base}) == 3
    (a, b) = (next(iter(run.trainable.values())) for run in (one, seed))
    assert not torch.equal(a, b)  # the adapter is the run's own


def test_its_attention_is_where_it_says(own: Own, tmp_path: Path) -> None:
    run = build_it(own("causal_lm", "peft.target=all-linear"), tmp_path)

    adapted = {name.split(".")[-4] for name in run.trainable}
    assert adapted == {"w_q", "w_k", "w_v", "w_o", "up", "down"}  # and not the head, `answer`
    with pytest.raises(ConfigError, match=r"peft\.target=minimal finds nothing in SmallGPT; name"):
        build_it(own("causal_lm", "peft.target=minimal"), tmp_path)
    with pytest.raises(ConfigError, match="'answer', a head of SmallGPT"):
        build_it(own("causal_lm", "peft.target=[answer]"), tmp_path)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.task_type=seq2seq_lm", "may be a causal_lm or a sequence_classification, not a"),
        ("evaluation.mode=generate", "evaluation.mode=generate needs transformers' generate"),
        ("strategy=generative_replay", "strategy=generative_replay needs transformers' generate"),
        ("training.gradient_checkpointing=true", "needs transformers' gradient_checkpointing_en"),
        ("model.path=/no/such", "model.path=/no/such is not a folder"),
        ("model.builder=small_gtp", "model.builder=small_gtp does not exist. Did you mean 'small_"),
        ("model.width=4", "model.width=4 is too small; it must be at least 8"),
        ("+model.depth=4", "The key 'model.depth' does not exist"),
    ],
)
def test_what_it_cannot_do_is_refused_before_it_is_built(
    own: Own, tmp_path: Path, override: str, told: str
) -> None:
    overrides = own("causal_lm", override)
    with mock.patch.object(nn.Module, "__init__", side_effect=AssertionError("built")):
        with pytest.raises(ConfigError) as error:
            run_it(overrides, tmp_path)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ("strategy=replay", "strategies.replay.selection=herding"),
            "strategies.replay.selection=herding needs hidden_states",
        ),
        (
            ("strategy=[replay,quality_control]", "strategies.quality_control.min_distance=0.1"),
            "strategies.quality_control.min_distance needs hidden_states",
        ),
        (("model.head=[]",), "classifies but names no head; set model.head"),
    ],
)
def test_more_that_is_refused(own: Own, more: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        settle(compose_only(own("sequence_classification", *more)))


def test_what_is_declared_is_not_refused(own: Own, small_gpt: ModuleType) -> None:
    composed = compose_only(own("causal_lm", "evaluation.mode=generate"))

    with mock.patch.object(small_gpt.SmallGPTConfig, "can", frozenset({"generate"})):
        assert settle(composed).evaluation.mode == "generate"


def test_quantization_and_methods_for_transformers_are_refused(own: Own) -> None:
    config = settle(compose_only(own("causal_lm")))
    with mock.patch.object(type(config.peft), "supports_own_models", False):
        with pytest.raises(ConfigError, match="which peft=lora does not work with: it needs a mod"):
            check_own(config)
    config.quantization.method = "nf4"
    with pytest.raises(ConfigError, match="which quantization=nf4 cannot be applied to"):
        check_own(config)


def test_the_name_of_a_shipped_model_is_taken(small_gpt: ModuleType) -> None:
    entry = Entry("gpt2", small_gpt.small_gpt, small_gpt.SmallGPTConfig)
    with mock.patch.dict(MODELS._entries, {"gpt2": entry}):
        with pytest.raises(ValueError, match="The model 'gpt2' of small_gpt is called as one of"):
            register_schemas()


def test_free_answers_need_generation(own: Own) -> None:
    config = settle(compose_only(own("causal_lm")))
    labelled, free = (SimpleNamespace(name=str(n), labels=n) for n in (["a"], []))

    check_answers(config, SimpleNamespace(tasks=[labelled]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"The task '\[\]', whose answers are free text, needs"):
        check_answers(config, SimpleNamespace(tasks=[labelled, free]))  # type: ignore[arg-type]


@dataclass
class OddConfig(OwnModelConfig):
    """Of a module made for one test."""

    name: str = "odd"
    builder: str = "odd"
    task_type: str = "causal_lm"
    module: ClassVar[Any] = None


def odd(module: Any, **settings: Any) -> tuple[nn.Module, list[str]]:
    entry = SimpleNamespace(target=lambda config, tokenizer, labels: module)
    with mock.patch.object(type(MODELS), "__getitem__", return_value=entry):
        return build_own(OddConfig(**settings), SimpleNamespace(), labels=3)  # type: ignore[arg-type]


class Reading(nn.Module):
    """Answers with whatever it is told to."""

    def __init__(self, answer: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.answer = answer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.answer(input_ids)


def test_what_a_function_gives_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"model=odd gave a dict and no torch\.nn\.Module"):
        odd({})
    with pytest.raises(ConfigError, match="names 'top', which is no module of model=odd; it has b"):
        odd(Reading(lambda ids: ids), head=["top"])
    alike = nn.ModuleDict({"head": nn.Linear(2, 2), "multihead": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="'head', which PEFT cannot tell from multihead"):
        odd(alike, head=["head"])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda ids: (ids,), "with a tuple without logits; as a causal_lm it must give"),
        (
            lambda ids: SimpleNamespace(logits=torch.zeros(len(ids), 3)),
            "whose logits are [1, 3]; as a causal_lm it must give an object whose logits are "
            "[1, 9, vocabulary]",
        ),
        (lambda ids: nn.Embedding(4, 2)(ids + 5), "cannot read 9 tokens, as the longest example"),
    ],
)
def test_how_it_answers_is_checked(answer: Callable[..., Any], told: str) -> None:
    model, new = odd(Reading(answer))

    assert new == []
    with pytest.raises(ConfigError) as error:
        check_forward(OddConfig(), model, labels=3, longest=9)
    assert told in str(error.value)
    assert model.training


class Encoder(nn.Module):
    """Torch's own encoder layer, which in evaluation would not call its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.answer = nn.Linear(16, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.layer(self.tokens(input_ids), src_key_padding_mask=attention_mask == 0)
        return SimpleNamespace(logits=self.answer(x.mean(dim=1)))


def test_an_adapter_within_torch_s_own_layer_counts_in_evaluation() -> None:
    from clpeft.peft_methods.base import apply_peft
    from clpeft.peft_methods.lora import LoraSettings

    settings = LoraSettings(
        method="lora",
        r=2,
        alpha=64,
        dropout=0.0,
        target="all-linear",
        bias="none",
        init_lora_weights="default",
    )
    base, new = odd(Encoder(), task_type="sequence_classification", head=["answer"])
    assert find_targets(base, "all-linear", new) == ["linear1", "linear2"]
    model = apply_peft(base, settings, "sequence_classification", new).eval()
    ids = torch.tensor([[3, 4, 5]])

    with torch.inference_mode():
        before = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
        after = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_it_is_served_and_its_adapter_exported(
    own: Own,
    done: dict[str, Outcome],
    small_gpt: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task_type: str,
) -> None:
    outcome = finished(own, done, task_type, tmp_path)
    stream, matrix = outcome.run.stream.stream, outcome.results["matrix"]
    served = clpeft.load(outcome.directory, "all")
    for number in (1, 3):
        letters = stream.tasks[number - 1].test
        answers = served.use(number).predict(letters["text"])
        wanted = [stream.label_names[label] for label in letters["label"]]
        assert sum(map(str.__eq__, answers, wanted)) / 16 == matrix[number][number - 1]

    exported = export(outcome.directory, to=tmp_path / "export").folder
    again = clpeft.load(exported)
    assert same_bits(
        {n: p.detach() for n, p in again.model.named_parameters()},
        {n.replace("default", "task_3"): p for n, p in outcome.after.items()},
    )
    assert again.predict(letters["text"]) == answers
    known = {"model": plain(small_gpt, outcome)}
    code = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)[0]
    exec(code.replace("path/to/this/folder", str(exported)), known)
    loaded = {n: p.detach() for n, p in known["model"].named_parameters()}
    assert same_bits(loaded, outcome.after)
    with pytest.raises(ConfigError, match=r"model=small_gpt is a model of your own, which transf"):
        export(outcome.directory, merge=True, to=tmp_path / "merged")

    entry = MODELS["small_gpt"]

    def other(config: Any, tokenizer: Any, labels: int) -> nn.Module:
        torch.manual_seed(1)
        return entry.target(config, tokenizer, labels)

    monkeypatch.setitem(MODELS._entries, "small_gpt", Entry("small_gpt", other, entry.config))
    with pytest.raises(ConfigError, match="builds another model now than when finetune-s0"):
        clpeft.load(outcome.directory)
    monkeypatch.delitem(MODELS._entries, "small_gpt")
    with pytest.raises(ConfigError, match="model=small_gpt is a model of your own, which no inst"):
        clpeft.load(outcome.directory)
