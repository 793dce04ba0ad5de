"""Devices and processes, as Accelerate finds them."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from clpeft.config import RunError
from clpeft.processes import world_size


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate's view of the devices and of the other processes, if there are any.

    Raises:
        RunError: If the processes that were started together do not find each other.
    """
    # an earlier run in this process, in a sweep, may have had another precision
    AcceleratorState._reset_state()
    # several processes without accelerators have to be told that they train on the CPU
    cpu = world_size() > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    if accelerator.num_processes != world_size():
        # each would train alone, and write over what the others do
        raise RunError(
            f"WORLD_SIZE says that {world_size()} processes train together, but Accelerate sees "
            f"{accelerator.num_processes}; start them with `accelerate launch` or torchrun."
        )
    return accelerator
