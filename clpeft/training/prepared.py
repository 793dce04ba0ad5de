"""The model as a task's steps run it: wrapped by Accelerate, compiled where that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clpeft.models.quantize import not_broadcast

if TYPE_CHECKING:
    from clpeft.training.run import Run

BACKEND = "inductor"  # PyTorch's own, for CPUs and GPUs
# a task may make it necessary, as new adapters and autocast do; past PyTorch's own limit of 8 a
# long stream would go on uncompiled and say nothing
RECOMPILED_AT_MOST = 256


def prepare(run: Run) -> None:
    """Wraps the model and its optimizer for the steps of a task.

    With `training.compile` it is the forward pass of `run.prepared` alone that is compiled, and
    `run.model` stays as it is: parameters keep their names, and whoever asks the model itself, as
    strategies do in passes of their own, with hooks on its modules that a compiled pass would go
    past, has it run as ever.

    Args:
        run: At the beginning of a task, its optimizer made.
    """
    run.model._ddp_params_and_buffers_to_ignore = not_broadcast(run.model)  # type: ignore[assignment]
    run.prepared, run.optimizer = run.accelerator.prepare(run.model, run.optimizer)
    if run.config.training.compile:
        torch._dynamo.config.recompile_limit = RECOMPILED_AT_MOST
        # for all lengths at once: which batch came first, on resume, must not decide what is run
        run.prepared = torch.compile(run.prepared, backend=BACKEND, dynamic=True)  # type: ignore[assignment]


def release(run: Run) -> None:
    """Takes the model out of its wrapping, and lets go of the optimizer."""
    run.model = run.accelerator.unwrap_model(
        run.prepared, keep_fp32_wrapper=False, keep_torch_compile=False
    )
    # else Accelerate takes it for prepared at the next task and leaves its autocast off
    run.model._is_accelerate_prepared = False  # type: ignore[assignment]
    run.prepared = run.model
    run.accelerator.free_memory()
    run.optimizer = None
