"""A run that observers can be told about, without running one."""

from pathlib import Path

import pytest

from clpeft.tracking.base import RunInfo

MATRIX = [[0.25, 0.5], [0.875, 0.5], [0.625, 1.0]]
RESULTS = {
    "matrix": MATRIX,
    "tasks": ["north", "south"],
    "metrics": {"average_accuracy": 0.8125, "forgetting": 0.25},
    "undefined": {"intransigence": "needs the scores of independently trained models"},
    "cost": {"train_seconds": 12.5, "state_bytes": [0, 64]},
    "warnings": [{"text": "ewc does nothing: its penalty stayed 0.", "advice": "Raise it."}],
}


@pytest.fixture(scope="session")
def run_info():
    """A `RunInfo` with any of its fields changed."""

    def make(**changes):
        values = {
            "directory": Path("outputs/toy/ewc+replay-s0-1a2b3c4d"),
            "name": "ewc+replay-s0-1a2b3c4d",
            "group": "ewc+replay-5e6f7a8b",
            "config": {
                "optimizer": {"name": "adamw", "lr": 0.001, "betas": [0.9, 0.999]},
                "strategies": {"ewc": {"lambda_": 10.0}, "replay": {}},
                "seed": 0,
            },
            "tasks": ("north", "south"),
            "stream": "toy",
            "strategies": ("ewc", "replay"),
            "seed": 0,
            "total_parameters": 1_234_567,
            "trainable_parameters": 12_345,
        }
        return RunInfo(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def play():
    """Tells an observer of a whole run of two tasks with two steps each."""

    def tell(observer, info, exit_code=0, results=RESULTS):
        observer.on_run_start(info)
        observer.on_evaluation(0, MATRIX[0])
        step = 0
        for index, name in enumerate(info.tasks):
            observer.on_task_start(index, name, 2)
            for logs in (None, {"train/loss": 1.0 / (index + 1), "train/lr": 0.001}):
                step += 1
                observer.on_step(step, logs)
            observer.on_evaluation(index + 1, MATRIX[index + 1])
            observer.on_task_end(index)
        observer.close(exit_code, results)

    return tell
