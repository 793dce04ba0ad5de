"""What stops a run that cannot go on: losses that are no numbers, and too little memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clpeft.config import RunError

if TYPE_CHECKING:
    from clpeft.streams.batch import Batch
    from clpeft.training.run import Run

SKIPS_AT_MOST = 100  # in a row
NAMED = 32  # example ids in a message, at most


class Guard:
    """Looks whether losses and gradients are finite.

    On a CPU at every step; on an accelerator, where looking would wait for the device, whenever
    values are logged or saved, and then for all steps since. With `skip` every step has to be
    waited for.

    Args:
        run: Whose.
        mode: `stop` or `skip`, `training.on_nan`.
    """

    def __init__(self, run: Run, mode: str) -> None:
        self.run = run
        self.mode = mode
        self._skipped = (-1, 0)  # the step after the last one that was left out; how many in a row
        self._pending: list[tuple[int, list[Tensor], Tensor]] = []

    def skips(self, logs: Mapping[str, float | Tensor]) -> bool:
        """Whether a step is to be left out; asked before strategies see its gradients and after.

        Args:
            logs: The step's losses.
        """
        if self.mode != "skip":
            return False
        run = self.run
        health = _losses(logs)
        if run.accelerator.scaler is None:  # which leaves such steps out by itself
            gradients = [p.grad for p in run.trainable.values() if p.grad is not None]
            health = health + 0.0 * torch.nn.utils.get_total_norm(gradients)
        (bad,) = run.agree(int(not bool(health.isfinite())))
        return bool(bad)

    def count_skip(self) -> None:
        """Takes note of a step that was left out.

        Raises:
            RunError: If many were, one after another: nothing would be learned any more.
        """
        run = self.run
        in_a_row = self._skipped[1] + 1 if self._skipped[0] == run.step else 1
        self._skipped = (run.step + 1, in_a_row)
        if in_a_row >= SKIPS_AT_MOST:
            raise RunError(
                f"{in_a_row} steps in a row, up to step {run.step + 1} in task {run.where}, had a "
                f"loss or gradient that is not finite, so nothing is learned any more; lower "
                f"optimizer.lr or the strategy's strength."
            )

    def watch(self, logs: Mapping[str, float | Tensor], batches: Sequence[Batch]) -> None:
        """Takes note of a step that is about to be made.

        Args:
            logs: Of the step: its losses, and the norm of its gradients where they are clipped.
            batches: What it is made from.

        Raises:
            RunError: If it can be seen at once that they are not finite.
        """
        if self.mode == "skip":
            return
        run = self.run
        health = _losses(logs)
        if run.accelerator.scaler is None and "train/grad_norm" in logs:
            # 0 where it is finite, else not a number; with a scaler infinities are in order
            health = health + 0.0 * logs["train/grad_norm"]
        self._pending.append((run.step + 1, [batch.example_ids for batch in batches], health))
        if health.device.type == "cpu" and run.world_size == 1:
            self.check()

    def check(self) -> None:
        """Raises for the first step whose loss or gradient was not finite.

        Raises:
            RunError: It names the step, the task and the examples.
        """
        run, pending = self.run, self._pending
        self._pending = []
        if not pending:
            return
        finite = torch.stack([health for _, _, health in pending]).isfinite().tolist()
        bad = next((k for k, ok in enumerate(finite) if not ok), None)
        (anywhere,) = run.agree(int(bad is not None))
        if not anywhere:
            return
        own = None
        if bad is not None:
            step, ids, _ = pending[bad]
            own = [step, *torch.cat([part.cpu() for part in ids]).tolist()]
        # every process says the same, with the examples of each that has such a step
        step, *named = min(found for found in run.gathered(own) if found is not None)
        listed = ", ".join(map(str, named[:NAMED])) + (", ..." if len(named) > NAMED else "")
        raise RunError(
            f"The loss or its gradient is not finite at step {step}, in task {run.where}, on the "
            f"examples {listed}; lower optimizer.lr, set training.max_grad_norm or "
            f"training.precision, or set training.on_nan=skip to leave such steps out."
        )


def _losses(logs: Mapping[str, float | Tensor]) -> Tensor:
    return torch.as_tensor(sum(v for name, v in logs.items() if name.startswith("train/loss/")))


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Says what to lower where memory does not suffice inside.

    Raises:
        RunError: In place of the library's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        config = run.config
        during = (
            f"training.batch_size={config.training.batch_size} (and raise "
            f"training.gradient_accumulation={config.training.gradient_accumulation} in its place)"
            if run.phase == "training"
            else f"evaluation.batch_size={config.evaluation.batch_size}"
        )
        more = ""
        if run.phase == "training" and not config.training.gradient_checkpointing:
            more = ", or set training.gradient_checkpointing=true"
        raise RunError(
            f"Out of memory in the {run.phase} of task {run.where}: lower {during} or "
            f"stream.max_length={config.stream.max_length}{more}."
        ) from error


def _lacks_memory(error: BaseException) -> bool:
    told: Any = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in told  # PyTorch on a CPU
        or "not enough memory" in told
    )
