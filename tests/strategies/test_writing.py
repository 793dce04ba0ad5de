"""What becomes of what a model writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clpeft.strategies import writing
from clpeft.strategies.base import Strategy
from clpeft.strategies.writing import Draft, Writer, tabulated
from clpeft.streams.build import build_stream
from clpeft.streams.encoded import EncodedTask
from clpeft.streams.folder import FolderConfig
from clpeft.streams.tokenize import Encoder, answer_tokens
from clpeft.streams.whole import Whole, request
from clpeft.training.run import Run
from tests.running import build_it

SETTINGS: dict[str, Any] = {
    "top_k": 20,
    "temperature": 1.0,
    "batch_size": 4,
    "max_attempts": 3,
    "max_new_tokens": None,
}
LETTER = "ashford office by mood : the sad baker left silk"

Overrides = Callable[..., list[str]]


class Scripted:
    """Takes the place of sampling: writes what it is told to, and remembers how it was asked."""

    def __init__(self, tokenizer: Any, *lines: str | Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.lines = list(lines)
        self.asked: list[dict[str, Any]] = []

    def __call__(
        self, model: Any, tokenizer: Any, prompt: Any, count: int, **how: Any
    ) -> list[list[int]]:
        self.asked.append({"prompt": prompt, "count": count, **how})
        assert not model.training
        now, self.lines = self.lines[:count], self.lines[count:]
        return [self.ids(line) for line in now]

    def ids(self, line: str | Sequence[int]) -> list[int]:
        if not isinstance(line, str):
            return list(line)
        (tokens,) = answer_tokens(self.tokenizer, [line])
        return [*tokens, self.tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def run(tiny: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build_it(tiny("finetune"), tmp_path_factory.mktemp("run"))


@pytest.fixture
def scripted(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Writer, Scripted]]:
    """A writer whose model writes given lines."""

    def make(*lines: Any, limit: int = 96, **settings: Any) -> tuple[Writer, Scripted]:
        stream = run.stream
        encoder = Encoder(stream.stream, run.tokenizer, stream.task_type, stream.answers)
        script = Scripted(run.tokenizer, *lines)
        monkeypatch.setattr(writing, "sample", script)
        how: Any = SimpleNamespace(**(SETTINGS | settings))
        return Writer(run, encoder, how, limit, "someone"), script

    return make


def test_each_draft_is_kept_or_told_why(run: Run, scripted: Any) -> None:
    task = run.stream.tasks[0]
    run.model.train()  # which `Scripted` would object to
    end, pad = run.tokenizer.eos_token_id, run.tokenizer.pad_token_id
    whole = f"{LETTER}\nAnswer: north"
    copied = task.task.train[3]["text"]
    body = Scripted(run.tokenizer).ids(whole)[:-1]
    lines = [
        whole,
        body,  # no end
        [*body[:3], pad, *body[3:], end],
        LETTER,
        f"{whole}\nAnswer: south",
        f"{LETTER}\nAnswer: upwards",
        "\nAnswer: north",
        f"{copied}\nAnswer: west",
        [end],
    ]
    writer, script = scripted(*lines, batch_size=9, max_attempts=1)
    drafts = writer.write(task, 9, -5, "purpose")

    assert run.model.training
    assert [draft.why for draft in drafts] == [
        *(None, "unfinished", "special_token", "no_answer", "several_answers"),
        *("unknown_answer", "empty", None, "no_answer"),
    ]
    assert drafts[0] == Draft(-5, whole, Whole((LETTER,), "north"))
    assert [draft.example_id for draft in drafts] == list(range(-5, -14, -1))
    assert [draft.is_copy for draft in drafts] == [row == 7 for row in range(9)]
    assert [bool(draft.example) for draft in drafts] == [row in (0, 7) for row in range(9)]
    # what is asked are the words that name the task, and there is room for what fits with them
    (asked,) = script.asked
    assert run.tokenizer.decode(asked["prompt"]).removeprefix("<s>").strip() == request("ashford")
    assert asked["max_new_tokens"] == 96 - len(asked["prompt"])
    assert (asked["top_k"], asked["temperature"], asked["count"]) == (20, 1.0, 9)


def test_writes_until_there_are_enough(run: Run, scripted: Any) -> None:
    task = run.stream.tasks[0]
    good = [f"{LETTER} {word}\nAnswer: north" for word in "abcdefghij"]
    # batches of four; of the first two batches five are good, so that a third is asked for
    lines = [good[0], "no", good[1], "no", good[2], good[3], "no", good[4], *good[5:9]]
    writer, script = scripted(*lines, max_attempts=9)
    drafts = writer.write(task, 6, -1, "purpose")

    assert [draft.why for draft in drafts] == [
        *(None, "no_answer", None, "no_answer", None, None, "no_answer", None),
        *(None, "surplus", "surplus", "surplus"),
    ]
    # the first round has two batches at once
    assert [asked["count"] for asked in script.asked] == [4, 4, 4]
    assert len({asked["seed"] for asked in script.asked}) == 3
    assert len({draft.example_id for draft in drafts}) == 12


def test_gives_up_after_so_many_attempts(run: Run, scripted: Any) -> None:
    writer, script = scripted(*["nothing"] * 40, max_new_tokens=7)
    drafts = writer.write(run.stream.tasks[0], 3, -1, "purpose")

    assert len(script.asked) == 3
    assert {draft.why for draft in drafts} == {"no_answer"}
    assert len(drafts) == 12
    assert {asked["max_new_tokens"] for asked in script.asked} == {7}


def test_nothing_wanted_is_nothing_written(run: Run, scripted: Any) -> None:
    writer, script = scripted()
    assert writer.write(run.stream.tasks[0], 0, -1, "purpose") == []
    assert script.asked == []


def test_purpose_decides_what_is_drawn(run: Run, scripted: Any) -> None:
    seeds = []
    for purpose in ("one", "other", "one"):
        writer, script = scripted(*["nothing"] * 12)
        writer.write(run.stream.tasks[0], 1, -1, purpose)
        seeds.append([asked["seed"] for asked in script.asked])
    assert seeds[0] == seeds[2]
    assert not set(seeds[0]) & set(seeds[1])


class Objecting(Strategy):
    """Objects to some examples, by their letter's last word."""

    def __init__(self) -> None:
        super().__init__(None)
        self.shown: list[Any] = []
        self.beside: list[Any] = []

    def objections(
        self, run: Any, task: Any, examples: Any, beside: Any, source: str
    ) -> dict[int, str]:
        self.shown.append((task.name, source, examples))
        self.beside.append(None if beside is None else beside["example_id"][:])
        text = [run.tokenizer.decode(ids) for ids in examples["input_ids"]]
        return {row: "disliked" for row, prompt in enumerate(text) if "x\nAnswer" in prompt}


def test_others_may_object_beside_what_is_kept(
    run: Run, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = run.stream.tasks[1]
    objecting = Objecting()
    monkeypatch.setattr(run, "strategies", [objecting])
    desks = ("north", "south", "east", "west")
    lines = [f"{LETTER} {word}\nAnswer: {desk}" for word, desk in zip("xaxb", desks, strict=True)]
    writer, _ = scripted(*lines, *lines, batch_size=4)
    drafts = writer.write(task, 3, -1, "purpose")

    assert [d.why for d in drafts] == ["disliked", None] * 2 + [
        "disliked",
        None,
        "disliked",
        "surplus",
    ]
    assert objecting.beside == [None, [-2, -4]]
    name, source, shown = objecting.shown[0]
    assert (name, source) == ("birchford", "someone")
    # encoded as the stream's own are: the usual prompt, and the answer that was written
    row = shown[1]
    prompt = run.tokenizer.decode(row["input_ids"][: row["prompt_length"]])
    assert prompt.endswith(f"{LETTER} a\nAnswer:")
    assert prompt.replace("<s>", "").strip().startswith("Which desk gets this letter?")
    answer = run.tokenizer.decode(row["input_ids"][row["prompt_length"] :])
    assert answer.strip() == "south</s>"
    assert (row["label"], row["task_id"], row["example_id"]) == (1, 1, -2)


def folder_task(folder: Path, **changes: Any) -> tuple[EncodedTask, Any]:
    """A task of a folder, not encoded, and its stream."""
    config = FolderConfig(
        kind="folder",
        name="mine",
        path=str(folder),
        scenario="task",
        **{"max_length": 30, **changes},
    )
    stream = build_stream(config, data_dir=None)
    (task,) = stream.tasks
    return EncodedTask(task, task.train, task.validation, task.test), stream


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task's folder of JSON lines."""

    def written(*rows: dict[str, str]) -> Path:
        folder = tmp_path / "stream" / "told"
        folder.mkdir(parents=True)
        for split, some in (("train", rows[:-2]), ("validation", rows[-2:-1]), ("test", rows[-1:])):
            lines = "".join(f"{json.dumps(row)}\n" for row in some)
            (folder / f"{split}.jsonl").write_text(lines)
        return tmp_path / "stream"

    return written


def test_free_answers_must_leave_room_for_the_prompt(
    run: Run, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"input": f"the {word} desk", "output": word} for word in ("north", "south", "east")]
    task, stream = folder_task(write(*rows), max_length=12)
    encoder = Encoder(stream, run.tokenizer, "causal_lm", ())
    fixed = len(encoder.bare(task.task))
    # one token a word; the prompt and the end take what they take
    room = 12 - fixed - 1
    (tokens,) = answer_tokens(run.tokenizer, ["north " * room])
    lines = [f"the desk\nAnswer: {' '.join(['north'] * count)}" for count in (room, room + 1)]
    assert len(tokens) >= room
    script = Scripted(run.tokenizer, *lines)
    monkeypatch.setattr(writing, "sample", script)
    how: Any = SimpleNamespace(**(SETTINGS | {"batch_size": 2, "max_attempts": 1}))
    writer = Writer(run, encoder, how, 96, "someone")
    drafts = writer.write(task, 2, -1, "purpose")

    assert [draft.why for draft in drafts] == [None, "too_long"]
    answer = " ".join(["north"] * room)
    assert drafts[0].example == Whole(("the desk",), answer)
    assert tabulated(task.task, drafts[:1]).to_pylist() == [
        {"input": "the desk", "output": answer, "example_id": -1}
    ]
    # with nothing left of its input it just fits
    assert [len(ids) for ids in writer.encoded(task.task, drafts[:1])["input_ids"]] == [12]


def test_pairs_are_read_as_pairs(run: Run, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"text": f"the {word} desk", "text_pair": f"desk {word}", "label": label}
        for word, label in (("north", "yes"), ("south", "no"), ("east", "yes"), ("west", "no"))
    ]
    task, stream = folder_task(write(*rows), max_length=60)
    encoder = Encoder(stream, run.tokenizer, "causal_lm", ((5, 2), (6, 2)))
    lines = [
        "the one\nSecond text: the other\nAnswer: yes",
        "the one\nAnswer: yes",
        "the north desk\nSecond text: desk north\nAnswer: no",
        "the north desk\nSecond text: desk south\nAnswer: no",
    ]
    monkeypatch.setattr(writing, "sample", Scripted(run.tokenizer, *lines))
    how: Any = SimpleNamespace(**(SETTINGS | {"max_attempts": 1}))
    drafts = Writer(run, encoder, how, 96, "someone").write(task, 4, -1, "purpose")

    assert [draft.why for draft in drafts] == [None, "wrong_parts", None, None]
    # a copy is one of both texts
    assert [draft.is_copy for draft in drafts] == [False, False, True, False]
    kept = [drafts[0], drafts[3]]
    labels = [task.task.labels.index(word) for word in ("yes", "no")]
    assert tabulated(task.task, kept).to_pydict() == {
        "text": ["the one", "the north desk"],
        "text_pair": ["the other", "desk south"],
        "label": labels,
        "example_id": [-1, -4],
    }
