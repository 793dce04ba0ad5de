"""Which of several processes this is, before anything heavy is loaded."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes were started together, by `accelerate launch`, torchrun or the like."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes; there is one per run."""
    return int(os.environ.get("RANK", "0")) == 0
