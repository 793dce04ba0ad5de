"""The guard between observers and training."""

import time

import pytest

from clpeft.tracking.base import Observer, Observers


class Recorder(Observer):
    """Remembers every call; raises `error` in the hook named `failing`."""

    def __init__(self, failing="", error=None):
        self.calls = []
        self.failing = failing
        self.error = error or RuntimeError("disk full")

    def _called(self, hook, *values):
        self.calls.append((hook, *values))
        if hook == self.failing:
            raise self.error

    def on_run_start(self, info):
        self._called("on_run_start", info)

    def on_task_start(self, index, name, steps):
        self._called("on_task_start", index, name, steps)

    def on_step(self, step, logs):
        self._called("on_step", step, logs)

    def on_evaluation(self, trained, row):
        self._called("on_evaluation", trained, row)

    def on_task_end(self, index):
        self._called("on_task_end", index)

    def on_error(self, error):
        self._called("on_error", error)

    def close(self, exit_code, results):
        self._called("close", exit_code, results)


ERROR = ValueError("stop")
CALLS = [
    ("on_run_start", "info"),
    ("on_task_start", 0, "north", 5),
    ("on_step", 1, None),
    ("on_step", 2, {"train/loss": 1.0}),
    ("on_evaluation", 1, [0.5, None]),
    ("on_task_end", 0),
    ("on_error", ERROR),
    ("close", 1, {"metrics": {}}),
]


def play(observers, calls=CALLS):
    for hook, *values in calls:
        getattr(observers, hook)(*values)


def test_every_hook_reaches_every_observer():
    first, second = Recorder(), Recorder()
    play(Observers([first, second]))
    assert first.calls == CALLS
    assert second.calls == CALLS


@pytest.mark.parametrize("hook", [call[0] for call in CALLS if call[0] != "on_step"] + ["on_step"])
def test_an_observer_that_raises_is_switched_off_named_and_still_closed(hook, caplog):
    broken, healthy = Recorder(failing=hook), Recorder()
    play(Observers([broken, healthy]))
    assert healthy.calls == CALLS
    reached = next(i for i, call in enumerate(CALLS) if call[0] == hook)
    expected = CALLS[: reached + 1]
    if hook != "close":
        expected = [*expected, CALLS[-1]]
    assert broken.calls == expected
    assert f"Recorder failed in {hook} and is switched off" in caplog.text
    assert "disk full" in caplog.text


def test_an_interrupt_is_not_swallowed():
    observers = Observers([Recorder(failing="on_step", error=KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        observers.on_step(1, None)


def test_observers_close_in_reverse():
    order = []

    class Named(Observer):
        def __init__(self, name):
            self.name = name

        def close(self, exit_code, results):
            order.append(self.name)

    Observers([Named("first"), Named("second")]).close(0, None)
    assert order == ["second", "first"]


def test_the_base_observer_does_nothing():
    play(Observer())


def test_a_silent_step_costs_next_to_nothing():
    observers = Observers([Observer(), Observer(), Observer(), Observer()])
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for step in range(10_000):
            observers.on_step(step, None)
        best = min(best, (time.perf_counter() - start) / 10_000)
    assert best < 4 * 5e-6  # measured: 0.4 µs for the four
