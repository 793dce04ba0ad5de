"""Runs small enough to be worked out on paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as Rows
from torch import Tensor, nn

from clpeft.models.objective import CausalObjective, ClassificationObjective, Objective
from clpeft.training.run import Run


class Regression(nn.Module):
    """Softmax regression: token id i stands for the number `inputs[i]`; logits are w·x."""

    def __init__(self, inputs: Sequence[float], weight: Sequence[float], dropout: float) -> None:
        super().__init__()
        self.inputs = torch.tensor(inputs)
        self.weight = nn.Parameter(torch.tensor(weight))  # [labels]
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.dropout(self.inputs[input_ids[:, :1]])
        return SimpleNamespace(logits=x * self.weight)


class Bigrams(nn.Module):
    """A language model whose next-token logits are a table, one row per token."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocabulary, vocabulary))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def make_run(model: nn.Module, task_type: str, objective: Objective, **changes: Any) -> Run:
    config: Any = SimpleNamespace(
        seed=0,
        model=SimpleNamespace(task_type=task_type),
        training=SimpleNamespace(
            batch_size=8, gradient_accumulation=1, max_grad_norm=None, max_steps=None
        ),
    )
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"),
        autocast=nullcontext,
        scaler=None,
        process_index=0,
        num_processes=1,
        backward=lambda loss: loss.backward(),
        unscale_gradients=lambda optimizer: None,
    )
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    stream: Any = SimpleNamespace(tasks=())
    where = Path("nowhere")
    run = Run(config, where, accelerator, model, tokenizer, stream, objective, [], "base", "base")
    for name, value in changes.items():
        setattr(run, name, value)
    return run


@pytest.fixture
def regression() -> Callable[..., Run]:
    """A run whose model is softmax regression with two labels and one input."""

    def make(inputs: Sequence[float], weight: Sequence[float], *, dropout: float = 0.0) -> Run:
        allowed = torch.ones(1, len(weight), dtype=torch.bool)
        objective = ClassificationObjective(allowed)
        return make_run(Regression(inputs, weight, dropout), "sequence_classification", objective)

    return make


@pytest.fixture
def bigrams() -> Callable[[int], Run]:
    """A run whose model is a table of next-token logits, all 0."""

    def make(vocabulary: int) -> Run:
        return make_run(Bigrams(vocabulary), "causal_lm", CausalObjective())

    return make


@pytest.fixture
def examples() -> Callable[..., Dataset]:
    """Encoded examples from lists of token ids."""

    def make(
        rows: Sequence[Sequence[int]],
        labels: Sequence[int] | None = None,
        *,
        prompt_length: int | None = None,
        task: int = 0,
    ) -> Dataset:
        columns: dict[str, Any] = {
            "input_ids": [list(row) for row in rows],
            "label": list(labels) if labels is not None else [0] * len(rows),
            "task_id": [task] * len(rows),
            "example_id": list(range(len(rows))),
        }
        types = {"input_ids": Rows(Value("int32"))}
        types |= {name: Value("int64") for name in ("label", "task_id", "example_id")}
        if prompt_length is not None:
            columns["prompt_length"] = [prompt_length] * len(rows)
            types["prompt_length"] = Value("int32")
        return Dataset.from_dict(columns, features=Features(types))

    return make
