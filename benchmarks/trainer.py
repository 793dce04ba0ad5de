"""A whole run against the script that a user would write with transformers.Trainer."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.composed import config_of, loop_of
from clpeft.evaluation.generation import exact_match
from clpeft.training.run import Run

REPEATS = 3
OVERRIDES = [
    "experiment=standard_cl_prompts",
    "strategy=finetune",
    "stream.max_train=640",
    "stream.max_test=200",
    "evaluation.untrained=false",
    "evaluation.ahead=false",
    "training.checkpoint.enabled=false",
]


def measure(data_dir: str) -> dict[str, list[dict[str, float]]]:
    """Seconds of training and evaluation and the final average accuracy, by way of doing it."""
    rows: dict[str, list[dict[str, float]]] = {
        "clpeft": [],
        "clpeft, generating": [],
        "Trainer": [],
    }
    for _ in range(REPEATS):
        rows["clpeft"].append(ours(data_dir, "rank"))
        rows["clpeft, generating"].append(ours(data_dir, "generate"))
        rows["Trainer"].append(theirs(data_dir))
    return rows


def ours(data_dir: str, mode: str) -> dict[str, float]:
    """One run of the loop; what it shares with the other way (loading) is not timed."""
    config = config_of([*OVERRIDES, f"paths.data_dir={data_dir}", f"evaluation.mode={mode}"])
    with tempfile.TemporaryDirectory() as directory:
        loop = loop_of(config, Path(directory))
        started = time.perf_counter()
        loop.train()
        total = time.perf_counter() - started
    scores = [score for score in loop.matrix[-1] if score is not None]
    return {
        "total": total,
        "training": loop.cost.seconds["train"],
        "evaluation": loop.cost.seconds["evaluation"],
        "score": sum(scores) / len(scores),
    }


def theirs(data_dir: str) -> dict[str, float]:
    """The same model, data, steps and evaluation examples through Trainer and generate."""
    config = config_of([*OVERRIDES, f"paths.data_dir={data_dir}"])
    with tempfile.TemporaryDirectory() as directory:
        run = loop_of(config, Path(directory)).run
        seconds = {"training": 0.0, "evaluation": 0.0}
        scores: list[float] = []
        started = time.perf_counter()
        for task in run.stream.tasks:
            begun = time.perf_counter()
            batches = math.ceil(len(task.train) / config.training.batch_size)
            steps = config.training.epochs * batches
            arguments = TrainingArguments(
                output_dir=directory,
                per_device_train_batch_size=config.training.batch_size,
                num_train_epochs=config.training.epochs,
                learning_rate=config.optimizer.lr,
                warmup_steps=round(config.scheduler.warmup_ratio * steps),
                weight_decay=0.0,
                lr_scheduler_type="linear",
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
                use_cpu=not torch.cuda.is_available(),
                remove_unused_columns=False,
            )
            rows = [
                {"input_ids": ids, "prompt_length": length}
                for ids, length in zip(
                    task.train["input_ids"], task.train["prompt_length"], strict=True
                )
            ]
            trainer = Trainer(
                model=run.model,
                args=arguments,
                train_dataset=rows,
                data_collator=Padding(run.tokenizer.pad_token_id),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            seconds["training"] += time.perf_counter() - begun
            begun = time.perf_counter()
            scores = [generated_score(run, i) for i in range(task.index + 1)]
            seconds["evaluation"] += time.perf_counter() - begun
        total = time.perf_counter() - started
    return {"total": total, **seconds, "score": sum(scores) / len(scores)}


class Padding:
    """Pads a batch to its longest and masks the prompt out of the labels."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids, mask, labels = [], [], []
        for row in rows:
            tokens, prompt = list(row["input_ids"]), row["prompt_length"]
            padding = length - len(tokens)
            ids.append(tokens + [self.pad] * padding)
            mask.append([1] * len(tokens) + [0] * padding)
            labels.append([-100] * prompt + tokens[prompt:] + [-100] * padding)
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
        }


@torch.inference_mode()
def generated_score(run: Run, index: int) -> float:
    """Exact match of greedy answers on a task's test examples, in the data set's order."""
    task = run.stream.tasks[index]
    model: Any = run.model.eval()
    tokenizer = run.tokenizer
    prompts = [
        ids[:length]
        for ids, length in zip(task.test["input_ids"], task.test["prompt_length"], strict=True)
    ]
    wanted = [task.task.answer_words[label] for label in task.task.test["label"]]
    longest = max(map(len, run.stream.answers))
    size = run.config.evaluation.batch_size
    right = 0.0
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        width = max(map(len, part))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        right += sum(
            exact_match(text.strip(), [word])
            for text, word in zip(texts, wanted[first : first + size], strict=True)
        )
    return right / len(prompts)
