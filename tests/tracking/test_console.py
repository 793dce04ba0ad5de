"""What is printed, at a terminal and into a file."""

import io
import logging
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from clpeft.tracking.console import ConsoleObserver, log_to, matrix_table

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def _info_level(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr("clpeft.tracking.console.time.monotonic", lambda: Clock.now)
    return Clock


def in_a_file(width=80):
    return Console(file=io.StringIO(), width=width)


def at_a_terminal(width=100):
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={})


def printed(console):
    return ESCAPES.sub("", console.file.getvalue())


def test_without_a_terminal_there_are_plain_lines_and_no_bars(run_info, play, caplog):
    console = in_a_file()
    play(ConsoleObserver(console), run_info())
    left = re.compile(r" · about \d:\d\d:\d\d left$")
    lines = [left.sub("", line) for line in caplog.messages]
    assert lines == [
        "ewc+replay-s0-1a2b3c4d: ewc + replay on toy, 2 tasks (north, south)",
        "parameters: 1,234,567 in total, 12,345 trainable (1.00 %)",
        "untrained: north 25.0, south 50.0",
        "task 1/2 north: 2 steps",
        "after 1/2 tasks: north 87.5, south 50.0",
        "task 2/2 south: 2 steps",
        "after 2/2 tasks: north 62.5, south 100.0",
    ]
    rows = [line.split() for line in printed(console).splitlines() if line.strip()]
    assert rows == [
        ["score", "on", "each", "task", "(%)"],
        ["north", "south"],
        rows[2],  # the rule below the head
        ["untrained", "25.0", "50.0"],
        ["after", "1", "north", "87.5", "50.0"],
        ["after", "2", "south", "62.5", "100.0"],
        ["metrics"],
        ["average_accuracy", "0.8125"],
        ["forgetting", "0.2500"],
        "intransigence is undefined: needs the scores of independently trained models".split(),
    ]
    assert "\x1b" not in console.file.getvalue()


def test_at_a_terminal_there_are_bars_over_tasks_and_steps(run_info, play):
    console = at_a_terminal()
    play(ConsoleObserver(console), run_info())
    text = printed(console)
    assert re.search(r"task 1/2 north ━+ 2/2", text)
    assert re.search(r"run +[━╸╺]+ 50 %", text)
    assert re.search(r"task 2/2 south ━+ 2/2 +loss 0.500", text)
    assert re.search(r"run +━+ 100 %", text)
    assert re.search(r"after 2 south +62.5 +100.0", text)
    # the cursor, hidden under the bars, is shown again
    assert console.file.getvalue().count("\x1b[?25l") == console.file.getvalue().count("\x1b[?25h")


def test_undefined_metrics_are_dim(run_info, play):
    console = at_a_terminal()
    play(ConsoleObserver(console), run_info())
    assert "\x1b[2mintransigence is undefined: needs" in console.file.getvalue()


def test_a_run_that_failed_has_no_tables_and_leaves_the_terminal_as_it_was(run_info):
    console = at_a_terminal()
    observer = ConsoleObserver(console)
    observer.on_run_start(run_info())
    observer.on_task_start(0, "north", 2)
    observer.on_error(RuntimeError("out of memory"))
    observer.close(1, None)
    assert "score on each task" not in printed(console)
    assert console.file.getvalue().count("\x1b[?25h") == 1


def test_log_lines_go_above_the_bars(run_info, monkeypatch):
    console = at_a_terminal()
    monkeypatch.setattr(sys, "stdout", console.file)
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    try:
        observer = ConsoleObserver(console)
        observer.on_run_start(run_info())
        observer.on_task_start(0, "north", 2)
        assert handler.stream is not console.file
        logging.getLogger("other").warning("look out")
        # rich clears the two lines of the bars, writes, and draws them again
        cleared = "\x1b[2K\x1b[1A\x1b[2K"
        assert f"{cleared}look out" in console.file.getvalue().replace("\r", "")
        observer.close(1, None)
        assert handler.stream is console.file
        assert sys.stdout is console.file
    finally:
        logging.getLogger().removeHandler(handler)


def test_the_time_left_counts_every_task_alike(run_info, clock, caplog):
    observer = ConsoleObserver(in_a_file())
    observer.on_run_start(run_info(tasks=("a", "b", "c", "d")))
    clock.now += 50  # the untrained model's evaluation, which does not come again
    observer.on_task_start(0, "a", 10)
    clock.now += 100
    observer.on_task_end(0)
    observer.on_evaluation(1, [0.5, None, None, None])
    # a quarter took 100 s, three are left
    assert caplog.messages[-1] == "after 1/4 tasks: a 50.0 · about 0:05:00 left"
    observer.on_task_start(1, "b", 1000)
    clock.now += 120
    for step in range(500):
        observer.on_step(11 + step, {"train/loss": 0.25})
    # 1.5 of 4 tasks took 220 s, so 2.5 take 366.67 s; said once a minute, here at the first chance
    said = [line for line in caplog.messages if "step" in line and "loss" in line]
    assert said == ["task 2/4 b: step 1/1000, loss 0.250, about 0:10:59 left"]
    observer.on_step(511, None)
    clock.now += 60
    observer.on_step(512, None)
    # 1.502 tasks took 280 s: 2.498 / 1.502 × 280 s = 465.67 s
    assert caplog.messages[-1] == "task 2/4 b: step 502/1000, loss 0.250, about 0:07:46 left"


def test_the_time_left_after_a_resume_counts_what_this_process_did(run_info, clock, caplog):
    observer = ConsoleObserver(in_a_file())
    observer.on_run_start(
        run_info(
            tasks=("a", "b", "c", "d"),
            resumed_at_step=15,
            resumed_at_task=1,
            resumed_task_steps=5,
        )
    )
    assert caplog.messages[-1] == "resumed after 15 steps, at task 2/4"
    observer.on_task_start(1, "b", 10)
    clock.now += 25
    observer.on_task_end(1)
    observer.on_evaluation(2, [None, 1.0, None, None])
    # from 3/8 to 1/2 in 25 s: the other half takes 100 s
    assert caplog.messages[-1].endswith("about 0:01:40 left")


def test_bars_are_not_drawn_more_often_than_twice_a_second(run_info, clock):
    console = at_a_terminal()
    observer = ConsoleObserver(console)
    observer.on_run_start(run_info())
    observer.on_task_start(0, "north", 1000)
    size = len(console.file.getvalue())
    clock.now += 0.49
    for step in range(1, 500):
        observer.on_step(step, {"train/loss": 1.0})
    assert len(console.file.getvalue()) == size
    clock.now += 0.02
    observer.on_step(500, None)
    assert "500/1000" in printed(console)
    observer.close(1, None)


def test_tasks_whose_training_is_left_to_a_later_one(run_info, clock, caplog):
    # as `joint` does: no row, no steps, and in the end one training for all
    observer = ConsoleObserver(in_a_file())
    observer.on_run_start(run_info())
    observer.on_evaluation(0, [None, None])
    observer.on_evaluation(1, [None, None])
    observer.on_task_end(0)
    assert len(caplog.messages) == 2  # the run and its parameters
    observer.on_task_start(1, "south", 4)
    clock.now += 61
    observer.on_step(1, {"train/loss": 0.5})
    # three more steps
    assert caplog.messages[-1] == "task 2/2 south: step 1/4, loss 0.500, about 0:03:03 left"


def test_a_task_without_steps(run_info, clock, caplog):
    observer = ConsoleObserver(in_a_file())
    observer.on_run_start(run_info())
    observer.on_task_start(0, "north", 0)
    observer.on_evaluation(1, [0.5, 0.5])
    observer.on_task_end(0)
    assert caplog.messages[-1] == "after 1/2 tasks: north 50.0, south 50.0"
    observer.on_task_start(1, "south", 2)
    clock.now += 100
    observer.on_step(1, {"train/loss": 0.5})
    assert caplog.messages[-1] == "task 2/2 south: step 1/2, loss 0.500, about 0:01:40 left"


def test_many_tasks_fit_a_narrow_terminal_and_are_whole_in_a_file(run_info):
    tasks = [f"dataset-{i}" for i in range(15)]
    results = {
        "matrix": [[0.125] * 15 for _ in range(16)],
        "tasks": tasks,
        "metrics": {},
        "undefined": {},
    }
    narrow = at_a_terminal(width=80)
    ConsoleObserver(narrow).close(0, results)
    row = next(line for line in printed(narrow).splitlines() if "15 dataset-14" in line)
    assert row.split()[2:] == ["12"] * 15
    file = in_a_file(width=80)
    ConsoleObserver(file).close(0, results)
    row = next(line for line in printed(file).splitlines() if "after 15 dataset-14" in line)
    assert row.split()[3:] == ["12.5"] * 15
    head = next(line for line in printed(file).splitlines() if "dataset-14" in line)
    assert head.split() == tasks


def test_log_lines_go_to_the_screen_and_with_their_time_into_a_file(tmp_path, capsys):
    (tmp_path / "run.log").write_text("from before\n")
    ours, other = logging.getLogger("clpeft.somewhere"), logging.getLogger("other")
    before = list(logging.getLogger().handlers)
    with log_to(tmp_path / "run.log"):
        ours.info("all is %s", "well")
        ours.debug("not said")
        other.warning("look out")
    ours.warning("not recorded")
    assert capsys.readouterr().out == "all is well\nWARNING: look out\n"
    lines = (tmp_path / "run.log").read_text().splitlines()
    stamp = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    assert [re.sub(stamp, "", line) for line in lines] == [
        "from before",
        "INFO clpeft.somewhere: all is well",
        "WARNING other: look out",
    ]
    assert logging.getLogger().handlers == before


def test_cells_that_were_not_evaluated_are_a_dot():
    console = in_a_file()
    console.print(matrix_table([[None], [0.5]], ["[red]"]))
    assert re.search(r"untrained +· *$", printed(console), re.MULTILINE)
    assert "[red]" in printed(console)  # a name, not a colour


def test_a_step_costs_next_to_nothing(run_info):
    observer = ConsoleObserver(in_a_file())
    observer.on_run_start(run_info())
    observer.on_task_start(0, "north", 100_000)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for step in range(10_000):
            observer.on_step(step, None)
        best = min(best, (time.perf_counter() - start) / 10_000)
    assert best < 20e-6  # measured: 0.2 µs


def test_importing_prints_nothing():
    script = "import clpeft.tracking.console, clpeft.tracking.history, clpeft.tracking.base"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == done.stderr == b""
