"""Which of several processes this is, before anything heavy is loaded."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes were started together, by `accelerate launch`, torchrun or the like."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> str | None:
    """How `accelerate launch` was told to cut the model into shards; None where it was not.

    Returns:
        fsdp1, fsdp2, zero1, zero2 or zero3.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return None


def is_main() -> bool:
    """Whether this is the process that writes; there is one per run."""
    return int(os.environ.get("RANK", "0")) == 0
