"""From overrides to checked settings: what is refused, in what words, and what a run is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clpeft.catalogue import catalogue, parse_header
from clpeft.composition import settle
from clpeft.config import RESULT_KEYS, ConfigError, digest, run_name
from clpeft.mistakes import explain
from clpeft.models.load import check_model
from clpeft.registry import STRATEGIES, Entry
from clpeft.strategies.base import Strategy, StrategyConfig
from clpeft.streams.build import check_stream
from tests.running import compose, compose_only
from tests.settings import PEFT_SETTINGS, base_of, models_of, scenarios_of, side_by_side


def refusal(*overrides: str) -> str:
    """The sentence that a mistaken command line is answered with."""
    try:
        composed = compose_only(overrides)
        config = settle(composed)
        check_model(config.model)
        check_stream(config.stream, config.paths.data_dir)
    except (
        ConfigError,
        HydraException,
        OmegaConfBaseException,
        ValueError,
        AssertionError,
    ) as error:
        sentence = explain(error)
        assert sentence is not None
        assert "\n" not in sentence
        assert sentence.endswith((".", "?"))
        return sentence
    raise AssertionError(f"{overrides} was accepted")


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown key": (
        ("optimizer.lrr=1",),
        "The key 'optimizer.lrr' does not exist. Did you mean 'optimizer.lr'",
    ),
    "unknown group of keys": (
        ("optimizr.lr=1",),
        "The key 'optimizr.lr' does not exist. Did you mean 'optimizer.lr'",
    ),
    "unknown key added": (("+sed=1",), "The key 'sed' does not exist. Did you mean 'seed'"),
    "unknown key added below": (
        ("+training.epoch=1",),
        "The key 'training.epoch' does not exist. Did you mean 'training.epochs'",
    ),
    "unknown key added to the adapter": (
        ("+peft.rank=1",),
        "The key 'peft.rank' does not exist.",
    ),
    "unknown key added to the stream": (
        ("+stream.num_task=1",),
        "The key 'stream.num_task' does not exist. Did you mean 'stream.num_tasks'",
    ),
    "unknown setting of a strategy": (
        ("strategy=ewc", "strategies.ewc.lambda=1"),
        "strategies.ewc.lambda does not exist: 'ewc' has no such setting. Did you mean 'lambda_'?",
    ),
    "unknown setting added to a strategy": (
        ("strategy=ewc", "+strategies.ewc.lamda_=1"),
        "strategies.ewc.lamda_ does not exist: 'ewc' has no such setting. Did you mean 'lambda_'?",
    ),
    "key that exists, added": (("+peft.r=3",), "The key 'peft.r' exists already"),
    "wrong type": (
        ("training.batch_size=many",),
        "training.batch_size=many is of the wrong type: Value 'many' of type 'str' could not be "
        "converted to Integer.",
    ),
    "wrong type of a strategy's setting": (
        ("strategy=ewc", "strategies.ewc.lambda_=strong"),
        "strategies.ewc.lambda_=strong is of the wrong type",
    ),
    "null where a value is needed": (
        ("training.batch_size=null",),
        "training.batch_size=null is of the wrong type",
    ),
    "fraction for a whole number": (("seed=1.5",), "seed=1.5 is of the wrong type"),
    "unknown strategy": (("strategy=ewcc",), "strategy=ewcc does not exist. Did you mean 'ewc'?"),
    "unknown strategy among several": (
        ("strategy=[ewc,replai]",),
        "strategy=replai does not exist. Did you mean 'replay'?",
    ),
    "unknown model": (
        ("model=tiny_lama",),
        "model=tiny_lama does not exist. Did you mean 'tiny_llama'",
    ),
    "unknown stream": (("stream=toyy",), "stream=toyy does not exist. Did you mean 'toy'?"),
    "unknown PEFT method": (("peft=lorra",), "peft=lorra does not exist. Did you mean 'lora'"),
    "unknown preset": (("experiment=nosuch",), "experiment=nosuch does not exist."),
    "unknown method by key": (("peft.method=lorra",), "peft.method=lorra does not exist."),
    "unknown kind by key": (("stream.kind=toyy",), "stream.kind=toyy does not exist."),
    "no strategy": (("strategy=[]",), "No strategy is chosen"),
    "null for a group": (("strategy=null",), "A config group takes the name of one of its options"),
    "values for a strategy that was not chosen": (
        ("strategies.ewc.lambda_=5",),
        "strategies.ewc.lambda_ is set although the strategy 'ewc' was not chosen; choose "
        "strategy=ewc or leave it out.",
    ),
    "the same, added": (
        ("+strategies.ewc.lambda_=5",),
        "strategies.ewc.lambda_ is set (by a preset or on the command line) although the strategy "
        "'ewc' was not chosen; remove it, or choose strategy=[finetune,ewc].",
    ),
    "values for a strategy that does not exist": (
        ("+strategies.ewcc.lambda_=5",),
        "strategies.ewcc sets values for a strategy that does not exist. Did you mean 'ewc'?",
    ),
    "a reference together with a method": (
        ("strategy=[finetune,ewc]",),
        "'finetune' is a reference that other strategies are compared with, so it runs alone; drop "
        "it from strategy=[finetune,ewc] or drop ewc.",
    ),
    "a PEFT method that a strategy cannot work with": (
        ("strategy=olora", "peft=full"),
        "The strategy 'olora' does not work with peft=full; it works with peft=lora.",
    ),
    "a PEFT method that has no head to train": (
        ("peft=frozen",),
        "peft=frozen does not work with model.task_type=causal_lm, because a language model has no "
        "head that is new to train; it works with sequence_classification.",
    ),
    "PEFT type that is missing": (("peft=any",), "peft.type has no value yet and needs one."),
    "PEFT type that does not exist": (
        ("peft=any", "peft.type=LOHHA"),
        "peft.type=LOHHA does not exist. Did you mean 'LOHA'",
    ),
    "unknown option of a PEFT type": (
        ("peft=any", "peft.type=LOHA", "peft.options={rank:3}"),
        "peft.options.rank does not exist: PEFT's LOHA has no such field. Did you mean 'rank_",
    ),
    "no modules for a PEFT type": (
        ("peft=any", "peft.type=LOHA", "peft.target=[]"),
        "peft.target=[] names no modules",
    ),
    "no modules for AdaLoRA": (
        ("peft=adalora", "peft.target=null"),
        "peft.target=None names no modules",
    ),
    "option beside those of a file": (
        ("peft=vera", "peft.options.bias=all"),
        "peft.options.bias is none of the options that are set; to add one write +peft.options.bi",
    ),
    "options beside those of a file": (
        ("peft=vera", "peft.options={bias:all}"),
        "peft.options adds an option to those that are set: write +peft.options.<name>=<value>.",
    ),
    "O-LoRA and ranks by module": (
        ("strategy=olora", "peft.rank_pattern={q_proj:2}"),
        "peft.rank_pattern does not work with strategy=olora",
    ),
    "O-LoRA and alphas by module": (
        ("strategy=olora", "peft.alpha_pattern={q_proj:2}"),
        "peft.alpha_pattern does not work with strategy=olora",
    ),
    "O-LoRA and other first weights": (
        ("strategy=olora", "peft.init_lora_weights=gaussian"),
        "peft.init_lora_weights=gaussian does not work with strategy=olora",
    ),
    "O-LoRA and DoRA": (
        ("strategy=olora", "peft.use_dora=true"),
        "peft.use_dora=true does not work with strategy=olora",
    ),
    "O-LoRA and trained biases": (
        ("strategy=olora", "peft.bias=all"),
        "peft.bias=all does not work with strategy=olora",
    ),
    "an exact Fisher over a vocabulary": (
        ("strategy=ewc", "strategies.ewc.fisher=exact"),
        "strategies.ewc.fisher=exact sums over all labels of a classification head",
    ),
    "text from a classifier": (
        ("model=tiny_bert", "evaluation.mode=generate"),
        "evaluation.mode=generate needs a model that writes text",
    ),
    "no data folder": (
        ("stream=standard_cl", "paths.data_dir=null"),
        "set paths.data_dir=<folder>",
    ),
    "a data folder that does not exist": (
        ("stream=standard_cl", "paths.data_dir=/no/such/folder"),
        "needs the folder /no/such/folder/cl_benchmark, which does not exist",
    ),
    "no folder of one's own": (("stream=folder",), "needs stream.path=<folder>"),
    "a folder of one's own that does not exist": (
        ("stream=folder", "stream.path=/no/such/folder"),
        "stream.path=/no/such/folder is not a folder",
    ),
    "a task that does not exist": (
        ("stream.tasks=[ashfort]",),
        "has no post office 'ashfort'. Did you mean 'ashford'",
    ),
    "a task twice": (("stream.tasks=[ashford,ashford]",), "lists the task 'ashford' twice"),
    "more tasks than there are": (("stream.num_tasks=97",), "there are only 96 post offices"),
    "an order that a stream does not have": (("stream.order=order1",), "has no published orders"),
    "no such model folder": (("model.path=/no/such",), "model.path=/no/such is not a folder"),
    "a folder that holds no model": (("model.path=/",), "holds neither config.json nor"),
    "a model from nowhere": (("model.architecture=null",), "says nowhere what to load"),
    "a setting inside what is null": (
        ("model=minilm", "model.warmup.steps=3"),
        "A setting is given inside a part of the config that is null here",
    ),
    "impossible word": (
        ("evaluation.mode=guess",),
        "evaluation.mode=guess is not possible; choose one of rank, generate.",
    ),
    "impossible scenario": (("stream.scenario=tasks",), "stream.scenario=tasks is not possible"),
    "impossible word of a strategy": (
        ("strategy=ewc", "strategies.ewc.fisher=full"),
        "strategies.ewc.fisher=full is not possible; choose one of empirical, sampled, exact.",
    ),
    "too small": (
        ("training.batch_size=0",),
        "training.batch_size=0 is too small; it must be at least 1.",
    ),
    "too small, of a strategy": (
        ("strategy=ewc", "strategies.ewc.lambda_=-1"),
        "strategies.ewc.lambda_=-1.0 is too small; it must be at least 0.",
    ),
    "too small, of a stream": (("stream.max_train=0",), "stream.max_train=0 is too small"),
    "no steps": (("training.max_steps=0",), "training.max_steps=0 is too small"),
    "too large": (("peft.dropout=1.5",), "peft.dropout=1.5 is too large; it must be at most 1."),
    "percent for a fraction": (("stream.chance=25",), "stream.chance=25.0 is too large"),
    "not a number": (("optimizer.lr=nan",), "optimizer.lr=nan is too small"),
    "one of a list too large": (("optimizer.betas=[0.9,1]",), "optimizer.betas=[0.9, 1.0] is too"),
    "a list of the wrong length": (("optimizer.betas=[0.9]",), "must be two numbers"),
    "negative seed": (("seed=-1",), "seed=-1 is too small; it must be at least 0."),
    "no override at all": (("strategy",), "Error parsing override 'strategy'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_told_in_one_sentence(mistake: str) -> None:
    overrides, sentence = MISTAKES[mistake]

    assert sentence in refusal(*overrides)


def test_task_names_of_real_data_come_with_the_near_ones(tmp_path: Path) -> None:
    for task in ("dbpedia", "amazon"):
        folder = tmp_path / "cl_benchmark" / task
        folder.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (folder / f"{split}.parquet").touch()
        (folder / "labels.json").write_text('{"labels": ["a", "b"]}')

    told = refusal(
        "stream=standard_cl", f"paths.data_dir={tmp_path}", "stream.tasks=[dbpdia,amazon]"
    )

    assert "'dbpdia'" in told
    assert "Did you mean 'dbpedia'?" in told


@pytest.fixture
def preset(tmp_path: Path) -> Callable[[str], list[str]]:
    """Overrides that choose a preset of one's own."""

    def make(text: str) -> list[str]:
        folder = tmp_path / "presets" / "experiment"
        folder.mkdir(parents=True)
        (folder / "mine.yaml").write_text(f"# @package _global_\n{text}")
        return [f"hydra.searchpath=[file://{tmp_path / 'presets'}]", "experiment=mine"]

    return make


def test_preset_applies(preset: Callable[[str], list[str]]) -> None:
    chosen = preset(
        "defaults:\n  - override /strategy: [ewc]\n\nstrategies:\n  ewc:\n    lambda_: 7\n"
        "training:\n  epochs: 5\n"
    )
    _, config = compose(chosen)

    assert (list(config.strategies), config.strategies["ewc"].lambda_) == (["ewc"], 7.0)
    assert config.training.epochs == 5


def test_values_left_over_from_a_preset_name_its_key(preset: Callable[[str], list[str]]) -> None:
    chosen = preset(
        "defaults:\n  - override /strategy: [ewc]\n\nstrategies:\n  ewc:\n    lambda_: 7\n"
    )

    told = refusal(*chosen, "strategy=replay")

    assert told.startswith("strategies.ewc.lambda_ is set (by a preset or on the command line)")
    assert "strategy=[replay,ewc]" in told


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers strategies for one test; they need no YAML."""
    known = dict(STRATEGIES._entries)

    def register(**strategies: type[Strategy]) -> None:
        entries = {name: Entry(name, cls, StrategyConfig) for name, cls in strategies.items()}
        monkeypatch.setattr(STRATEGIES, "_entries", known | entries)

    list(STRATEGIES)
    return register


def combined(*names: str, more: tuple[str, ...] = ()) -> str:
    """The refusal of strategies that no YAML knows."""
    composed = OmegaConf.create(
        OmegaConf.to_container(compose_only(["strategy=ewc", *more]), resolve=True)
    )
    composed.strategies = {name: {} for name in names}
    with pytest.raises(ConfigError) as error:
        settle(composed)
    return str(error.value)


class Plain(Strategy):
    """Does nothing."""


def test_strategies_that_exclude_each_other(registered: Callable[..., None]) -> None:
    class Picky(Strategy):
        conflicts = {"plain": "both want the last word"}  # noqa: RUF012

    registered(plain=Plain, picky=Picky)

    assert combined("plain", "picky") == (
        "'picky' and 'plain' cannot be combined: both want the last word."
    )


def test_two_owners_of_the_adapter(registered: Callable[..., None]) -> None:
    class Owner(Strategy):
        owns_adapters = True

    registered(one=Owner, two=type("Other", (Owner,), {}))

    assert combined("one", "two").startswith("one and two cannot be combined: each swaps or grows")


def test_two_that_replace_forward_and_backward(registered: Callable[..., None]) -> None:
    class Meta(Strategy):
        def compute_gradients(self, run: Any, batch: Any) -> Any:
            """Never called."""

    registered(one=Meta, two=type("Other", (Meta,), {}), plain=Plain)

    assert combined("one", "plain", "two").startswith(
        "one and two cannot be combined: each replaces forward and backward"
    )


def test_a_term_of_the_peft_methods_that_would_be_lost(registered: Callable[..., None]) -> None:
    class Meta(Strategy):
        def compute_gradients(self, run: Any, batch: Any) -> Any:
            """Never called."""

    registered(meta=Meta)

    assert combined("meta", more=("peft=adalora",)).startswith(
        "meta and peft=adalora cannot be combined: meta replaces forward and backward"
    )


@pytest.mark.parametrize(
    ("capability", "more", "told"),
    [
        (
            {"task_types": frozenset({"seq2seq_lm"})},
            (),
            "does not work with model.task_type=causal_lm; it works with seq2seq_lm.",
        ),
        (
            {"supports_gradient_accumulation": False},
            ("training.gradient_accumulation=2",),
            "does not work with training.gradient_accumulation=2",
        ),
        (
            {"peft_types": frozenset({"full"})},
            (),
            "does not work with peft=lora; it works with peft=full.",
        ),
    ],
)
def test_capabilities(
    registered: Callable[..., None], capability: dict[str, Any], more: tuple[str, ...], told: str
) -> None:
    registered(limited=type("Limited", (Strategy,), capability))

    assert told in combined("limited", more=more)


def test_several_processes(
    registered: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(single=type("Single", (Strategy,), {"supports_multi_process": False}))
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert "(WORLD_SIZE is 2)" in combined("single")


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
    ],
)
def test_model_in_shards(
    registered: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    kind: str,
) -> None:
    """As accelerate launch sets the environment."""
    registered(whole=type("Whole", (Strategy,), {"supports_sharding": frozenset({"zero2"})}))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    told = combined("whole")
    assert f"({kind} was asked for; it works with: zero2)" in told
    # what works in shards is refused for something else
    able = {"supports_sharding": frozenset({kind}), "supports_gradient_accumulation": False}
    registered(sharded=type("Sharded", (Strategy,), able))
    more = ("training.gradient_accumulation=2",)
    assert "does not work with training.gradient_acc" in combined("sharded", more=more)


def test_peft_method_in_shards(
    registered: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(able=type("Able", (Strategy,), {"supports_sharding": frozenset({"fsdp2"})}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")

    assert combined("able", more=("peft=adalora",)).startswith(
        "peft=adalora is not known to work with a model in shards (fsdp2 was asked for"
    )


def test_errors_of_other_kinds_are_not_explained() -> None:
    assert explain(RuntimeError("out of memory")) is None
    assert explain(ZeroDivisionError("division by zero")) is None


# What a run is called.


def test_digest_knows_what_can_change_a_result() -> None:
    base = compose_only(["strategy=ewc"])
    same = (
        "paths.output_dir=elsewhere",
        "paths.cache_dir=elsewhere",
        "paths.data_dir=elsewhere",
        "tracking.wandb.mode=disabled",
        "tracking.log_every=3",
        "training.checkpoint.keep=9",
        "force=true",
    )
    other = (
        "seed=1",
        "optimizer.lr=0.5",
        "strategies.ewc.lambda_=99",
        "stream.seed=1",
        "training.epochs=9",
        "evaluation.mode=generate",
        "model.warmup.steps=1",
        "peft.r=3",
        "scheduler.warmup_ratio=0.5",
    )

    assert {run_name(compose_only(["strategy=ewc", change])) for change in same} == {run_name(base)}
    names = [run_name(compose_only(["strategy=ewc", change])) for change in other]
    assert len({*names, run_name(base)}) == len(other) + 1


def test_name_tells_strategies_and_seed() -> None:
    name = run_name(compose_only(["strategy=[ewc,replay]", "seed=12"]))
    turned = run_name(compose_only(["strategy=[replay,ewc]", "seed=12"]))

    assert name.rsplit("-", 1)[0] == "ewc+replay-s12"
    assert len(name.rsplit("-", 1)[1]) == 8
    # the order in which strategies act is part of what a run is
    assert turned.rsplit("-", 1)[0] == "replay+ewc-s12"
    assert turned.rsplit("-", 1)[1] != name.rsplit("-", 1)[1]


def test_group_of_a_run_does_not_know_its_seed() -> None:
    digests = {digest(compose_only([f"seed={seed}"]), RESULT_KEYS) for seed in (0, 1, 2)}

    assert len(digests) == 1


@pytest.mark.parametrize("overrides", [["strategy=[ewc,replay]", "seed=3"], ["stream=folder"]])
def test_config_read_from_a_run_directory_gives_the_same_settings(
    tmp_path: Path, overrides: list[str]
) -> None:
    composed, config = compose(overrides)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(composed, resolve=True))
    read = OmegaConf.load(tmp_path / "config.yaml")

    assert settle(read) == config  # type: ignore[arg-type]
    assert run_name(read) == run_name(composed)  # type: ignore[arg-type]


# Every file that is shipped.

SHIPPED = [(group, option.name) for group, options in catalogue().items() for option in options]


@pytest.mark.parametrize(("group", "name"), SHIPPED)
def test_every_shipped_option_composes(group: str, name: str) -> None:
    names = side_by_side(name) if group == "strategy" else [name]
    fitting = []
    if group == "strategy":  # what it works with
        fitting = [f"model={models_of(*names)[0]}", f"stream.scenario={scenarios_of(*names)[0]}"]
    if group == "peft":
        (way, *_) = [way for way in PEFT_SETTINGS if base_of(way) == name]
        fitting = [f"model={PEFT_SETTINGS[way].models[0]}", *PEFT_SETTINGS[way].overrides]
    chosen = f"[{','.join(names)}]" if len(names) > 1 else name
    if group == "experiment/tune":
        names = side_by_side(name)
        fitting = [f"model={models_of(*names)[0]}", f"stream.scenario={scenarios_of(*names)[0]}"]
    if group.startswith("experiment/"):
        group, folder = group.split("/")
        chosen = f"{folder}/{name}"
    _, config = compose([f"{group}={chosen}", *fitting])

    if group == "strategy":
        assert list(config.strategies) == names
        assert dataclasses.is_dataclass(config.strategies[name])
    if group == "model":
        assert config.model.name == name
    if group == "stream":
        assert config.stream.name == name


def test_every_shipped_file_says_what_it_is() -> None:
    folder = Path(str(resources.files("clpeft.conf")))
    files = sorted(folder.rglob("*.yaml"))

    assert len(files) > 30
    for path in files:
        head = parse_header(path.read_text(encoding="utf-8"))
        assert head["description"], path
        assert head["use"].startswith("clpeft "), path
        assert path.stem == "config" or path.parent.name in head["use"], path


def test_every_strategy_has_a_file_with_its_paper() -> None:
    options = {option.name: option for option in catalogue()["strategy"]}

    assert set(options) == {entry.name for entry in STRATEGIES}
    for entry in STRATEGIES:
        if not entry.target.is_reference:
            assert options[entry.name].paper, entry.name
