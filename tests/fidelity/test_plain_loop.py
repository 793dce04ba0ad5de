"""`finetune` is plain fine-tuning: the same bits as a loop that anyone would write.

The loop below shares no code with clpeft but the order of the examples, which a seed decides: the
model comes from transformers and PEFT, the loss is the model's own, the batches are padded by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from clpeft.streams.batching import bucketed_batches
from tests.running import Outcome, run_it, same_bits

SEED, BATCH, EPOCHS, LR, WARMUP_STEPS = 7, 8, 2, 5e-3, 2
CLIP = 1.0  # some of the norms are larger, some smaller
SETTINGS = (
    f"seed={SEED}",
    "stream.num_tasks=2",
    "stream.train_size=36",  # the last batch of an epoch is smaller
    "scheduler=linear",
    "scheduler.warmup_ratio=0.2",  # of ten steps
    "optimizer.lr=5e-3",
)


def padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def causal_inputs(examples: list[dict[str, Any]]) -> dict[str, Any]:
    ids = [example["input_ids"] for example in examples]
    answers = [
        [-100] * example["prompt_length"] + example["input_ids"][example["prompt_length"] :]
        for example in examples
    ]
    # logits of the prompts are not computed: products of other shapes round differently
    labels = padded(answers, -100)
    kept = labels.shape[1] - min(example["prompt_length"] for example in examples) + 1
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": labels[:, -kept:],
        "logits_to_keep": kept,
    }


def classifier_inputs(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


def seq2seq_inputs(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded([example["labels"] for example in examples], -100),
    }


INPUTS = {
    "tiny_llama": causal_inputs,
    "tiny_bert": classifier_inputs,
    "tiny_t5": seq2seq_inputs,
}
LORA = {
    "tiny_llama": {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]},
    # the pooler is new: the base is a language model
    "tiny_bert": {
        "task_type": "SEQ_CLS",
        "target_modules": ["query", "value"],
        "modules_to_save": ["pooler.dense"],
    },
    "tiny_t5": {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]},
}


def load(kind: str, base: Path) -> Any:
    """The model with its adapter, as transformers' and PEFT's documentation has it."""
    if kind == "tiny_bert":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
    else:
        auto = AutoModelForCausalLM if kind == "tiny_llama" else AutoModelForSeq2SeqLM
        model = auto.from_pretrained(base)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, **LORA[kind]))


def plain_loop(
    model: Any,
    tasks: list[list[dict[str, Any]]],
    inputs: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    clip: float,
) -> list[float]:
    """Trains on one task after another; returns the losses."""
    losses = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for index, examples in enumerate(tasks):
        batches = -(-len(examples) // BATCH)
        steps = EPOCHS * batches

        def factor(step: int, steps: int = steps) -> float:
            if step < WARMUP_STEPS:
                return (step + 1) / WARMUP_STEPS
            return 1.0 - (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)

        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples]).numpy()
        model.train()
        # every task has a seed of its own, so that what is drawn in one changes no other
        seed = hashlib.sha256(f"{SEED}/steps/{index}/0".encode()).digest()[:4]
        torch.manual_seed(int.from_bytes(seed, "big"))
        for epoch in range(EPOCHS):
            order = bucketed_batches(lengths, BATCH, seed=SEED * 10_007 + index, epoch=epoch)
            for rows in order:
                loss = model(**inputs([examples[row] for row in rows])).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_bert", "tiny_t5"])
def test_finetune_is_the_plain_loop_bit_by_bit(
    finished: Callable[..., Outcome], bases: Callable[[str], Path], kind: str
) -> None:
    outcome = finished("finetune", *SETTINGS, f"training.max_grad_norm={CLIP}", model=kind)
    tasks = [list(task.train) for task in outcome.run.stream.tasks]
    torch.manual_seed(SEED)
    model = load(kind, bases(kind))
    losses = plain_loop(model, tasks, INPUTS[kind], CLIP)

    assert len(losses) == 2 * EPOCHS * 5
    assert [step["train/loss"] for step in outcome.logged_steps] == losses
    plain = {name: p.detach() for name, p in model.named_parameters()}
    assert same_bits(outcome.after, plain)
    # clipping had something to do, and not always
    norms = [step["train/grad_norm"] for step in outcome.logged_steps]
    assert min(norms) < CLIP < max(norms)


def test_watching_changes_no_bit(
    finished: Callable[..., Outcome],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    unwatched = finished("finetune")
    watched = run_it(
        tiny(
            "finetune",
            "tracking.wandb.mode=offline",
            "tracking.console=true",
            "tracking.tensorboard=true",
        ),
        tmp_path / "watched",
    )

    assert list((tmp_path / "watched" / "wandb").rglob("*.wandb"))
    assert same_bits(watched.after, unwatched.after)
    assert watched.results["matrix"] == unwatched.results["matrix"]
    losses = [step["train/loss"] for step in unwatched.logged_steps]
    assert [step["train/loss"] for step in watched.logged_steps] == losses


def test_how_often_values_are_logged_changes_no_bit(
    finished: Callable[..., Outcome], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    # what only logging steps compute must not be missed at the others
    for name in ("ewc", "olora"):
        often = finished(name)
        seldom = run_it(tiny(name, "tracking.log_every=1000"), tmp_path / name)

        assert same_bits(seldom.after, often.after)
        # five of a task's eight steps are always logged: where a fifth of them is complete
        logged = [step["step"] for step in seldom.logged_steps]
        assert logged == [task * 8 + step for task in range(3) for step in (2, 4, 5, 7, 8)]
