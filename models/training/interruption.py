"""SIGTERM and Ctrl-C make a run save and stop; a second Ctrl-C stops it immediately."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """Training was asked to stop."""


class Interruption:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._immediate = False

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise `Interrupted` on a request inside the block, instead of waiting for the end of a step."""
        self._immediate = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._immediate = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._immediate:
            raise Interrupted


@contextmanager
def handle_signals() -> Iterator[Interruption]:
    """Handle the signals inside the block, if this is the main thread: Python allows handlers only there."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    previous = {number: signal.signal(number, interruption._handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
