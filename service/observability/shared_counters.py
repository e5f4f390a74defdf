"""Counters shared by the workers of a server: each worker writes its own file, which the others can read at any time.

A worker writes numbers into mapped memory, which outlives it: nothing is lost if it is killed, and an update takes well
under a microsecond. (The files of prometheus-client do the same at two microseconds and more, and a request updates a
dozen numbers.)
"""

import mmap
import os
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import orjson

Key = tuple[str, ...]
"""A metric's name and its label values."""

_NUMBERS = ".numbers"  # float64 values
_KEYS = ".keys"  # one line per key: [offset of its first number, number count, key]
_BLOCK = 4096  # numbers; the files grow by this


class SharedCounters:
    """Counters, gauges and histograms by key. Not thread-safe."""

    def __init__(self, folder: Path | None = None) -> None:
        """Start empty. The numbers are kept in this process's file in `folder`; without a folder, in memory only."""
        self.folder = folder
        self._offsets: dict[Key, int] = {}
        self._lengths: dict[Key, int] = {}
        self._used = 0
        self._numbers: memoryview[float] = memoryview(bytearray(8 * _BLOCK)).cast("d")
        if folder is not None:
            name = str(os.getpid())
            self._keys_file = (folder / f"{name}{_KEYS}").open("wb", buffering=0)
            self._numbers_file = (folder / f"{name}{_NUMBERS}").open("w+b")
            self._resize(_BLOCK)

    def add(self, key: Key, amount: float) -> None:
        """Add to a counter or a gauge."""
        offset = self._offsets.get(key)
        if offset is None:
            offset = self._allocate(key, 1)
        self._numbers[offset] += amount

    def set(self, key: Key, value: float) -> None:
        """Set a gauge."""
        offset = self._offsets.get(key)
        if offset is None:
            offset = self._allocate(key, 1)
        self._numbers[offset] = value

    def observe(self, key: Key, value: float, buckets: Sequence[float]) -> None:
        """Add a value to a histogram: a count per bucket, a count of larger values, and the sum of all values.

        Args:
            buckets: upper bounds, ascending; always the same for a key.
        """
        offset = self._offsets.get(key)
        if offset is None:
            offset = self._allocate(key, len(buckets) + 2)
        numbers = self._numbers
        numbers[offset + bisect_left(buckets, value)] += 1
        numbers[offset + len(buckets) + 1] += value

    def read(self) -> dict[Key, list[float]]:
        """Return the numbers of all keys."""
        return {key: list(self._numbers[at : at + self._lengths[key]]) for key, at in self._offsets.items()}

    def _allocate(self, key: Key, length: int) -> int:
        offset = self._used
        self._used += length
        while self._used > len(self._numbers):
            self._resize(len(self._numbers) + _BLOCK)
        self._offsets[key], self._lengths[key] = offset, length
        if self.folder is not None:
            self._keys_file.write(orjson.dumps([offset, length, key]) + b"\n")
        return offset

    def _resize(self, count: int) -> None:
        if self.folder is None:
            larger = bytearray(8 * count)
            larger[: self._numbers.nbytes] = self._numbers.cast("B")
            self._numbers = memoryview(larger).cast("d")
        else:
            self._numbers_file.truncate(8 * count)
            self._numbers = memoryview(mmap.mmap(self._numbers_file.fileno(), 8 * count)).cast("d")


def read_shared_counters(folder: Path) -> dict[int, dict[Key, list[float]]]:
    """Read the numbers of every process that has ever written into `folder`, by process id."""
    counters = {}
    for file in folder.glob(f"*{_KEYS}"):
        lines = file.read_bytes().splitlines()  # keys first: their numbers exist by then
        numbers = memoryview(file.with_suffix(_NUMBERS).read_bytes()).cast("d")
        entries = (orjson.loads(line) for line in lines)
        counters[int(file.stem)] = {tuple(key): list(numbers[at : at + length]) for at, length, key in entries}
    return counters
