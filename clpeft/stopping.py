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
        at_once: Whether nothing is to be saved on the way out.

    Attributes:
        signal: Which signal asked.
        exit_code: What a process that stopped for it ends with.
    """

    def __init__(self, number: int, at_once: bool = False) -> None:
        self.at_once = at_once
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number  # as shells count: 130 after Ctrl-C, 143 after SIGTERM
        by = "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name
        super().__init__(f"stopped by {by}; the same command, or clpeft resume, continues it")

    def __reduce__(self) -> tuple[type[Preempted], tuple[int, bool]]:
        # from a worker process to the one that started it
        return type(self), (int(self.signal), self.at_once)


class StopRequests:
    """Whether this process was asked to stop.

    Attributes:
        wanted: The number of the signal that asked; 0 if none did.
    """

    def __init__(self) -> None:
        self.wanted = 0
        self._patient = False

    def agreed(self, agree: Callable[..., list[int]]) -> int:
        """The signal that the processes of a run go by; 0 if none of them got one.

        Args:
            agree: Gives the largest of what each process hands it.
        """
        order = (0, signal.SIGINT, signal.SIGTERM, *reversed(REQUEUED_AFTER))
        (place,) = agree(order.index(self.wanted) if self.wanted in order else 0)
        return int(order[place])

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
        if self.wanted:
            # The first wish counts: after USR1 a batch system's SIGTERM follows, which must not
            # take the requeueing back. Only a person may become impatient.
            if number == signal.SIGINT:
                raise Preempted(number, at_once=True)
            return
        self.wanted = number
        if not self._patient:
            raise Preempted(number, at_once=True)
        if number == signal.SIGINT:
            # not print: a handler may stand in the middle of another one
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
