from __future__ import annotations
from collections.abc import Callable
from typing import Any
import pytest, torch, clpeft
from tests.running import Outcome


def accuracy(loaded, run, k, i):
    task = run.stream.stream.tasks[i - 1]
    names = run.stream.stream.label_names
    ids = run.stream.stream.global_labels(i - 1)
    predicted = loaded.predict(task.test["text"], task=i)
    right = [p == names[ids[l]] for p, l in zip(predicted, task.test["label"], strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert", "tiny_t5"])
def test_x(finished, model):
    o = finished("finetune", model=model)
    loaded = clpeft.load(o.directory, "all")
    m = o.results["matrix"]
    print(m)
    for k in (1, 2, 3):
        loaded.use(k)
        for i in range(1, min(k + 1, 3) + 1):
            print(k, i, accuracy(loaded, o.run, k, i), m[k][i - 1])
            assert accuracy(loaded, o.run, k, i) == m[k][i - 1]
