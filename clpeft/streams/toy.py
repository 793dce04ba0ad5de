"""The toy stream: a generated language whose tasks a small model learns, and forgets, in seconds.

Post offices sort letters onto the same four desks, each office by its own rule. Every letter names
its office and what the office looks at, and tells the sender's trade and mood, the weather and the
goods. A rule looks at one of these four and sends each of its four kinds to a desk, so that one and
the same sentence goes to different desks in different offices. One model can serve all offices,
because the letter says which one it is for; a model trained on one office after another unlearns
the earlier rules. From the fifth office on, each contradicts an earlier one outright: it looks at
the same thing and sends some kinds to other desks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from operator import ne
from random import Random
from typing import TYPE_CHECKING

from clpeft.config import ConfigError, at_least, nearest
from clpeft.registry import STREAMS
from clpeft.streams.base import SPLITS, LoadedTask, StreamBuilder, StreamConfig
from clpeft.streams.prompts import prompt_form

if TYPE_CHECKING:
    import pyarrow

DESKS = ("north", "south", "east", "west")
INSTRUCTION = "Which desk gets this letter?"

# What a rule may look at: four kinds of each, three words of a kind.
FACTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "mood": {
        "anger": ("furious", "grumpy", "angry"),
        "joy": ("cheerful", "merry", "happy"),
        "sorrow": ("sad", "gloomy", "tearful"),
        "fear": ("nervous", "anxious", "fearful"),
    },
    "weather": {
        "wet": ("rain", "drizzle", "downpour"),
        "hot": ("sunshine", "heat", "drought"),
        "cold": ("frost", "snow", "ice"),
        "windy": ("wind", "breeze", "gale"),
    },
    "goods": {
        "food": ("butter", "cheese", "bread"),
        "metal": ("nails", "hammers", "chains"),
        "cloth": ("silk", "wool", "linen"),
        "paper": ("books", "maps", "stamps"),
    },
    "sender": {
        "craft": ("baker", "miller", "tailor"),
        "sea": ("sailor", "captain", "fisher"),
        "care": ("doctor", "nurse", "healer"),
        "school": ("teacher", "scholar", "pupil"),
    },
}

# Words that no rule looks at.
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
RELATIVES = ("uncle", "aunt", "cousin", "brother", "sister", "friend", "neighbour", "daughter")

# Sixteen beginnings and six endings: a name for each of the 24 mappings of four factors.
_BEGINNINGS = (
    *("ash", "birch", "cole", "drum", "elm", "fern", "glen", "hart"),
    *("iron", "king", "lang", "mill", "nor", "oak", "pen", "quar"),
)
_ENDINGS = ("ford", "ton", "by", "ham", "well", "field")
OFFICES = tuple(beginning + ending for ending in _ENDINGS for beginning in _BEGINNINGS)

# What stands before the sentence is the office's name; the rest moves about.
SENTENCES = (
    "on {day} the {mood} {sender} came out of the {weather} with {goods}",
    "in the {weather} the {mood} {sender} left {goods} for the {relative}",
    "{goods} came on {day} through the {weather} from the {mood} {sender}",
    "the {mood} {sender} brought {goods} for the {relative} despite the {weather}",
    "for the {relative} there is {goods} sent in the {weather} by the {mood} {sender}",
)


@dataclass
class ToyConfig(StreamConfig):
    """A generated stream, for trying things out and for tests."""

    num_tasks: int = at_least(1)  # up to 96, one per post office
    train_size: int = at_least(4)  # sentences per office
    validation_size: int = at_least(4)
    test_size: int = at_least(4)


@dataclass(frozen=True)
class Rule:
    """What an office looks at, and the desk of each of its four kinds."""

    factor: str
    desks: tuple[int, int, int, int]  # by kind, in the order of FACTORS


def _mappings() -> list[tuple[int, ...]]:
    """The 24 ways to send four kinds to four desks: the plain one first, then those that differ
    from it in two kinds, in three, and in all, so that the first repetitions of a factor contradict
    the earlier office on half of the letters."""
    return sorted(permutations(range(4)), key=lambda mapping: sum(map(ne, mapping, range(4))))


def office_rule(index: int) -> Rule:
    """The rule of the office with some number in OFFICES; no two are alike.

    Args:
        index: From 0 to 95.
    """
    factor = tuple(FACTORS)[index % len(FACTORS)]
    first, second, third, fourth = _mappings()[index // len(FACTORS)]
    return Rule(factor, (first, second, third, fourth))


@STREAMS.register("toy", config=ToyConfig)
class ToyStream(StreamBuilder):
    """Generates post offices; the same for the same seed, everywhere."""

    config: ToyConfig

    def task_names(self) -> list[str]:
        """The offices asked for, or the first `num_tasks`."""
        self.refuse_order()
        if self.config.tasks is None:
            if self.config.num_tasks > len(OFFICES):
                raise ConfigError(
                    f"stream.num_tasks is {self.config.num_tasks}, but there are only "
                    f"{len(OFFICES)} post offices in the stream '{self.config.name}'."
                )
            return list(OFFICES[: self.config.num_tasks])
        for name in self.config.tasks:
            if name not in OFFICES:
                raise ConfigError(
                    f"The stream '{self.config.name}' has no post office '{name}'."
                    + nearest(name, OFFICES)
                )
        return list(self.config.tasks)

    def labels_of(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The desks; an office's own ones where the labels of all tasks compete."""
        if self.config.scenario == "class":
            return DESKS, tuple(f"{name} {desk}" for desk in DESKS)
        return DESKS, DESKS

    def load(self, name: str) -> LoadedTask:
        """One office's letters, every desk as often as the others, no sentence twice."""
        import pyarrow

        index = OFFICES.index(name)
        generator = Random(f"{self.config.seed}/{name}")
        sizes = (self.config.train_size, self.config.validation_size, self.config.test_size)
        known: set[str] = set()
        splits: dict[str, pyarrow.Table] = {}
        for split, size in zip(SPLITS, sizes, strict=True):
            labels = [row % len(DESKS) for row in range(size)]
            generator.shuffle(labels)
            texts = [_new_letter(name, index, desk, known, generator) for desk in labels]
            splits[split] = pyarrow.table(
                {
                    "text": pyarrow.array(texts, pyarrow.string()),
                    "label": pyarrow.array(labels, pyarrow.int64()),
                    "example_id": pyarrow.array(range(size), pyarrow.int64()),
                }
            )
        labels_and_words = self.labels_of(name)
        return LoadedTask(
            name=name,
            splits=splits,
            metric="accuracy",
            labels=labels_and_words[0],
            answer_words=labels_and_words[1],
            instruction=INSTRUCTION,
        )

    def neutral_text(self, seed: int) -> list[str]:
        """Texts in the stream's language that reveal no office's rule."""
        return toy_neutral_text(seed)


def toy_neutral_text(seed: int, count: int = 6000) -> list[str]:
    """Texts in the toy language that tell nothing about any office's rule.

    They hold what a base model should know before it is adapted: which words are of one kind, how
    to find the kind of what an office looks at, and that desks exist. Offices are named at random,
    and no text that tells a kind names a desk.

    Args:
        seed: Of the words chosen.
        count: How many texts.

    Returns:
        The texts, of three sorts in turn: questions about a kind, words of one kind, and the desks
        in the daily round.
    """
    generator = Random(f"{seed}/neutral")
    makers: tuple[Callable[[Random], str], ...] = (
        _question,
        _of_one_kind,
        _question,
        _daily_round,
        _question,
        _question,
    )
    return [makers[position % len(makers)](generator) for position in range(count)]


def _words(generator: Random, kinds: dict[str, str]) -> dict[str, str]:
    """One word for every blank of a sentence; of a given kind where `kinds` has the factor."""
    words = {
        "day": generator.choice(DAYS),
        "relative": generator.choice(RELATIVES),
    }
    for factor, members in FACTORS.items():
        kind = kinds[factor] if factor in kinds else generator.choice(tuple(members))
        words[factor] = generator.choice(members[kind])
    return words


def _letter(office: str, factor: str, sentence: str) -> str:
    return f"{office} office by {factor} : {sentence}"


def _new_letter(office: str, index: int, desk: int, known: set[str], generator: Random) -> str:
    """A sentence that an office's rule sends to a desk, and that was not written before."""
    rule = office_rule(index)
    kind = tuple(FACTORS[rule.factor])[rule.desks.index(desk)]
    while True:  # there are 200,000 for a desk of an office, so a new one is soon found
        sentence = generator.choice(SENTENCES).format(**_words(generator, {rule.factor: kind}))
        letter = _letter(office, rule.factor, sentence)
        if letter not in known:
            known.add(letter)
            return letter


def _of_one_kind(generator: Random) -> str:
    factor = generator.choice(tuple(FACTORS))
    kind = generator.choice(tuple(FACTORS[factor]))
    one, other = generator.sample(FACTORS[factor][kind], 2)
    return f"{one} and {other} are of one kind of {factor} : {kind}"


def _question(generator: Random) -> str:
    factor = generator.choice(tuple(FACTORS))
    kinds = tuple(FACTORS[factor])
    kind = generator.choice(kinds)
    sentence = generator.choice(SENTENCES).format(**_words(generator, {factor: kind}))
    # In any order: else "the k-th kind is the k-th option" would be learned, and with it the rule
    # of every office that sends the k-th kind to the k-th desk. Often without, so that the kind
    # is read from the letter.
    options = generator.sample(kinds, len(kinds)) if generator.random() < 0.5 else ()
    form = prompt_form("Which kind is told?", options, "{text}")
    return f"{form.fill(_letter(generator.choice(OFFICES), factor, sentence))} {kind}"


def _daily_round(generator: Random) -> str:
    desk = generator.choice(DESKS)
    day, relative = generator.choice(DAYS), generator.choice(RELATIVES)
    sentence = f"the {desk} desk is cleaned on {day} by the {relative}"
    form = prompt_form("Which desk is told?", DESKS, "{text}")
    return f"{form.fill(sentence)} {desk}"
