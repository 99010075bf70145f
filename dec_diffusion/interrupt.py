"""Stopping a run where it can be resumed: what pre-emption and Ctrl-C ask for."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StoppedError(Exception):
    """A run ended early because it was asked to; the same command resumes it."""


class Stop:
    """Whether a run was asked to stop; nothing asks unless ``listening``."""

    def __init__(self) -> None:
        self._asked = self._deferred = False

    def asked(self) -> bool:
        """Whether it was."""
        return self._asked

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block SIGTERM raises StoppedError, and SIGINT what it always does.

        Signals can be caught in the main thread only; elsewhere this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = signal.SIGTERM, signal.SIGINT
        previous = {number: signal.signal(number, self._handle) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block the first signal only counts as asking, and a second Ctrl-C raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and not (self._asked and number == signal.SIGINT):
            self._asked = True
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise StoppedError("stopped, as asked; the same command goes on")
