"""Random states: one seed per task and process, and what a checkpoint keeps of them."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed of its own for one purpose of a run: 0 to 2**32 - 1, what numpy takes.

    Args:
        seed: The run's.
        purpose: What tells this use from others, such as "task", 3.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def random_states(generator: torch.Generator) -> dict[str, Any]:
    """The states of every source of random numbers that training may draw from.

    Args:
        generator: The run's own.
    """
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "run": generator.get_state(),
        "python": random.getstate(),
        # safetensors has no unsigned 32-bit numbers
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }


def set_random_states(states: dict[str, Any], generator: torch.Generator) -> None:
    """Puts back what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    generator.set_state(states["run"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
