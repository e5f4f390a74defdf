"""Numbers that the workers of a server share: each keeps its own in a file that the others read at any time.

A worker writes numbers straight into mapped memory, which outlives it: nothing is lost when it is killed, and a number
costs well under a microsecond. (prometheus-client's files do the same at two microseconds and more, and a request
counts a dozen numbers.)
"""

import mmap
import os
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import orjson

Key = tuple[str, ...]
"""A metric's name, and the values of its labels."""

_NUMBERS = ".numbers"  # float64, one after the other
_KEYS = ".keys"  # a line for each key: [first number, how many, the key]
_ROOM = 4096  # numbers that are made room for at a time


class SharedCounters:
    """Counters, gauges and histograms by key. Not for several threads."""

    def __init__(self, folder: Path | None = None) -> None:
        """Begin at nothing. In `folder` the numbers stand in a file of this process; without one in memory alone."""
        self.folder = folder
        self._places: dict[Key, int] = {}
        self._lengths: dict[Key, int] = {}
        self._used = 0
        self._numbers: memoryview[float] = memoryview(bytearray(8 * _ROOM)).cast("d")
        if folder is not None:
            name = str(os.getpid())
            self._keys_file = (folder / f"{name}{_KEYS}").open("wb", buffering=0)
            self._numbers_file = (folder / f"{name}{_NUMBERS}").open("w+b")
            self._map(_ROOM)

    def add(self, key: Key, amount: float) -> None:
        """Add to a counter or a gauge."""
        place = self._places.get(key)
        if place is None:
            place = self._new(key, 1)
        self._numbers[place] += amount

    def set(self, key: Key, value: float) -> None:
        """Set a gauge."""
        place = self._places.get(key)
        if place is None:
            place = self._new(key, 1)
        self._numbers[place] = value

    def observe(self, key: Key, value: float, buckets: Sequence[float]) -> None:
        """Count a value in a histogram: a number for each bucket, one for those above, and the sum of all values.

        Args:
            buckets: their upper bounds, ascending; always the same for a key.
        """
        place = self._places.get(key)
        if place is None:
            place = self._new(key, len(buckets) + 2)
        numbers = self._numbers
        numbers[place + bisect_left(buckets, value)] += 1
        numbers[place + len(buckets) + 1] += value

    def read(self) -> dict[Key, list[float]]:
        """All numbers by key."""
        return {key: _floats(self._numbers[at : at + self._lengths[key]]) for key, at in self._places.items()}

    def _new(self, key: Key, length: int) -> int:
        place = self._used
        self._used += length
        while self._used > len(self._numbers):
            self._map(len(self._numbers) + _ROOM)
        self._places[key], self._lengths[key] = place, length
        if self.folder is not None:
            self._keys_file.write(orjson.dumps([place, length, key]) + b"\n")
        return place

    def _map(self, room: int) -> None:
        if self.folder is None:
            larger = bytearray(8 * room)
            larger[: self._numbers.nbytes] = self._numbers.cast("B")
            self._numbers = memoryview(larger).cast("d")
        else:
            self._numbers_file.truncate(8 * room)
            self._numbers = memoryview(mmap.mmap(self._numbers_file.fileno(), 8 * room)).cast("d")


def read_shared_counters(folder: Path) -> dict[int, dict[Key, list[float]]]:
    """The numbers of every process that has ever written into `folder`, by its id."""
    found = {}
    for file in folder.glob(f"*{_KEYS}"):
        lines = file.read_bytes().splitlines()  # first the keys: their numbers are there already
        numbers = memoryview(file.with_suffix(_NUMBERS).read_bytes()).cast("d")
        entries = (orjson.loads(line) for line in lines)
        found[int(file.stem)] = {tuple(key): _floats(numbers[at : at + length]) for at, length, key in entries}
    return found


def _floats(numbers: "memoryview[float]") -> list[float]:
    return [float(number) for number in numbers]
