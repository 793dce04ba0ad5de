"""One table for all matrix tests: how each strategy is made to show on a tiny stream.

A new strategy adds one row here, and is then trained, resumed, saved, combined and compared by
tests/integration.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """How a strategy is run, and by what it must show."""

    overrides: tuple[str, ...] = ()
    # the logged value that is not zero from task 2 on, and is absent or zero in task 1
    trace: str | None = None
    # what shows that it acts beside replay, where that may leave it nothing to change
    beside_replay: str | None = None
    keeps_state: bool = True  # whether its state after task 1 holds tensors
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
    "ewc": Setting(
        ("strategies.ewc.lambda_=20", "strategies.ewc.fisher_examples=8"),
        trace="train/loss/ewc",
    ),
    "l2": Setting(("strategies.l2.lambda_=0.5",), trace="train/loss/l2"),
    "mas": Setting(
        ("strategies.mas.lambda_=20", "strategies.mas.examples=8"),
        trace="train/loss/mas",
    ),
    "online_ewc": Setting(
        ("strategies.online_ewc.lambda_=20", "strategies.online_ewc.fisher_examples=8"),
        trace="train/loss/online_ewc",
    ),
    "si": Setting(("strategies.si.lambda_=20",), trace="train/loss/si"),
    "finetune": Setting(keeps_state=False),
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


def side_by_side(strategy: str) -> list[str]:
    """The names in `one+other`; and of one alone, that of the one it could not run without."""
    names = strategy.split("+")
    partner = STRATEGY_SETTINGS[names[0]].beside if len(names) == 1 else None
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
    "peft.r=8",
    "peft.alpha=16",
    "peft.target=auto",
    "peft.dropout=0.1",
    "tracking.log_every=1",
    "tracking.console=false",
    "tracking.wandb.mode=disabled",
    "training.checkpoint.keep=100",
)

# The three families, as small as they go, and warmed up for gradients to mean something.
_WARMUP = (
    "model.warmup.steps=150",
    "model.warmup.batch_size=16",
    "model.warmup.length=32",
    "model.warmup.lr=1e-2",
    "model.warmup.vocabulary=600",
)
TASK_TYPES = {
    "tiny_llama": "causal_lm",
    "tiny_bert": "sequence_classification",
    "tiny_t5": "seq2seq_lm",
}
TINY_MODELS = {
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
