"""Counters shared by the workers of a server: each worker writes its own file, which the others can read at any time.

A worker writes numbers into mapped memory, which outlives it: nothing is lost if it is killed, and an update takes well
under a microsecond. (The files of prometheus-client do the same at two microseconds and more, and a request updates a
dozen numbers.) The space is allocated before it is mapped: on a full disk a worker counts on in its own memory.

A file consists of blocks. A block begins with the bytes in use; entries follow: a key and its numbers. The files of
workers that have ended are added up in one file.
"""

import contextlib
import fcntl
import io
import logging
import mmap
import os
import struct
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import orjson

Key = tuple[str, ...]
"""A metric's name and its label values."""

Numbers = dict[Key, list[float]]

ENDED = 0
"""Stands for all processes that have ended, instead of a process id."""

_log = logging.getLogger("bentoml.vitrine")

_BLOCK = max(1 << 15, mmap.ALLOCATIONGRANULARITY)  # bytes
_USED = struct.Struct("=q")  # bytes in use, itself included
_ENTRY = struct.Struct("=qq")  # length of the key in bytes, count of its numbers (float64)
_WORD = 8  # numbers are aligned to this many bytes
_SUFFIX = ".counters"  # of a file `<process id>-<its start time>-<random>`
_ENDED_FILE = f"ended{_SUFFIX}"
_INCLUDED = "included"  # first part of a key in `_ENDED_FILE`; the second is the name of a file that is in its sums
_PROCESSES = Path("/proc")


class SharedCounters:
    """Counters, gauges and histograms by key. Not thread-safe."""

    def __init__(self, folder: Path | None = None) -> None:
        """Start empty. The numbers are kept in a file of this process in `folder`; without a folder, in memory only.

        Numbers for which the folder has no space are kept in memory, too, and a warning says so once.
        """
        self.folder = folder
        self._cells: dict[Key, memoryview[float]] = {}
        self._blocks: list[memoryview] = []
        self._file: io.FileIO | None = None
        self._size = 0  # of the file, in bytes
        self._used = 0  # of the last block, in bytes
        self._warned = False
        self._start_block()

    def add(self, key: Key, amount: float) -> None:
        """Add to a counter or a gauge."""
        cell = self._cells.get(key)
        if cell is None:
            cell = self._allocate(key, 1)
        cell[0] += amount

    def set(self, key: Key, value: float) -> None:
        """Set a gauge."""
        cell = self._cells.get(key)
        if cell is None:
            cell = self._allocate(key, 1)
        cell[0] = value

    def observe(self, key: Key, value: float, buckets: Sequence[float]) -> None:
        """Add a value to a histogram: a count per bucket, a count of larger values, and the sum of all values.

        Args:
            buckets: upper bounds, ascending; always the same for a key.
        """
        cell = self._cells.get(key)
        if cell is None:
            cell = self._allocate(key, len(buckets) + 2)
        cell[bisect_left(buckets, value)] += 1
        cell[-1] += value

    def read(self) -> Numbers:
        """Return the numbers of all keys."""
        return {key: list(cell) for key, cell in self._cells.copy().items()}

    def _allocate(self, key: Key, length: int) -> "memoryview[float]":
        text = orjson.dumps(key)
        text += b" " * (-len(text) % _WORD)
        if self._used + _ENTRY.size + len(text) + _WORD * length > _BLOCK:
            self._start_block()
        start = self._used + _ENTRY.size + len(text)
        _ENTRY.pack_into(self._block, self._used, len(text), length)
        self._block[start - len(text) : start] = text
        self._used = start + _WORD * length
        cell = self._cells[key] = self._block[start : self._used].cast("d")
        _USED.pack_into(self._block, 0, self._used)  # last: readers see whole entries
        return cell

    def _start_block(self) -> None:
        self._block, self._used = memoryview(self._map_block() or bytearray(_BLOCK)), _USED.size
        _USED.pack_into(self._block, 0, self._used)
        self._blocks.append(self._block)

    def _map_block(self) -> mmap.mmap | None:
        """Extend the file by a block; None if that fails. Writing to space that is not allocated could kill us."""
        if self.folder is None:
            return None
        try:
            if self._file is None:
                prefix = f"{os.getpid()}-{_start_time(os.getpid())}-"
                descriptor, _ = tempfile.mkstemp(_SUFFIX, prefix, self.folder)
                self._file = io.FileIO(descriptor, "r+")
            os.posix_fallocate(self._file.fileno(), self._size, _BLOCK)
            block = mmap.mmap(self._file.fileno(), _BLOCK, offset=self._size)
        except OSError as error:
            if not self._warned:
                _log.warning(
                    "%s: counting in memory, only this worker's /metrics has the counts: %s", self.folder, error
                )
            self._warned = True
            return None
        self._size += _BLOCK
        return block


def read_shared_counters(folder: Path) -> dict[int, Numbers]:
    """Read the numbers of every process that has ever written into `folder`, by process id.

    Those that have ended are added up under `ENDED`. What is missing or damaged is left out.
    """
    while True:
        before = _content(folder / _ENDED_FILE)
        ended, included = _read_ended(folder)
        read = [(pid, _read(file)) for file, pid in _worker_files(folder) if file.name not in included]
        if _content(folder / _ENDED_FILE) == before:  # else files may have been added to it since they were read
            break
    counters = {pid: add_up(numbers for other, numbers in read if other == pid) for pid in {pid for pid, _ in read}}
    return {**counters, ENDED: add_up([ended, counters.get(ENDED, {})])}


def add_up(parts: Iterable[Numbers]) -> Numbers:
    """Return the sums of the numbers of each key."""
    sums: Numbers = {}
    for part in parts:
        for key, values in part.items():
            before = sums.get(key, ())  # of another length if a file is damaged
            sums[key] = [a + b for a, b in zip(before, values, strict=True)] if len(before) == len(values) else values
    return sums


def add_up_ended(folder: Path) -> None:
    """Move the numbers of the processes that have ended into one file; no reader misses them or sees them twice.

    If that fails, their files stay.
    """
    with contextlib.suppress(OSError), _locked(folder):
        ended, included = _read_ended(folder)
        files = [file for file, pid in _worker_files(folder) if pid == ENDED]
        if files:
            sums = add_up([ended, *(_read(file) for file in files if file.name not in included)])
            _write(folder / _ENDED_FILE, {**sums, **{(_INCLUDED, file.name): [1.0] for file in files}})
        for file in files:
            file.unlink()


def _worker_files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield each worker's file with its process id, which is `ENDED` if it has ended."""
    for file in folder.glob(f"*-*-*{_SUFFIX}"):
        pid, start, _ = file.name.split("-", 2)
        if pid.isdecimal():
            yield file, int(pid) if _start_time(int(pid)) == start else ENDED


def _start_time(pid: int) -> str:
    """Return when a process started, which tells apart processes with the same id; "" if it has ended."""
    if not _PROCESSES.is_dir():  # not Linux
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        return "unknown"
    try:
        fields = (_PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # Z: a zombie


def _read_ended(folder: Path) -> tuple[Numbers, set[str]]:
    """Read the sums of the ended processes and the names of the files that they include and that may still be there."""
    ended = _read(folder / _ENDED_FILE)
    included = {key for key in ended if key[0] == _INCLUDED}
    return {key: ended[key] for key in ended if key not in included}, {key[-1] for key in included}


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _read(file: Path) -> Numbers:
    """Read a file as far as it is whole."""
    content = _content(file)
    numbers: Numbers = {}
    for start in range(0, len(content) - _USED.size, _BLOCK):
        block = content[start : start + _BLOCK]
        at, end = _USED.size, min(_USED.unpack_from(block)[0], len(block))
        while at + _ENTRY.size <= end:
            key_length, count = _ENTRY.unpack_from(block, at)
            first = at + _ENTRY.size + key_length
            at = first + _WORD * count
            if min(key_length, count) <= 0 or at > end:
                break
            try:
                key = orjson.loads(block[first - key_length : first])
            except orjson.JSONDecodeError:
                break
            if not (isinstance(key, list) and key and all(isinstance(part, str) for part in key)):
                break
            numbers[tuple(key)] = list(struct.unpack_from(f"={count}d", block, first))
    return numbers


def _write(file: Path, numbers: Mapping[Key, Sequence[float]]) -> None:
    """Replace a file as a whole.

    Raises:
        OSError: it cannot be written, and is what it was.
    """
    counters = SharedCounters()
    for key, values in numbers.items():
        counters._allocate(key, len(values))[:] = memoryview(array("d", values))
    partial = file.with_suffix(".partial")
    partial.write_bytes(b"".join(counters._blocks))
    partial.replace(file)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder.

    Raises:
        OSError: another process has locked it, or it cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
