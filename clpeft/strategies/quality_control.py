"""Quality control: which examples a memory or a generator may keep."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from omegaconf import MISSING

from clpeft.config import Config, ConfigError, above, at_least, between
from clpeft.models.own import require
from clpeft.registry import STRATEGIES
from clpeft.strategies import readings
from clpeft.strategies.base import Evidence, Strategy, StrategyConfig
from clpeft.strategies.likeness import near_duplicates, ngrams, too_close
from clpeft.strategies.rehearsal import EarlyRehearsal
from clpeft.streams.batching import Columns
from clpeft.streams.tokenize import Encoder

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from clpeft.streams.encoded import EncodedTask
    from clpeft.training.run import Run

log = logging.getLogger(__name__)


@dataclass
class QualityControlConfig(StrategyConfig):
    """Settings of quality control; null switches a filter off."""

    min_tokens: int | None = at_least(1)  # of an input, the words of its prompt aside
    max_tokens: int | None = at_least(1)
    max_loss: float | None = above(0)  # nats per token of the answer
    min_confidence: float | None = between(0, 1)  # probability of the label among those competing
    label_agreement: bool = MISSING  # a generated example's label must be the model's own answer
    duplicates: bool = MISSING  # whether an input that is there already is dropped
    near_duplicates: float | None = between(0.1, 1)  # Jaccard similarity of n-grams, at least
    ngram: int = at_least(1)  # tokens
    min_distance: float | None = between(0, 2)  # cosine distance of features to the nearest


# Why an example is dropped, in the order in which it is judged, and the setting that decides.
REASONS = {
    "too_short": "min_tokens",
    "too_long": "max_tokens",
    "loss": "max_loss",
    "label": "label_agreement",
    "confidence": "min_confidence",
    "duplicate": "duplicates",
    "near_duplicate": "near_duplicates",
    "similar": "min_distance",
}

# Those that judge examples of the task itself by the model, which has to know the task.
ASKING = ("max_loss", "min_confidence")


def without_frame(tokens: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """What an input says itself: its tokens without those that it begins and ends with by form.

    Args:
        tokens: Of the whole input [L].
        frame: Of an input without its texts.
    """
    width = min(len(tokens), len(frame))
    differs = np.flatnonzero(tokens[:width] != frame[:width])
    begin = int(differs[0]) if len(differs) else width
    tail = width - begin
    if not tail:
        return tokens[begin:]
    differs = np.flatnonzero(tokens[-tail:][::-1] != frame[-tail:][::-1])
    end = int(differs[0]) if len(differs) else tail
    return tokens[begin : len(tokens) - end]


@STRATEGIES.register("quality_control", config=QualityControlConfig)
class QualityControl(Strategy):
    """Screens what other strategies put into a memory, or generate.

    First what an example is by itself: the length of its input; the loss of its answer and its
    label's probability, by the model as it is; for a generated one, whether the model, asked the
    usual way, gives the label that it wrote (as pseudo-labels are checked). Then what it is beside
    those that came before it: the same input, an input whose n-grams are nearly the same, features
    too near to another's. Whatever is dropped is counted by its reason, as train/quality/<reason>.

    Label, confidence and agreement are of classification tasks only. Alone it has nothing to
    screen.

    Source: the Jaccard similarity of n-grams after Broder 1997, On the Resemblance and Containment
        of Documents, as Lee et al. 2022, Deduplicating Training Data Makes Language Models Better,
        use it; agreement with the model's own answer after Sun et al. 2020, LAMOL.
    """

    config: QualityControlConfig
    evidence: ClassVar = {"quality/dropped": Evidence.TERM}
    supports_multi_process = True

    def check(self, config: Config) -> None:
        if not any(STRATEGIES[name].target.rehearses for name in config.strategies):
            kind = config.model.task_type
            rehearsing = [entry for entry in STRATEGIES if entry.target.rehearses]
            partners = [e.name for e in rehearsing if kind in e.target.task_types]
            raise ConfigError(
                f"quality_control screens what a memory keeps or a generator writes, and "
                f"strategy=[{','.join(config.strategies)}] does neither; combine it with "
                f"{' or '.join(partners)}."
            )
        early = [n for n in config.strategies if issubclass(STRATEGIES[n].target, EarlyRehearsal)]
        asking = [name for name in ASKING if vars(self.config)[name] is not None]
        if early and asking:
            raise ConfigError(
                f"strategies.quality_control.{asking[0]} judges by what the model makes of an "
                f"example, but {early[0]} remembers a task's examples before the model has learned "
                f"the task; set it to null, or use replay, which remembers them afterwards."
            )
        if self.config.min_distance is not None:
            require(config, "hidden_states", "strategies.quality_control.min_distance")
        low, high = self.config.min_tokens, self.config.max_tokens
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"strategies.quality_control.min_tokens={low} is more than max_tokens={high}, so "
                f"that every example would be dropped; set it to {high} or less."
            )
        if not self._used():
            raise ConfigError(
                "All filters of quality_control are switched off, so that it would do nothing; set "
                f"one of {', '.join(REASONS.values())} (strategies.quality_control.<name>)."
            )

    def setup(self, run: Run) -> None:
        stream = run.stream
        self._encoder = Encoder(stream.stream, run.tokenizer, stream.task_type, stream.answers)
        self._shown = 0
        self._dropped = torch.zeros(len(REASONS), dtype=torch.int64)

    def objections(
        self, run: Run, task: EncodedTask, examples: Dataset, beside: Dataset | None, source: str
    ) -> Mapping[int, str]:
        found: dict[int, str] = {}
        for judge in (self._by_length, self._by_model, self._by_words, self._by_features):
            left = [row for row in range(len(examples)) if row not in found]
            if left:
                against = judge(run, task, examples.select(left), beside)
                found |= {left[row]: reason for row, reason in against.items()}
        # what a generator lacks it writes again, and tells of itself
        kept_for_good = max(examples["example_id"], default=-1) >= 0
        level = logging.WARNING if kept_for_good and len(found) == len(examples) else logging.INFO
        self._count(task, len(examples), found, source, level)
        return found

    def transform_gradients(self, run: Run) -> Mapping[str, float | Tensor]:
        """Changes none; logs how many examples were dropped so far, and why."""
        counts = self._counts()
        dropped = sum(counts.values())
        return {f"quality/{name}": count for name, count in {**counts, "dropped": dropped}.items()}

    def facts(self) -> Mapping[str, float]:
        return {"shown": self._shown, **self._counts()}

    def state_dict(self) -> dict[str, Any]:
        return {"shown": self._shown, "dropped": self._dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._shown = state["shown"]
        self._dropped = state["dropped"].clone()

    def _used(self) -> list[str]:
        """The reasons whose filters are on."""
        settings = vars(self.config)
        return [reason for reason, key in REASONS.items() if settings[key] not in (None, False)]

    def _counts(self) -> dict[str, int]:
        """Examples dropped so far, by the reasons whose filters are on."""
        used = self._used()
        counts = zip(REASONS, self._dropped.tolist(), strict=True)
        return {reason: count for reason, count in counts if reason in used}

    def _count(
        self, task: EncodedTask, shown: int, found: Mapping[int, str], source: str, level: int
    ) -> None:
        counts = Counter(found.values())
        self._shown += shown
        self._dropped += torch.tensor([counts[reason] for reason in REASONS])
        log.log(
            level,
            "quality_control: %d of %d examples of '%s' may enter %s%s",
            *(shown - len(found), shown, task.name, source),
            "".join(f", {count} {reason}" for reason, count in sorted(counts.items())),
        )

    def _by_length(
        self, run: Run, task: EncodedTask, examples: Dataset, beside: Dataset | None
    ) -> dict[int, str]:
        lengths = [len(tokens) for tokens in self._inputs(task, examples)]
        low, high = self.config.min_tokens, self.config.max_tokens
        short = {row: "too_short" for row, n in enumerate(lengths) if low is not None and n < low}
        long = {row: "too_long" for row, n in enumerate(lengths) if high is not None and n > high}
        return short | long

    def _by_model(
        self, run: Run, task: EncodedTask, examples: Dataset, beside: Dataset | None
    ) -> dict[int, str]:
        found: dict[int, str] = {}
        if self.config.max_loss is not None:
            losses = readings.losses(run, examples) / readings.num_targets(examples)
            found |= _where(losses > self.config.max_loss, "loss")
        generated = torch.tensor(examples["example_id"]) < 0
        asked = generated & torch.tensor(self.config.label_agreement)
        if not task.task.labels or (self.config.min_confidence is None and not asked.any()):
            return found
        probabilities, own = readings.answer_probabilities(run, task, examples)
        found = _where(asked & (probabilities.argmax(dim=1) != own), "label") | found
        if self.config.min_confidence is not None:
            confidence = probabilities[torch.arange(len(own)), own]
            found = _where(confidence < self.config.min_confidence, "confidence") | found
        return found

    def _by_words(
        self, run: Run, task: EncodedTask, examples: Dataset, beside: Dataset | None
    ) -> dict[int, str]:
        inputs = self._inputs(task, examples)
        known = [] if beside is None else self._inputs(task, beside)
        found: dict[int, str] = {}
        if self.config.duplicates:
            seen = {tokens.tobytes() for tokens in known}
            for row, tokens in enumerate(inputs):
                if tokens.tobytes() in seen:
                    found[row] = "duplicate"
                seen.add(tokens.tobytes())
        if self.config.near_duplicates is not None:
            rest = [row for row in range(len(inputs)) if row not in found]
            near = near_duplicates(
                [ngrams(inputs[row], self.config.ngram) for row in rest],
                self.config.near_duplicates,
                [ngrams(tokens, self.config.ngram) for tokens in known],
            )
            found |= {rest[place]: "near_duplicate" for place in near}
        return found

    def _by_features(
        self, run: Run, task: EncodedTask, examples: Dataset, beside: Dataset | None
    ) -> dict[int, str]:
        if self.config.min_distance is None:
            return {}
        known = None if beside is None else readings.features(run, beside)
        near = too_close(readings.features(run, examples), self.config.min_distance, known)
        return dict.fromkeys(near, "similar")

    def _inputs(self, task: EncodedTask, examples: Dataset) -> list[np.ndarray]:
        """The tokens of each input itself, without what its prompt puts around it."""
        columns = Columns(examples)
        ragged = columns.ragged["input_ids"]
        ends = columns.numbers.get("prompt_length", ragged.lengths)
        frame = np.array(self._encoder.bare(task.task))
        return [
            without_frame(ragged.values[start : start + end], frame)
            for start, end in zip(ragged.starts, ends, strict=True)
        ]


def _where(mask: Tensor, reason: str) -> dict[int, str]:
    return dict.fromkeys(mask.nonzero().flatten().tolist(), reason)
