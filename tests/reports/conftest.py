"""Run directories written by hand, with matrices whose metrics can be worked out on paper."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

TASKS = ["moods", "goods", "weather"]
UNTRAINED = [0.25, 0.25, 0.25]
N = None

# By hand, per strategy and seed. Row t is after t tasks; the comments give the average accuracy
# (mean of the last row) and the forgetting (mean over the first two tasks of best minus last).
MATRICES: dict[tuple[str, int], list[list[float | None]]] = {
    # .6 and .45; learning accuracy .9
    ("finetune", 0): [UNTRAINED, [0.9, 0.3, N], [0.5, 0.9, 0.35], [0.3, 0.6, 0.9]],
    # .5 and .5; learning accuracy 2.5 / 3
    ("finetune", 1): [UNTRAINED, [0.8, 0.3, N], [0.4, 0.8, 0.35], [0.2, 0.4, 0.9]],
    # .8 and .15
    ("replay", 0): [UNTRAINED, [0.9, 0.25, N], [0.8, 0.9, 0.25], [0.7, 0.8, 0.9]],
    # .75 and .225
    ("replay", 1): [UNTRAINED, [0.9, 0.25, N], [0.7, 0.9, 0.25], [0.6, 0.75, 0.9]],
    # .7 and .3
    ("replay", 2): [UNTRAINED, [0.9, 0.25, N], [0.7, 0.9, 0.25], [0.5, 0.7, 0.9]],
    # .6 and .15
    ("ewc", 0): [UNTRAINED, [0.7, 0.25, N], [0.6, 0.7, 0.25], [0.5, 0.6, 0.7]],
    # .9; nothing between the first row and the last
    ("joint", 0): [UNTRAINED, [N, N, N], [N, N, N], [0.95, 0.9, 0.85]],
    # the S_i are .96, .92, .88 and .9, .9, .9
    ("independent", 0): [UNTRAINED, [0.96, N, N], [0.96, 0.92, N], [0.96, 0.92, 0.88]],
    ("independent", 1): [UNTRAINED, [0.9, N, N], [0.9, 0.9, N], [0.9, 0.9, 0.9]],
}
SECONDS_PER_STEP = {
    ("finetune", 0): 0.1,
    ("finetune", 1): 0.2,
    ("replay", 0): 0.15,  # 1.5 times finetune's
    ("replay", 1): 0.5,  # 2.5 times
    ("replay", 2): 9.0,  # finetune has no seed 2
    ("ewc", 0): 0.12,
}
SETTINGS = {"replay": {"memory": 20}, "ewc": {"lambda_": 100.0}}

WriteRun = Callable[..., Path]


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:8]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """A function that writes one completed run and returns its directory."""

    def write(
        strategies: list[str],
        seed: int,
        matrix: list[list[float | None]],
        *,
        config: dict[str, Any] | None = None,
        where: str = "sweep",
        **changes: Any,
    ) -> Path:
        resolved: dict[str, Any] = {
            "model": {"name": "tiny_llama"},
            "peft": {"name": "lora", "r": 8},
            "strategies": {name: SETTINGS.get(name, {}) for name in strategies},
            "stream": {"kind": "toy", "name": "toy"},
            "optimizer": {"name": "adamw", "lr": 0.001},
            "training": {"epochs": 2, "checkpoint": {"keep": 2}},
            "paths": {"output_dir": str(tmp_path)},
            "seed": seed,
            **(config or {}),
        }
        study = {k: v for k, v in resolved.items() if k not in ("seed", "paths")}
        setting = {k: resolved[k] for k in ("model", "peft", "stream")}
        tasks = changes.get("tasks", TASKS[: len(matrix) - 1])
        results = {
            "schema": 1,
            "name": f"{'+'.join(strategies)}-s{seed}-{digest(study, seed)}",
            "stream": "toy",
            "order": None,
            "scenario": "domain",
            "model": "tiny_llama",
            "task_type": "causal_lm",
            "peft": "lora",
            "strategies": strategies,
            "bound": strategies[0] in ("joint", "independent", "cumulative"),
            "seed": seed,
            "digests": {
                "run": digest(study, seed),
                "family": digest(study),
                "setting": digest(setting),
            },
            "tasks": tasks,
            "metric": dict.fromkeys(tasks, "accuracy"),
            "split": "test",
            "test_sizes": [100] * len(tasks),
            "chance": [None] * len(tasks),
            "matrix": matrix,
            "metrics": {},
            "undefined": {},
            "evaluation": {"mode": "rank", "task_id_given": False},
            "cost": {
                "train_seconds": 60.0 + seed,
                "evaluation_seconds": 5.0,
                "total_seconds": 70.0,
                "steps": 300,
                "seconds_per_step": SECONDS_PER_STEP.get((strategies[0], seed), 0.1),
                "peak_memory_bytes": (seed + 1) * 2**20,
                "state_bytes": [0, 1024, 2048],
                "steps_per_second": 5.0,
                "trained_bytes": 40_000,
                "adapter_bytes": 3000 + 3000 * seed,
                "base_bytes": 2 * 2**20,
            },
            "parameters": {"total": 1_000_000, "trainable": 10_000, "percent": 1.0},
            "environment": {"torch": "2.13.0", "git_commit": "c0ffee1", "device": "cpu"},
            **changes,
        }
        directory = tmp_path / where / str(results["stream"]) / str(results["name"])
        directory.mkdir(parents=True)
        (directory / "results.json").write_text(json.dumps(results))
        (directory / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
        status = {"status": "completed", "host": "node7"}
        (directory / "status.json").write_text(json.dumps(status))
        return directory

    return write


@pytest.fixture
def write_status(tmp_path: Path) -> WriteRun:
    """A function that writes a run directory without results."""

    def write(name: str, where: str = "sweep", **status: Any) -> Path:
        directory = tmp_path / where / "toy" / name
        directory.mkdir(parents=True)
        (directory / "status.json").write_text(json.dumps(status))
        strategy, seed, _ = name.split("-")
        config = {"strategies": {strategy: {}}, "seed": int(seed[1:])}
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        return directory

    return write


@pytest.fixture
def sweep(tmp_path: Path, write_run: WriteRun, write_status: WriteRun) -> Path:
    """A sweep of five strategies, with one run failed, one running and one preempted."""
    for (strategy, seed), matrix in MATRICES.items():
        write_run([strategy], seed, matrix)
    write_status(
        "olora-s0-dead0000",
        status="failed",
        exception="Traceback (most recent call last):\n  ...\nRuntimeError: singular <matrix>\n",
        host="node7",
    )
    write_status("agem-s0-beef0000", status="running", started=1735787045.5)
    write_status("agem-s1-beef0001", status="preempted", reason="SIGTERM at step 40")
    return tmp_path / "sweep"
