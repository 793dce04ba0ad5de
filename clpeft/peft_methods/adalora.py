"""AdaLoRA (Zhang et al. 2023): LoRA as P·Λ·Q, its ranks given to the modules that need them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from omegaconf import MISSING
from torch import Tensor

from clpeft.config import ConfigError, above, at_least, between
from clpeft.models.targets import check_target
from clpeft.peft_methods.base import PeftMethodConfig
from clpeft.peft_methods.wrap import wrap
from clpeft.registry import PEFT_METHODS
from clpeft.strategies.base import Strategy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run

ADAPTER = "default"
RANKS = {"lora_E": 0, "lora_A": 0, "lora_B": 1}  # which dimension of Λ, Q and P they are in


def orthogonality(matrices: Sequence[Tensor]) -> Tensor:
    """Mean of ‖P Pᵀ − I‖_F over matrices.

    Args:
        matrices: Each [r, d].

    Source: Zhang et al. 2023, equation 4; as PEFT and the paper's code have it: the norm rather
        than its square, and the mean rather than the sum.
    """
    alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        alike[matrix.shape].append(matrix)
    norms = []
    for group in alike.values():
        stacked = torch.stack(group)
        grams = torch.bmm(stacked, stacked.transpose(1, 2))
        identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
        norms.append(torch.linalg.matrix_norm(grams - identity))
    return torch.cat(norms).mean()


def ranks_at(step: int, warmup: int, end: int, first: int, last: int) -> int:
    """How many ranks all modules together may keep: falls along a cubic from `first` to `last`.

    Args:
        step: Of the task, from 1.
        warmup: All are kept up to this step.
        end: From this step on `last` are kept.
        first: Ranks at the beginning.
        last: Ranks at the end.

    Source: Zhang et al. 2023, equation 12.
    """
    if step <= warmup:
        return first
    if step >= end:
        return last
    left = 1 - (step - warmup) / (end - warmup)
    return int(last + (first - last) * left**3)


@torch.no_grad()
def smooth(
    importance: list[Tensor],
    uncertainty: list[Tensor],
    parameters: list[Tensor],
    gradients: list[Tensor],
    beta1: float,
    beta2: float,
) -> None:
    """Takes |w·∂L/∂w| into running means of itself and of how far it is from that mean, in place.

    Source: Zhang et al. 2023, equations 8 to 10.
    """
    sensitivity = torch._foreach_mul(parameters, gradients)
    torch._foreach_abs_(sensitivity)
    torch._foreach_mul_(importance, beta1)
    torch._foreach_add_(importance, sensitivity, alpha=1 - beta1)
    torch._foreach_sub_(sensitivity, importance)
    torch._foreach_abs_(sensitivity)
    torch._foreach_mul_(uncertainty, beta2)
    torch._foreach_add_(uncertainty, sensitivity, alpha=1 - beta2)


def triplet_scores(values: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """How much each triplet matters, [r].

    Args:
        values: Scores of Λ's entries, [r, 1].
        left: Scores of P's, [d_out, r].
        right: Scores of Q's, [r, d_in].

    Source: Zhang et al. 2023, equation 7.
    """
    return values[:, 0] + left.mean(dim=0) + right.mean(dim=1)


def kept_entries(scores: Sequence[Tensor], ranks: int) -> list[Tensor]:
    """Which triplets are among the `ranks` best of all modules: bool [r] per module."""
    together = torch.cat(list(scores))
    kept = torch.zeros_like(together, dtype=torch.bool)
    kept[together.topk(ranks).indices] = True
    return list(kept.split([len(part) for part in scores]))


def with_new_ranks(saved: Tensor, new: Tensor, ranks: int) -> Tensor:
    """A matrix that ranks were taken from, with new ones behind those that are left.

    Args:
        saved: Λ's entries [k, 1], Q [k, d_in] or P [d_out, k].
        new: The same as it is drawn, with r ranks. Λ's entries are 0 then, so that new ranks add
            nothing until they have learned something.
        ranks: The dimension that the ranks are in.

    Returns:
        With r ranks; as it is saved, if it is of a model of other sizes.
    """
    if saved.shape[1 - ranks] != new.shape[1 - ranks]:
        return saved
    count = saved.shape[ranks]
    return torch.cat([saved, new.narrow(ranks, count, new.shape[ranks] - count)], dim=ranks)


class RankAllocation(Strategy):
    """What AdaLoRA does to training: ΔW = s·P·Λ·Q, and of all modules' triplets the best stay.

    The loss gets γ·mean(‖PᵀP − I‖_F, ‖QQᵀ − I‖_F). At each step of a task the importance
    |w·∂L/∂w| of every weight is taken into running means; every `deltaT` steps the entries of Λ
    whose triplets (a column of P, an entry, a row of Q) score least are set to 0, and may grow
    again. How many are left falls along a cubic from `init_r` to `target_r` per module; in the
    last `tfinal` of the task's steps the choice stands, and what was set to 0 stays 0.

    Each task allocates afresh, over the steps that it really has; the weights go on.

    PEFT's own allocator is not used: it is called once per step, where it reads gradients and sets
    entries to 0 together, so that either the importance is that of weights which the optimizer has
    changed since, or the optimizer moves what was just set to 0, which is then cut off when the
    adapter is saved. Here the importance is taken before the step and entries are set to 0 after
    it, as in the paper's algorithm 1.

    Source: Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
        Fine-Tuning.
    """

    config: AdaLoraSettings
    # gradients are alike in all processes, and so is what comes of them
    supports_multi_process = True

    def setup(self, run: Run) -> None:
        from peft.tuners.adalora.layer import AdaLoraLayer

        model: Any = run.model
        self._saved = model.peft_config[ADAPTER]
        self._layers: dict[str, Any] = {
            path.removeprefix("base_model.model."): module
            for path, module in model.named_modules()
            if isinstance(module, AdaLoraLayer)
        }
        layers = self._layers.values()
        self._values = [layer.lora_E[ADAPTER] for layer in layers]  # [r, 1]
        self._left = [layer.lora_B[ADAPTER] for layer in layers]  # [d_out, r]
        self._right = [layer.lora_A[ADAPTER] for layer in layers]  # [r, d_in]
        self._parameters = [*self._values, *self._left, *self._right]
        self._betas = (self.config.beta1, self.config.beta2)
        self._begin()

    def before_task(self, run: Run, task: EncodedTask) -> None:
        self._begin()

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        matrices = [*self._right, *(matrix.T for matrix in self._left)]
        return {"adalora_orthogonality": self.config.orth_reg_weight * orthogonality(matrices)}

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes none; takes the weights' importance from them, and logs the ranks there are."""
        self._steps = run.steps_of_task
        if not self._settled:
            gradients = [
                torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters
            ]
            # in fp16 they may overflow, and the step is left out
            if run.accelerator.scaler is None or _are_finite(gradients):
                means, betas = (self._importance, self._uncertainty), self._betas
                smooth(*means, self._parameters, gradients, *betas)
        return {"adalora/rank": self._ranks / len(self._layers)}

    def after_step(self, run: Run) -> None:
        step, (warmup, end) = run.step_of_task, self._schedule()
        if self._settled:
            self._cut()
        elif step >= end:
            self._settle()
        elif step > warmup and step % self.config.deltaT == 0:
            self._allocate(ranks_at(step, warmup, end, self._most, self._fewest))

    def after_task(self, run: Run, task: EncodedTask) -> None:
        # its last steps may have been left out, and a task may have had none
        if self._steps and not self._settled:
            self._settle()
        self._describe()

    def state_dict(self) -> dict[str, Any]:
        return {
            "importance": self._importance,
            "uncertainty": self._uncertainty,
            "kept": self._kept,
            "ranks": self._ranks,
            "settled": self._settled,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._values[0].device
        for name in ("importance", "uncertainty", "kept"):
            setattr(self, f"_{name}", [tensor.to(device) for tensor in state[name]])
        self._ranks = state["ranks"]
        self._settled = state["settled"]
        self._steps = state["steps"]
        self._describe()

    def _begin(self) -> None:
        """As every task begins: with all ranks, and nothing known of their importance."""
        self._importance = [torch.zeros_like(p) for p in self._parameters]
        self._uncertainty = [torch.zeros_like(p) for p in self._parameters]
        self._most = sum(len(values) for values in self._values)
        self._fewest = self.config.target_r * len(self._layers)
        self._ranks = self._most
        self._kept: list[Tensor] = []  # 1 for an entry of Λ that is left, 0 for one that is not
        self._settled = False
        self._steps = 0

    def _schedule(self) -> tuple[int, int]:
        """Up to which step all ranks are kept, and at which the last choice is made."""
        total = self._steps
        return int(self.config.tinit * total), total - int(self.config.tfinal * total)

    def _settle(self) -> None:
        self._allocate(self._fewest)
        self._settled = True
        self._importance, self._uncertainty = [], []

    def _allocate(self, ranks: int) -> None:
        scores = torch._foreach_mul(self._importance, self._uncertainty)
        count = len(self._layers)
        parts = zip(scores[:count], scores[count : 2 * count], scores[2 * count :], strict=True)
        kept = kept_entries([triplet_scores(*part) for part in parts], ranks)
        self._kept = [
            entries.to(v.dtype).view_as(v) for entries, v in zip(kept, self._values, strict=True)
        ]
        self._ranks = ranks
        self._cut()

    @torch.no_grad()
    def _cut(self) -> None:
        torch._foreach_mul_(self._values, self._kept)

    def _describe(self) -> None:
        """Tells PEFT which ranks are left, for it to save those only, and by what schedule."""
        if not self._settled:
            return
        self._saved.rank_pattern = {
            f"{path}.lora_E": kept.bool().flatten().tolist()
            for path, kept in zip(self._layers, self._kept, strict=True)
        }
        warmup, end = self._schedule()
        self._saved.total_step = self._steps
        self._saved.tinit, self._saved.tfinal = warmup, self._steps - end


def _are_finite(tensors: list[Tensor]) -> bool:
    return bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all())


@dataclass
class AdaLoraSettings(PeftMethodConfig):
    """Settings of AdaLoRA."""

    init_r: int = at_least(2)  # ranks per module at the beginning of each task
    target_r: int = at_least(1)  # ranks per module at its end, on average
    alpha: float = above(0)
    dropout: float = between(0, 1)
    target: Any = MISSING  # minimal, attention, all-linear, or a list of module names
    tinit: float = between(0, 1)  # share of a task's steps before ranks are taken away
    tfinal: float = between(0, 1)  # share of a task's steps after it, with the ranks left
    deltaT: int = at_least(1)  # steps from one allocation to the next
    beta1: float = between(0, 1)  # of the running mean of importance
    beta2: float = between(0, 1)  # of the running mean of its uncertainty
    orth_reg_weight: float = at_least(0)  # of the term that keeps P and Q orthogonal
    modules_to_save: list[str] | None = None  # trained whole, beside the task head

    companion: ClassVar[type[Strategy] | None] = RankAllocation
    # which ranks are left belongs to a task, and `r` is LoRA's, which AdaLoRA does not read
    of_training: ClassVar[frozenset[str]] = frozenset(
        """rank_pattern r target_r total_step tinit tfinal deltaT beta1 beta2
        orth_reg_weight""".split()
    )

    @property
    def trained_whole(self) -> list[str]:
        return self.modules_to_save or []

    def to_go_on(self, saved: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ranks that were taken away come again, as at the beginning of every task."""
        whole = {
            name: with_new_ranks(saved[name], new[name], RANKS[part])
            for name in saved.keys() & new.keys()
            if (part := name.rpartition(".")[2]) in RANKS
        }
        return saved | whole

    def check(self) -> None:
        check_target(self.target)
        if self.target_r >= self.init_r:
            raise ConfigError(
                f"peft.target_r={self.target_r} leaves nothing to take away from peft.init_r="
                f"{self.init_r} ranks per module; it must be less."
            )
        if self.tinit + self.tfinal >= 1:
            raise ConfigError(
                f"peft.tinit={self.tinit} and peft.tfinal={self.tfinal} are shares of a task's "
                f"steps that leave none in which ranks are taken away; they must add up to less "
                f"than 1."
            )
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < beta < 1:
                raise ConfigError(f"peft.{name}={beta} must be between 0 and 1, such as 0.85.")


@PEFT_METHODS.register("adalora", config=AdaLoraSettings)
def apply_adalora(
    model: PreTrainedModel, config: AdaLoraSettings, task_type: str, new: Sequence[str]
) -> PeftModel:
    """Freezes the model and puts AdaLoRA on its target modules.

    Raises:
        ConfigError: If no module of the model matches `config.target`.
    """
    from peft import AdaLoraConfig

    return wrap(
        model,
        AdaLoraConfig,
        task_type,
        new,
        target=config.target,
        init_r=config.init_r,
        target_r=config.target_r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        deltaT=config.deltaT,
        beta1=config.beta1,
        beta2=config.beta2,
        orth_reg_weight=config.orth_reg_weight,
        total_step=1,  # until a task's own is known
        modules_to_save=config.modules_to_save,
    )
