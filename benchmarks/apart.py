"""Short runs in processes of their own, in whose memory nothing else has a part.

`python -m benchmarks.apart OVERRIDE...` prints what one took as a line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # before memory is first looked at: a run imports it late
import psutil
import torch

from benchmarks.composed import config_of, loop_of
from clpeft.models.load import count_parameters

# nothing is written and nothing is scored that a measurement does not ask for
SHORT = (
    "training.checkpoint.enabled=false",
    "tracking.log_every=1000",
    "evaluation.untrained=false",
)


def trained(overrides: list[str]) -> dict[str, Any]:
    """Trains a run.

    Args:
        overrides: As a command line has them.

    Returns:
        The costs that results have, and beside them `score`, of the first task after the last;
        `trained_percent`, of the parameters; `before_bytes`, the process's memory when the model
        was not loaded yet.
    """
    config = config_of([*SHORT, *overrides])
    before = psutil.Process().memory_info().rss  # Python and its libraries
    with tempfile.TemporaryDirectory() as folder:
        loop = loop_of(config, Path(folder))
        loop.train()
        cost = loop.cost.summary(loop.run)
    total, _ = count_parameters(loop.run.model)
    number = sum(parameter.numel() for parameter in loop.run.trainable.values())
    return {
        **cost,
        "score": loop.matrix[-1][0],
        "trained_percent": 100 * number / total,
        "before_bytes": before,
    }


def trained_apart(overrides: list[str]) -> dict[str, Any]:
    """`trained`, in a process of its own, whose complaints are shown."""
    command = [sys.executable, "-m", "benchmarks.apart", *overrides]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(trained(sys.argv[1:])))
