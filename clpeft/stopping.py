"""Signals as wishes: a run that is asked to stop saves its state at the next step and stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# what batch systems send before they take a machine away, and what a person at a terminal sends
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
REQUEUED_AFTER = (signal.SIGUSR1, signal.SIGUSR2)  # SIGTERM may be a cancellation, which is final


class Preempted(KeyboardInterrupt):
    """The run was asked to stop, and stopped at a point from which it can go on.

    Args:
        number: Of the signal.

    Attributes:
        signal: Which signal asked.
        exit_code: What a process that stopped for it ends with.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number  # as shells count: 130 after Ctrl-C, 143 after SIGTERM
        by = "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name
        super().__init__(f"stopped by {by}; the same command, or clpeft resume, continues it")

    def __reduce__(self) -> tuple[type[Preempted], tuple[int]]:
        # from a worker process to the one that started it
        return type(self), (int(self.signal),)


class StopRequests:
    """Whether this process was asked to stop.

    Attributes:
        wanted: The number of the signal that asked; 0 if none did.
    """

    def __init__(self) -> None:
        self.wanted = 0
        self._patient = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over for as long as the inside lasts.

        A signal that the process ignores (SIGINT in a background job) stays ignored. Only the main
        thread can take signals over; elsewhere nothing is done.
        """
        with self.handling(self._heard):
            yield

    @staticmethod
    @contextmanager
    def handling(heard: Callable[[int, FrameType | None], None]) -> Iterator[None]:
        """As `listening`, with another handler.

        Args:
            heard: What is called with the signal's number.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {
            number: signal.getsignal(number)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        for number in before:
            signal.signal(number, heard)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Inside, a signal is only noted: whoever works there looks at `wanted` at times.

        Outside, where there is nothing to save, `Preempted` is raised at once.
        """
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        again = self.wanted and number == signal.SIGINT
        self.wanted = number
        if again or not self._patient:
            raise Preempted(number)
        if number == signal.SIGINT:
            # not print: a handler may stand in the middle of another one
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
