"""history.jsonl as another program would read it."""

import json
import math

import pytest

from clpeft.tracking.base import RunInfo
from clpeft.tracking.history import HistoryObserver, read_events


def info(directory, **changes):
    values = {
        "directory": directory,
        "name": "ewc-s0-1a2b3c4d",
        "group": "ewc",
        "config": {},
        "tasks": ("north", "south"),
        "stream": "toy",
        "strategies": ("ewc",),
        "seed": 0,
        "total_parameters": 10,
        "trainable_parameters": 1,
    }
    return RunInfo(**{**values, **changes})


@pytest.fixture
def open_history():
    """Makes history observers and closes at the end those that the test left open."""
    opened = []

    def make(directory, **kwargs):
        opened.append(HistoryObserver(directory, **kwargs))
        return opened[-1]

    yield make
    for history in opened:
        if not history._file.closed:
            history.close(0, None)


def lines(directory):
    # parse_constant is called for NaN and Infinity, which are not JSON
    def refuse(name):
        raise AssertionError(f"{name} in the file")

    text = (directory / "history.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def without_time(events):
    return [{key: value for key, value in event.items() if key != "time"} for event in events]


def test_a_whole_run(tmp_path, open_history):
    history = open_history(tmp_path / "run")
    history.on_run_start(info(tmp_path))
    history.on_evaluation(0, [0.25, None])
    history.on_task_start(0, "north", 2)
    history.on_step(1, None)
    history.on_step(2, {"train/loss": 0.5, "train/lr": 1e-3})
    history.on_task_end(0)
    history.on_evaluation(1, [0.75, 0.5])
    history.on_task_start(1, "south", 2)
    history.on_step(3, None)
    history.on_error(ValueError("no more"))
    history.close(1, None)
    assert without_time(lines(tmp_path / "run")) == [
        {"event": "evaluation", "step": 0, "task": None, "trained": 0, "row": [0.25, None]},
        {"event": "task_start", "step": 0, "task": 0, "name": "north", "steps": 2},
        {"event": "step", "step": 2, "task": 0, "train/loss": 0.5, "train/lr": 1e-3},
        {"event": "task_end", "step": 2, "task": 0},
        {"event": "evaluation", "step": 2, "task": 0, "trained": 1, "row": [0.75, 0.5]},
        {"event": "task_start", "step": 2, "task": 1, "name": "south", "steps": 2},
        {"event": "error", "step": 3, "task": 1, "exception": "ValueError: no more"},
        {"event": "end", "step": 3, "task": 1, "exit_code": 1},
    ]


def test_times_are_unix_seconds_in_order(tmp_path, monkeypatch, open_history):
    clock = iter([1000.5, 1001.25, 1002.0])
    monkeypatch.setattr("clpeft.tracking.history.time.time", lambda: next(clock))
    history = open_history(tmp_path)
    history.on_task_start(0, "north", 1)
    history.on_task_end(0)
    assert [line["time"] for line in lines(tmp_path)] == [1000.5, 1001.25]


def test_the_end_of_a_completed_run_has_its_metrics(tmp_path, open_history):
    history = open_history(tmp_path)
    history.close(0, {"metrics": {"average_accuracy": 0.5}, "matrix": [[0.5]]})
    assert lines(tmp_path)[-1]["metrics"] == {"average_accuracy": 0.5}
    assert lines(tmp_path)[-1]["exit_code"] == 0


def test_not_a_number_becomes_null(tmp_path, open_history):
    history = open_history(tmp_path)
    history.on_step(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.1})
    event = lines(tmp_path)[0]
    assert event["train/loss"] is None
    assert event["train/grad_norm"] is None
    assert event["train/lr"] == 0.1


def test_every_event_is_on_disk_at_once_and_silent_steps_write_nothing(tmp_path, open_history):
    history = open_history(tmp_path)
    history.on_step(1, {"train/loss": 1.0})
    size = (tmp_path / "history.jsonl").stat().st_size
    assert size == history.position() > 0
    history.on_step(2, None)
    assert (tmp_path / "history.jsonl").stat().st_size == history.position() == size


def test_resume_drops_what_was_written_after_the_checkpoint(tmp_path, open_history):
    first = open_history(tmp_path)
    first.on_task_start(0, "wörter", 3)  # more bytes than characters
    first.on_step(1, {"train/loss": 1.0})
    position = first.position()
    first.on_step(2, {"train/loss": 2.0})
    first.close(1, None)

    second = open_history(tmp_path, resume_at=position)
    assert second.position() == position
    second.on_run_start(info(tmp_path, resumed_at_step=1))
    second.on_task_start(0, "wörter", 3)
    second.on_step(2, {"train/loss": 3.0})
    second.close(0, {"metrics": {}})
    found = lines(tmp_path)
    assert [line["event"] for line in found] == ["task_start", "step", "task_start", "step", "end"]
    assert [line["train/loss"] for line in found if line["event"] == "step"] == [1.0, 3.0]
    assert [line["step"] for line in found] == [0, 1, 1, 2, 2]
    assert second.position() == (tmp_path / "history.jsonl").stat().st_size


def test_a_fresh_run_starts_the_file_anew(tmp_path, open_history):
    first = open_history(tmp_path)
    first.on_step(1, {"train/loss": 1.0})
    first.close(0, None)
    open_history(tmp_path).on_step(1, {"train/loss": 2.0})
    assert [line["train/loss"] for line in lines(tmp_path)] == [2.0]


@pytest.mark.parametrize("written", [b"", b'{"event": "step"}\n'])
def test_a_file_shorter_than_its_checkpoint_is_continued_with_a_warning(
    tmp_path, caplog, written, open_history
):
    (tmp_path / "history.jsonl").write_bytes(written)
    history = open_history(tmp_path, resume_at=1000)
    assert history.position() == len(written)
    assert f"{1000 - len(written)} bytes short" in caplog.text
    history.on_step(5, {"train/loss": 1.0})
    assert lines(tmp_path)[-1]["step"] == 5


def test_events_are_read_back_without_what_a_crash_cut_short(tmp_path, open_history, caplog):
    history = open_history(tmp_path)
    history.on_task_start(0, "north", 2)
    history.on_step(1, {"train/loss": math.nan})
    history.close(1, None)
    assert read_events(tmp_path) == lines(tmp_path)
    assert caplog.text == ""
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"event": "st')
    assert [event["event"] for event in read_events(tmp_path)] == ["task_start", "step", "end"]
    assert "has a line that is not JSON" in caplog.text


def test_no_history_has_no_events(tmp_path):
    assert read_events(tmp_path / "nowhere") == []
