"""One table for all matrix tests: how each strategy is made to show on a tiny stream.

A new strategy adds one row here, and is then trained, resumed, saved, combined and compared by
tests/integration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """How a strategy is run, and by what it must show."""

    overrides: tuple[str, ...] = ()
    # the logged value that is not zero from task 2 on, and is absent or zero in task 1
    trace: str | None = None
    # what shows that it acts beside replay, where that may leave it nothing to change
    beside_replay: str | None = None
    keeps_state: bool = True  # whether its state after task 1 holds tensors
    draws: int = 1  # how often a micro-batch is drawn for from its memory
    # where it works; in the first of them it is run, unless a test asks for another
    scenarios: tuple[str, ...] = ("domain", "class", "task")
    # the strategy that it is run with wherever it could not run alone
    beside: str | None = None
    # optimizer steps of each task of a tiny run
    steps: tuple[int, int, int] = (8, 8, 8)


STRATEGY_SETTINGS: dict[str, Setting] = {
    "agem": Setting(
        ("strategies.agem.memory_size=24", "strategies.agem.reference_size=8"),
        trace="train/gradient/agem_projected",
        beside_replay="train/gradient/agem_cosine",
    ),
    "cumulative": Setting(keeps_state=False, steps=(8, 16, 24)),
    "der": Setting(
        ("strategies.der.memory_size=24", "strategies.der.ratio=0.45"),
        trace="train/loss/der",
    ),
    "derpp": Setting(
        ("strategies.derpp.memory_size=24", "strategies.derpp.ratio=0.45"),
        trace="train/loss/derpp",
        draws=2,
    ),
    "er_ace": Setting(
        ("strategies.er_ace.memory_size=24", "strategies.er_ace.ratio=0.45"),
        trace="train/er_ace/examples",
        scenarios=("class",),
    ),
    "ewc": Setting(
        ("strategies.ewc.lambda_=20", "strategies.ewc.fisher_examples=8"),
        trace="train/loss/ewc",
    ),
    "l2": Setting(("strategies.l2.lambda_=0.5",), trace="train/loss/l2"),
    "gem": Setting(
        ("strategies.gem.memory_size=24", "strategies.gem.reference_size=4"),
        trace="train/gradient/gem_violated",
        beside_replay="train/gradient/gem_cosine",
    ),
    "lwf": Setting(trace="train/loss/lwf"),
    "mas": Setting(
        ("strategies.mas.lambda_=20", "strategies.mas.examples=8"),
        trace="train/loss/mas",
    ),
    "online_ewc": Setting(
        ("strategies.online_ewc.lambda_=20", "strategies.online_ewc.fisher_examples=8"),
        trace="train/loss/online_ewc",
    ),
    "rwalk": Setting(
        # three steps to an interval leave two of a task's eight over
        ("strategies.rwalk.lambda_=20", "strategies.rwalk.every=3"),
        trace="train/loss/rwalk",
    ),
    "si": Setting(("strategies.si.lambda_=20",), trace="train/loss/si"),
    "finetune": Setting(keeps_state=False),
    # as many examples as a task has: its steps are then those of the others
    "gdumb": Setting(("strategies.gdumb.memory_size=32",), trace="train/gdumb/earlier_examples"),
    "independent": Setting(),
    "generative_replay": Setting(
        (
            "strategies.generative_replay.replay_ratio=0.25",
            "strategies.generative_replay.batch_size=128",
            "strategies.generative_replay.max_new_tokens=48",
        ),
        trace="train/generative_replay/examples",
        keeps_state=False,
        steps=(8, 10, 10),  # eight examples more: a batch in each epoch
    ),
    "joint": Setting(keeps_state=False, steps=(0, 0, 24)),
    "olora": Setting(("strategies.olora.lambda1=0.5",), trace="train/loss/orthogonality"),
    "prioritized_replay": Setting(
        (
            "strategies.prioritized_replay.memory_size=24",
            "strategies.prioritized_replay.ratio=0.45",
        ),
        trace="train/prioritized_replay/examples",
    ),
    "quality_control": Setting(
        ("strategies.quality_control.near_duplicates=0.5", "strategies.quality_control.ngram=2"),
        trace="train/quality/dropped",
        beside="replay",
    ),
    "replay": Setting(
        ("strategies.replay.memory_size=24", "strategies.replay.ratio=0.45"),
        trace="train/replay/examples",
    ),
}

# Options under which a strategy of the table goes another way, as `<strategy>:<option>`: for the
# tests of what such a way could break (accumulation, processes, going on where it was stopped).
VARIANTS: dict[str, tuple[str, ...]] = {
    "replay:separate": ("mixing=separate", "weight=2", "selection=herding"),
    "prioritized_replay:separate": ("mixing=separate", "weight=2", "selection=class_balanced"),
    "derpp:herding": ("selection=herding",),
    "ewc:sampled": ("fisher=sampled",),
    "lwf:live": ("teacher=live",),
    "quality_control:asking": ("max_loss=3", "min_confidence=0.2", "min_distance=0.001"),
    "gdumb:uncertainty": ("selection=uncertainty", "budget=per_task", "memory_size=16"),
}
VARIED = sorted([*STRATEGY_SETTINGS, *VARIANTS])


def base_of(name: str) -> str:
    """The strategy that a name of `VARIED` is of."""
    return name.partition(":")[0]


def overrides_of(name: str) -> list[str]:
    """How a strategy or a variant of it is run."""
    base = base_of(name)
    more = [f"strategies.{base}.{option}" for option in VARIANTS.get(name, ())]
    return [*STRATEGY_SETTINGS[base].overrides, *more]


def in_turns(names: Sequence[str], turn: int, turns: int = 3) -> list[Any]:
    """Parameters of a test of which CI runs every third; the others are marked slow.

    Args:
        names: Strategies.
        turn: Which of them; tests with other turns run others, so that each is run by some.
        turns: Every how manieth.
    """
    import pytest

    return [
        pytest.param(name, marks=[] if place % turns == turn else [pytest.mark.slow])
        for place, name in enumerate(names)
    ]


def side_by_side(strategy: str) -> list[str]:
    """The names in `one+other`; and of one alone, that of the one it could not run without."""
    names = strategy.split("+")
    partner = STRATEGY_SETTINGS[base_of(names[0])].beside if len(names) == 1 else None
    return names if partner is None else [*names, partner]


# Everything small: a run takes about a second once its base model is built. Weight decay is on, so
# that what only looks frozen moves; dropout too, so that random states that differ show.
TINY = (
    "stream.num_tasks=3",
    "stream.train_size=32",
    "stream.validation_size=16",
    "stream.test_size=16",
    "stream.max_length=96",
    "training.batch_size=8",
    "training.epochs=2",
    "optimizer.lr=1e-2",
    "optimizer.weight_decay=0.1",
    "tracking.log_every=1",
    "tracking.console=false",
    "tracking.wandb.mode=disabled",
    "training.checkpoint.keep=100",
)


@dataclass(frozen=True)
class PeftSetting:
    """How a PEFT method is run."""

    overrides: tuple[str, ...] = ()
    models: tuple[str, ...] = ("tiny_llama", "tiny_bert", "tiny_t5")  # the first of them is enough
    exact: bool = True  # whether an adapter that was saved gives the same logits to the bit
    resting: tuple[str, ...] = ()  # how the names end of what trains and may end as it began


# Each a file of conf/peft, or a way of one, as `<file>:<way>`.
PEFT_SETTINGS: dict[str, PeftSetting] = {
    "adalora": PeftSetting(
        (
            "peft.init_r=6",
            "peft.target_r=3",
            "peft.target=auto",
            "peft.dropout=0.1",
            "peft.deltaT=2",
        ),
        exact=False,  # fewer ranks are multiplied than were trained, the others by 0
        resting=("lora_E.default",),  # of a module that is left no rank
    ),
    "any:loha": PeftSetting(("peft.type=LOHA", "peft.options={r:4,module_dropout:0.1}")),
    "any:miss": PeftSetting(("peft.type=MISS", "peft.options={r:4}", "peft.target=all-linear")),
    "any:randlora": PeftSetting(("peft.type=RANDLORA", "peft.options={r:4}")),
    "any:vblora": PeftSetting(
        ("peft.type=VBLORA", "peft.options={vector_length:8,num_vectors:16,topk:2}")
    ),
    "boft": PeftSetting(),
    "bottleneck": PeftSetting(("peft.placement=pfeiffer", "peft.bottleneck=3")),
    "frozen": PeftSetting(models=("tiny_bert",)),
    "full": PeftSetting(("optimizer.lr=1e-3",)),
    "ia3": PeftSetting(),
    "lisa_layerwise": PeftSetting(
        ("peft.active_layers=1", "peft.every=2", "optimizer.lr=1e-3"),
    ),
    "lisa_hybrid": PeftSetting(("peft.num_virtual_tokens=3", "peft.r=4")),
    "lora": PeftSetting(
        ("peft.r=8", "peft.alpha=16", "peft.target=auto", "peft.dropout=0.1"),
    ),
    "lora:dora": PeftSetting(("peft.r=4", "peft.use_dora=true", "peft.dropout=0.1")),
    "lora:patterns": PeftSetting(
        (
            "peft.r=4",
            "peft.target=auto",
            "peft.use_rslora=true",
            "peft.layers_to_transform=[1]",
            "peft.init_lora_weights=gaussian",
        )
    ),
    "oft": PeftSetting(("peft.options.oft_block_size=8",)),
    "p_tuning": PeftSetting(
        ("peft.num_virtual_tokens=4",),
        exact=False,  # what its network makes of one prompt and of a batch differs in last bits
    ),
    "prefix": PeftSetting(("peft.num_virtual_tokens=4",)),
    "prompt": PeftSetting(("peft.num_virtual_tokens=4",)),
    "osf": PeftSetting(("optimizer.lr=1e-3",)),
    "vera": PeftSetting(("peft.options.r=16", "peft.options.vera_dropout=0.1")),
}


def peft_overrides(name: str) -> list[str]:
    """How a PEFT method of the table is chosen and run; lora is what is chosen by default."""
    chosen = [] if base_of(name) == "lora" else [f"peft={base_of(name)}"]
    return [*chosen, *PEFT_SETTINGS[name].overrides]


SCENARIOS = ("domain", "class", "task")  # the first is the toy stream's own
TASK_TYPES = {
    "tiny_llama": "causal_lm",
    "tiny_bert": "sequence_classification",
    "tiny_t5": "seq2seq_lm",
}


def models_of(*names: str) -> list[str]:
    """The tiny models that all of some strategies work with."""
    from clpeft.registry import STRATEGIES

    types = [STRATEGIES[base_of(name)].target.task_types for name in names]
    return [model for model, kind in TASK_TYPES.items() if all(kind in t for t in types)]


def scenarios_of(*names: str) -> list[str]:
    """The scenarios that all of some strategies work in."""
    known = [STRATEGY_SETTINGS[base_of(name)].scenarios for name in names]
    return [scenario for scenario in SCENARIOS if all(scenario in k for k in known)]


# The three families, as small as they go, and warmed up for gradients to mean something.
_WARMUP = (
    "model.warmup.steps=150",
    "model.warmup.batch_size=16",
    "model.warmup.length=32",
    "model.warmup.lr=1e-2",
    "model.warmup.vocabulary=600",
)
TINY_MODELS = {
    # the same, wide enough for 4 bits: on a CPU the rows that are stored so are multiples of 64
    "wide_llama": (
        "model=tiny_llama",
        "model.architecture.hidden_size=64",
        "model.architecture.intermediate_size=128",
        *_WARMUP,
    ),
    "wide_bert": (
        "model=tiny_bert",
        "model.architecture.hidden_size=64",
        "model.architecture.intermediate_size=128",
        *_WARMUP,
    ),
    "wide_t5": (
        "model=tiny_t5",
        "model.architecture.d_model=64",
        "model.architecture.d_kv=16",
        "model.architecture.d_ff=128",
        *_WARMUP,
        "model.warmup.steps=0",
    ),
    "tiny_llama": (
        "model=tiny_llama",
        "model.architecture.hidden_size=32",
        "model.architecture.intermediate_size=64",
        *_WARMUP,
    ),
    "tiny_bert": (
        "model=tiny_bert",
        "model.architecture.hidden_size=32",
        "model.architecture.intermediate_size=64",
        *_WARMUP,
    ),
    "tiny_t5": (
        "model=tiny_t5",
        "model.architecture.d_model=32",
        "model.architecture.d_kv=8",
        "model.architecture.d_ff=64",
        *_WARMUP,
        "model.warmup.steps=0",
    ),
}
