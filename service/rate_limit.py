"""A limit on the requests per second of each client, over HTTP and gRPC, counted for all workers together."""

import hashlib
import os
import time
from contextlib import suppress
from mmap import mmap
from pathlib import Path

from vitrine.service.errors import RateLimitedError
from vitrine.service.settings import SettingsError

_SETS, _WAYS = 4096, 8  # a client has its place in one set of eight
_PLACES = _SETS * _WAYS
_SALT_BYTES = 16
_SIZE = _SALT_BYTES + 16 * _PLACES


class RateLimit:
    """Allows each client `rate` requests per second, and bursts of one second's requests (at least one).

    A token bucket, stored as one number: the time at which the client's bucket will be full again (generic cell rate
    algorithm). The numbers are in a file of fixed size that all workers map, since a client's connections are spread
    over the workers by chance. It is not locked, so that no stopped worker can block the others; two workers that
    answer one client in the same microsecond may count one request instead of two. If more than about 30,000 clients
    are active at once, those that have used the least of their buckets are forgotten first.
    """

    def __init__(self, rate: float, folder: Path | None) -> None:
        """Allow `rate` requests per second, 0 any number; `folder` is shared by the workers, None: count alone.

        Raises:
            SettingsError: the folder has no room for the file.
        """
        self._rate = rate
        if rate == 0:
            return
        self._interval, self._burst = 1 / rate, max(1.0, 1 / rate)  # seconds
        try:
            view = memoryview(_map(folder / "rate_limit") if folder else _new_content())
        except OSError as error:
            raise SettingsError(f"TMPDIR: expected a folder with room for {_SIZE} bytes, found: {error}") from error
        self._salt = bytes(view[:_SALT_BYTES])  # unknown to clients: none can choose whose place it takes
        self._clients = view[_SALT_BYTES : _SALT_BYTES + 8 * _PLACES].cast("Q")
        self._full = view[_SALT_BYTES + 8 * _PLACES :].cast("d")

    def check(self, client: str) -> None:
        """Count a request of a client, named by its key or address.

        Raises:
            RateLimitedError: it has to wait; the request is not counted.
        """
        if self._rate == 0:
            return
        now = time.monotonic()  # the same in all processes
        place, number = self._place(client)
        full = max(now, self._full[place]) if self._clients[place] == number else now
        wait = full + self._interval - now - self._burst
        if wait > 1e-9:
            raise RateLimitedError(self._rate, wait)
        self._clients[place], self._full[place] = number, full + self._interval

    def _place(self, client: str) -> tuple[int, int]:
        """Return the client's place, or else the one to take, and the client's number."""
        digest = hashlib.blake2b(client.encode(errors="replace"), key=self._salt, digest_size=8).digest()
        number = int.from_bytes(digest)
        places = range(number % _SETS * _WAYS, (number % _SETS + 1) * _WAYS)
        for place in places:
            if self._clients[place] == number:
                return place, number
        return min(places, key=self._full.__getitem__), number


def _new_content() -> bytearray:
    return bytearray(os.urandom(_SALT_BYTES)).ljust(_SIZE, b"\0")


def _map(file: Path) -> mmap:
    if not file.exists():
        _create(file)
    with file.open("r+b") as opened:
        return mmap(opened.fileno(), _SIZE)


def _create(file: Path) -> None:
    """Make the file at once; written, not sparse: a full disk shows here, not as SIGBUS later."""
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    draft.write_bytes(_new_content())
    with suppress(FileExistsError):  # another worker was first
        os.link(draft, file)
    draft.unlink()
