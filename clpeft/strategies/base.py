"""The contract between a strategy and the loop."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from clpeft.config import Config, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from torch import Tensor

    from clpeft.streams.batch import Batch
    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run


@dataclass
class StrategyConfig:
    """Settings of a strategy that has none."""


class Evidence(StrEnum):
    """How a logged value shows, from the second task on, that a strategy does something."""

    PENALTY = "penalty"  # a regulariser's value, to be neither lost beside the task's loss nor all
    TERM = "term"  # another term of the loss, or a count, which must not stay 0
    GRADIENT = "gradient"  # how much, or how often, gradients were changed; must not stay 0
    MEMORY = "memory"  # how many examples were read so far, over the whole run; must grow
    MASK = "mask"  # a number that tells of a mask, such as the share in use; must change


class Strategy:
    """A continual-learning strategy: it changes training through hooks; each is optional.

    Hooks take values and return values; gradients are the one thing changed in place. A strategy
    never owns the optimizer and never calls backward on the loop's graph. Every public method of
    a subclass must be a hook below, so that a misspelt hook is an error when the class is defined
    rather than a strategy that silently does nothing; helpers start with an underscore.

    Args:
        config: The settings, an instance of the dataclass the strategy was registered with.
    """

    # What the strategy can do; checked when a run is composed, before a model is loaded.
    needs_task_id_at_eval: ClassVar[bool] = False
    owns_adapters: ClassVar[bool] = False  # swaps, grows or freezes the adapter's parameters
    task_types: ClassVar[frozenset[str]] = frozenset(
        {"sequence_classification", "causal_lm", "seq2seq_lm"}
    )
    task_types_reason: ClassVar[str | None] = None  # why only those, as the end of a sentence
    peft_types: ClassVar[frozenset[str] | None] = None  # None: any, `full` included
    supports_quantized: ClassVar[bool] = True
    supports_multi_process: ClassVar[bool] = False  # copies of the model side by side (DDP)
    # what else it was seen to work with of fsdp2, zero2 and zero3, which cut the model into shards
    supports_sharding: ClassVar[frozenset[str]] = frozenset()
    supports_gradient_accumulation: ClassVar[bool] = True
    # A reference point (a bound or the plain baseline) rather than a method: runs alone.
    is_reference: ClassVar[bool] = False
    is_bound: ClassVar[bool] = False
    # By what it shows that it does something, looked at after every run and by `clpeft doctor`:
    # a logged key without `train/` -> its kind, as in {"loss/ewc": Evidence.PENALTY}.
    evidence: ClassVar[Mapping[str, Evidence]] = {}
    # keeps examples of earlier tasks or generates them, and lets others object to each
    rehearses: ClassVar[bool] = False
    # Strategies it cannot be combined with: name -> the reason, as the end of a sentence.
    conflicts: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, member in vars(cls).items():
            if name[0] != "_" and inspect.isfunction(member) and name not in HOOKS:
                raise TypeError(
                    f"{cls.__name__}.{name} is not a hook of Strategy, so nothing would call it."
                    f"{nearest(name, HOOKS)} (helpers start with an underscore)"
                )
        for key, kind in cls.evidence.items():
            if not isinstance(kind, Evidence) or "/" not in key or key.startswith("train/"):
                raise TypeError(
                    f"{cls.__name__}.evidence maps a logged key without train/, such as "
                    f"'loss/ewc', to one of Evidence; it has {key!r}: {kind!r}."
                )

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, config: Config) -> None:
        """Refuses settings that cannot work in this run; called before a model is loaded.

        Raises:
            ConfigError: In one sentence: what is wrong, where it came from, what would be right.
        """

    def setup(self, run: Run) -> None:
        """Once per process, before the first task; also on resume."""

    def before_task(self, run: Run, task: EncodedTask) -> None:
        """Grows, freezes or activates adapters; before the optimizer is made.

        On resume it is called for every task begun so far, in order and before `load_state_dict`,
        so that what it grows is there to be filled; what values it gives is then overwritten.
        """

    def train_examples(self, run: Run, task: EncodedTask, examples: Dataset) -> Dataset:
        """Extends or replaces this task's training set; an empty one skips the task's training.

        Where a run goes on within a task it is called again, after `load_state_dict`: examples that
        were drawn or generated the first time must then come from the strategy's state.
        """
        return examples

    def objections(
        self, run: Run, task: EncodedTask, examples: Dataset, beside: Dataset | None, source: str
    ) -> Mapping[int, str]:
        """Which examples may not enter a memory or, generated ones, training.

        Each strategy is asked about those that none before it has objected to.

        Args:
            run: The run.
            task: Whose examples they are.
            examples: Those that another strategy is about to keep or to train on; the ids of
                generated ones are less than 0.
            beside: Examples of the task that it has already, if any.
            source: That strategy's name.

        Returns:
            The reason, in a word, by the row of each that may not.
        """
        return {}

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Changes a micro-batch before it is trained on; chained over strategies."""
        return batch

    def compute_gradients(self, run: Run, batch: Batch) -> Tensor:
        """Replaces forward and backward; at most one strategy may define it.

        Returns:
            The loss to be logged, detached.
        """
        raise AssertionError("only called on strategies that define it")

    def loss_terms(self, run: Run, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """Terms added to the task loss of one micro-batch, each logged as train/loss/<name>.

        The loop divides each by the number of micro-batches of a step, so that a term that does
        not depend on the data counts once per step; one that is a sum over examples or tokens of
        the batch is made a mean over the whole step's by `run.per_target` or `run.per_example`.
        """
        return {}

    def task_gradients(self, run: Run) -> None:
        """Sees `.grad` once per optimizer step before any strategy changes it; changes nothing.

        The gradients are accumulated, synchronised and unscaled; of the task's loss and of what
        strategies added to it by `loss_terms`.
        """

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes `.grad` in place, once per optimizer step, before clipping.

        The gradients are accumulated, synchronised and unscaled.

        Returns:
            What to log, as train/gradient/<name>, or as train/<key> where the key has a slash
            (`loss/ewc`). Values may stay tensors; they are read only where `run.logging` is true,
            so what is costly to compute need not be there otherwise.
        """
        return {}

    def after_step(self, run: Run) -> None:
        """After the optimizer step."""

    def after_task(self, run: Run, task: EncodedTask) -> None:
        """After a task's last step, before it is evaluated; in reversed order of strategies."""

    def evaluating(self, run: Run, task: EncodedTask | None) -> AbstractContextManager[Any]:
        """Around the evaluation of a task; `task` is None when its identity is withheld."""
        return nullcontext()

    def save_adapter(self, run: Run, task: EncodedTask, directory: Path) -> bool:
        """Writes the adapter as it serves `task`, where the model's own does not say it all.

        Returns:
            Whether it was written; if not, the model's current adapter is.
        """
        return False

    def facts(self) -> Mapping[str, float]:
        """Numbers to be recorded after each task, in the `cost` of results.json."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to continue: nested dicts and lists of tensors, numbers,
        strings, None. Asked for within tasks too, between two steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, after `setup`."""


HOOKS = frozenset(
    name for name, member in vars(Strategy).items() if inspect.isfunction(member) and name[0] != "_"
)


def defines(strategy: Strategy, hook: str) -> bool:
    """Whether a strategy has its own version of a hook."""
    return getattr(type(strategy), hook) is not getattr(Strategy, hook)


def with_hook(strategies: Iterable[Strategy], hook: str) -> list[Strategy]:
    """The strategies that define a hook, in their order."""
    return [strategy for strategy in strategies if defines(strategy, hook)]
