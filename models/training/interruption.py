"""SIGTERM and Ctrl-C ask a run to save and to end; a second Ctrl-C ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """Raised where waiting for the next step would take too long."""


class Interruption:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.requested = False
        self._raises = False

    @contextmanager
    def raised(self) -> Iterator[None]:
        """While here, a request raises `Interrupted`."""
        self._raises = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._raises = False

    def _request(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._raises:
            raise Interrupted


@contextmanager
def handle_signals() -> Iterator[Interruption]:
    """Listen to the signals; only a process's main thread can."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption._request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
