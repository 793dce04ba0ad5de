"""The post offices: what their rules are and that their sentences follow them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from clpeft.config import ConfigError
from clpeft.streams.build import build_stream, check_stream
from clpeft.streams.toy import DESKS, FACTORS, OFFICES, ToyConfig, office_rule, toy_neutral_text

KIND_OF_WORD = {
    word: (factor, kind)
    for factor, kinds in FACTORS.items()
    for kind, words in kinds.items()
    for word in words
}


def test_every_word_is_of_one_kind_only() -> None:
    words = [word for kinds in FACTORS.values() for words in kinds.values() for word in words]
    assert len(words) == len(set(words))
    assert {len(kinds) for kinds in FACTORS.values()} == {len(DESKS)} == {4}
    assert len({len(words) for kinds in FACTORS.values() for words in kinds.values()}) == 1


def test_rules_are_all_different_and_the_fifth_contradicts_the_first() -> None:
    rules = [office_rule(index) for index in range(len(OFFICES))]
    assert len(set(OFFICES)) == 96
    assert len({(rule.factor, rule.desks) for rule in rules}) == 96
    assert [rule.factor for rule in rules[:5]] == ["mood", "weather", "goods", "sender", "mood"]
    assert {rule.desks for rule in rules[:4]} == {(0, 1, 2, 3)}
    assert rules[4].desks == (0, 1, 3, 2)
    for rule in rules:
        assert sorted(rule.desks) == [0, 1, 2, 3]
    # six swaps of two desks, then eight rotations of three, then nine that move all four
    moved = [sum(i != desk for i, desk in enumerate(rule.desks)) for rule in rules[::4]]
    assert moved == [0, *[2] * 6, *[3] * 8, *[4] * 9]


@pytest.mark.parametrize("scenario", ["domain", "task"])
def test_every_sentence_goes_where_its_offices_rule_sends_it(
    toy_config: Callable[..., ToyConfig], scenario: str
) -> None:
    stream = build_stream(toy_config(num_tasks=8, scenario=scenario), data_dir=None)
    for task in stream.tasks:
        rule = office_rule(OFFICES.index(task.name))
        for split in (task.train, task.validation, task.test):
            for row in split:
                words = row["text"].split()
                assert words[0] == task.name
                told = dict(KIND_OF_WORD[word] for word in words if word in KIND_OF_WORD)
                assert set(told) == {"mood", "weather", "goods", "sender"}
                assert words[1:4] == ["office", "by", rule.factor]
                kinds = list(FACTORS[rule.factor])
                assert row["label"] == rule.desks[kinds.index(told[rule.factor])]


def test_desks_are_balanced_and_the_other_factors_tell_nothing(
    toy_config: Callable[..., ToyConfig],
) -> None:
    (task,) = build_stream(toy_config(num_tasks=1, train_size=2000), data_dir=None).tasks
    assert set(Counter(task.train["label"]).values()) == {500}
    assert set(Counter(task.test["label"]).values()) == {4}
    together = Counter()
    for row in task.train:
        for word in row["text"].split():
            if KIND_OF_WORD.get(word, ("", ""))[0] == "goods":
                together[KIND_OF_WORD[word][1], row["label"]] += 1
    # independent draws: 125 expected in each of 16 cells, standard deviation 10.8; 5 of them
    assert len(together) == 16
    assert all(abs(count - 125) < 55 for count in together.values())


def test_no_sentence_is_in_two_splits_and_all_are_short(
    toy_config: Callable[..., ToyConfig],
) -> None:
    stream = build_stream(toy_config(num_tasks=3, train_size=800, test_size=200), data_dir=None)
    texts = [
        text
        for task in stream.tasks
        for split in (task.train, task.validation, task.test)
        for text in split["text"]
    ]
    assert len(set(texts)) == len(texts) == 3 * (800 + 12 + 200)
    assert {len(text.split()) for text in texts} <= set(range(13, 22))
    assert len({word for text in stream.training_text() for word in text.split()}) < 300


def test_the_seed_alone_decides(toy_config: Callable[..., ToyConfig]) -> None:
    first = build_stream(toy_config(seed=5), data_dir=None)
    again = build_stream(toy_config(seed=5), data_dir=None)
    other = build_stream(toy_config(seed=6), data_dir=None)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.tasks[1].train["text"][:] == again.tasks[1].train["text"][:]
    # an office is the same however many others there are
    longer = build_stream(toy_config(seed=5, num_tasks=5), data_dir=None)
    assert longer.tasks[1].train["text"][:] == first.tasks[1].train["text"][:]


def test_class_scenario_gives_every_office_its_own_desks(
    toy_config: Callable[..., ToyConfig],
) -> None:
    stream = build_stream(toy_config(scenario="class"), data_dir=None)
    assert stream.label_names[3:5] == ("ashford/west", "birchford/north")
    assert stream.answer_words[3:5] == ("ashford west", "birchford north")


def test_as_many_tasks_as_offices(toy_config: Callable[..., ToyConfig]) -> None:
    stream = build_stream(
        toy_config(num_tasks=96, train_size=8, validation_size=4, test_size=4), data_dir=None
    )
    assert [task.name for task in stream.tasks] == list(OFFICES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tasks": 97}, "num_tasks is 97, but there are only 96 post offices"),
        ({"tasks": ["ashfort"]}, r"no post office 'ashfort'. Did you mean 'ashford'"),
        ({"order": "order1"}, "stream.order=order1 means nothing there"),
    ],
)
def test_what_does_not_exist_is_told(
    toy_config: Callable[..., ToyConfig], changes: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_stream(toy_config(**changes), None)


# Neutral text.


def test_neutral_text_reveals_no_rule() -> None:
    texts = toy_neutral_text(0)
    assert texts == toy_neutral_text(0) != toy_neutral_text(1)
    desks, together = Counter(), Counter()
    for text in texts:
        words = text.split()
        if set(words) & set(DESKS):
            # whatever names a desk tells no office and none of what rules look at
            assert not set(words) & (set(OFFICES) | set(KIND_OF_WORD))
            desks[words[-1]] += 1
        for office in set(words) & set(OFFICES):
            together[office, words[words.index("by") + 1]] += 1
    for counts, cells in ((desks, 4), (together, 96 * 4)):
        assert len(counts) == cells
        expected = sum(counts.values()) / cells
        # independent draws: five standard deviations of a binomial count
        assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values())
    assert sum(desks.values()) == 1000


def test_neutral_questions_are_answered_rightly() -> None:
    questions = [text for text in toy_neutral_text(0) if text.startswith("Which kind is told?")]
    assert len(questions) == 4000
    orders = Counter()
    for text in questions:
        words = text.replace("\n", " ").split()
        factor = words[words.index("by") + 1]
        told = dict(KIND_OF_WORD[word] for word in words if word in KIND_OF_WORD)
        assert text.endswith(f"Answer: {told[factor]}")
        if "Option" in text:
            options = text.split("Option: ")[1].split(" \n")[0].split(", ")
            assert sorted(options) == sorted(FACTORS[factor])
            orders[options.index(told[factor])] += 1
    # half of them list options, and the answer is at no place more often than at others
    listed = sum(orders.values())
    assert abs(listed - 2000) < 5 * 1000**0.5
    assert all(abs(count - listed / 4) < 5 * (listed * 3 / 16) ** 0.5 for count in orders.values())


def test_neutral_text_knows_every_word_of_the_sentences(
    toy_config: Callable[..., ToyConfig],
) -> None:
    neutral = {word for text in toy_neutral_text(0) for word in text.split()}
    (task,) = build_stream(toy_config(num_tasks=1), data_dir=None).tasks
    used = {word for text in task.train["text"] for word in text.split()}
    assert used <= neutral
