"""Loading and unloading models while serving, in step across all workers.

What the workers are to serve is one value, a numbered `RepositoryState` in a file in a folder that they share. The
worker that changes it loads and verifies the bundles first, under a lock, then replaces the file, then serves them.
Every worker follows the newest value: one that starts or was stopped for a while misses nothing, and one that cannot
serve what the value says keeps what it serves, reports why, and tries again. A request is answered when all workers
have followed as far as its model is concerned.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from pathlib import Path

from vitrine.bundle.errors import VitrineError
from vitrine.bundle.repository import Publish, Repository, RepositoryState, Version
from vitrine.service.errors import UnavailableError, UnfinishedError, WorkerError

_log = logging.getLogger("bentoml.vitrine")

_INTERVAL_SECONDS = 0.1  # between looks at the state
_LOCK_SECONDS = 15.0  # until a worker no longer waits for another one to release the state
_LOCK_INTERVAL_SECONDS = 0.01  # between attempts to take it
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds until a worker that could not follow tries again; doubled each time
_STATE_FILE, _POLL_FILE = "models", "polled"
_MAPPINGS = ("served", "refused", "unloaded")  # of `RepositoryState`
_ALL = ""  # in place of a model's name


class ModelControl:
    """Loads and unloads models of this worker's repository in step with the other workers."""

    def __init__(self, repository: Repository, folder: Path, *, poll_seconds: float = 0.0) -> None:
        """Join the workers that share `folder`: follow their state, or make the repository's the first.

        Args:
            poll_seconds: interval at which one of the workers polls the bundle folders; 0: never.
        """
        self._repository, self._folder, self._poll_seconds = repository, folder, poll_seconds
        self._state_file, self._poll_file = folder / _STATE_FILE, folder / _POLL_FILE
        pid = os.getpid()
        self._worker_file = folder / f"worker-{pid}-{_start_time(pid)}-{uuid.uuid4().hex[:8]}"
        self._thread = ThreadPoolExecutor(1, "models")  # all changes, one after the other
        self._closing = threading.Event()
        self._is_locked = False
        self._seen, self._number = b"", 0  # the newest state that this worker has tried to follow
        self._is_behind = False  # it could not
        self._report, self._problem = "", ""
        self._pause, self._next_try = _FIRST_PAUSE, math.inf
        self._next_poll = time.monotonic() + poll_seconds if poll_seconds else math.inf
        self._write_report()  # from now on, changes wait for this worker
        self.step()

    async def load(self, name: str, *, seconds: float) -> None:
        """Load a model, or reload it, in every worker. See `Repository.load`.

        If the caller is cancelled, the change takes effect as a whole or, if it has not begun, not at all.

        Args:
            seconds: time to wait for the change, and for the other workers.

        Raises:
            UnknownModelError, BundleError, ResourceError: see `Repository.load`; no worker has changed.
            UnavailableError: the state cannot be written, or another worker does not release it; no worker has changed.
            UnfinishedError: the time is up; the change may still take effect.
            WorkerError: another worker could not follow as far as this model is concerned, or has not yet.
        """
        await self._change(name, partial(self._repository.load, name), seconds)

    async def unload(self, name: str, *, seconds: float) -> None:
        """Unload a model in every worker. See `Repository.unload` and `load`.

        Raises:
            UnknownModelError: the model is not served.
            UnavailableError, UnfinishedError, WorkerError: see `load`.
        """
        await self._change(name, partial(self._repository.unload, name), seconds)

    async def watch(self) -> None:
        """Follow the other workers and, in one worker at a time, poll the bundle folders; never returns."""
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            if time.monotonic() >= min(self._next_try, self._next_poll) or self._has_news():
                await asyncio.get_running_loop().run_in_executor(self._thread, self.step)

    def step(self) -> None:
        """Follow the newest state, and poll the bundle folders if it is time to; after a failure, try again later."""
        try:
            self._follow()
            if self._repository.errors:  # such as files that have changed since: their new content is the new state
                with self._locked():
                    self._refresh(only_errors=True)
            if time.monotonic() >= self._next_poll:
                self._next_poll = time.monotonic() + self._poll_seconds
                self._poll()
            problem = next(iter(self._repository.errors.values()), "")
        except Exception as error:  # such as a full disk
            problem = str(error) or type(error).__name__
            if not isinstance(error, VitrineError | OSError):
                _log.exception("following the other workers failed")
        problem = self._write_report() or problem
        if problem and problem != self._problem:
            _log.warning("models: will be tried again: %s", problem)
        self._problem = problem
        self._next_try = time.monotonic() + self._pause if problem else math.inf
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if problem else _FIRST_PAUSE

    def close(self) -> None:
        """Leave the other workers."""
        self._closing.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        _remove(self._worker_file)

    async def _change(self, name: str, change: Callable[[Publish], list[str]], seconds: float) -> None:
        start = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                number = await asyncio.get_running_loop().run_in_executor(self._thread, self._lead, change)
        except TimeoutError as error:
            raise UnfinishedError(name, seconds) from error
        try:
            await self._wait_for_workers(name, number, start, seconds)
        except OSError as error:  # such as too many open files
            raise WorkerError(os.getpid(), str(error)) from error

    async def _wait_for_workers(self, name: str, number: int, start: float, seconds: float) -> None:
        for file in self._worker_files():
            pid, started = int(file.name.split("-")[1]), file.name.split("-")[2]
            while _start_time(pid) == started and file.exists():
                followed, errors = _read_report(file)
                if followed >= number:
                    if error := errors.get(name) or errors.get(_ALL):
                        raise WorkerError(pid, error)
                    break
                if time.monotonic() > start + seconds:
                    raise WorkerError(pid, f"nothing after {seconds:.1f} s")
                await asyncio.sleep(_INTERVAL_SECONDS / 5)
            else:  # it has ended
                _remove(file)

    def _lead(self, change: Callable[[Publish], list[str]]) -> int:
        """Make a change and publish it. Return the number of the state."""
        try:
            with self._locked():
                self._follow()
                _log_changes(change(self._publish))
        except OSError as error:  # such as too many open files
            raise UnavailableError(f"models: expected to change them, found: {error}") from error
        self._write_report()
        time.sleep(2 * _LOCK_INTERVAL_SECONDS)  # a worker that waits for the lock is next, not this one
        return self._number

    def _has_news(self) -> bool:
        try:
            return _read(self._state_file) != self._seen
        except OSError:  # such as too many open files
            return False

    def _follow(self) -> None:
        data = _read(self._state_file)
        if not self._follow_data(data):
            self._restore(data)

    def _follow_data(self, data: bytes) -> bool:
        """Follow the state in a file's content. Return whether it is readable."""
        if data and data == self._seen and not self._is_behind:
            return True
        decoded = _decode(data)
        if decoded is None:
            return False
        self._seen, (self._number, state), self._is_behind = data, decoded, True
        _log_changes(self._repository.follow(state))
        self._is_behind = False
        return True

    def _restore(self, unreadable: bytes) -> None:
        """Write the state of this worker, as there is none, or one that is damaged."""
        with self._locked():
            if _read(self._state_file) != unreadable:
                self._follow()
                return
            if self._number or unreadable:
                _log.warning("%s: expected the state of the models, found it damaged or gone", self._state_file)
            self._publish(self._repository.state)

    def _poll(self) -> None:
        """Poll the bundle folders, unless another worker has done so within the interval."""
        with self._locked():
            now = time.monotonic()  # the same for all processes
            with contextlib.suppress(ValueError):
                if 0 <= now - float(_read(self._poll_file)) < self._poll_seconds:
                    return
            self._refresh()
            with contextlib.suppress(OSError):
                self._write(self._poll_file, str(now).encode())

    def _refresh(self, *, only_errors: bool = False) -> None:
        self._follow()
        paths = self._repository.errors if only_errors else None
        _log_changes(self._repository.refresh(self._publish, paths=paths))

    def _publish(self, state: RepositoryState) -> None:
        try:
            number = 1 + max(self._number, *(_read_report(file)[0] for file in self._worker_files()), 0)
            data = _encode(number, state)
            self._write(self._state_file, data)
        except OSError as error:
            reason = f"expected to write {self._state_file}, found: {error.strerror}; nothing has changed"
            raise UnavailableError(f"models: {reason}") from error
        self._seen, self._number = data, number

    def _write_report(self) -> str:
        """Tell the other workers which state this one has tried to follow, and what went wrong. Return an error."""
        served = self._repository.state.served
        errors = {served[path].name: error for path, error in self._repository.errors.items()}
        if self._is_behind:
            errors[_ALL] = "an unexpected error"
        report = json.dumps([self._number, errors])
        if report != self._report:
            try:
                self._write(self._worker_file, report.encode())
            except OSError as caught:
                return f"expected to write {self._worker_file}, found: {caught.strerror}"
            self._report = report
        return ""

    def _worker_files(self) -> list[Path]:
        return [self._folder / name for name in os.listdir(self._folder) if name.startswith("worker-")]

    def _write(self, file: Path, data: bytes) -> None:
        """Write a file as a whole or not at all."""
        partial_file = _partial(self._worker_file)
        try:
            partial_file.write_bytes(data)
            partial_file.rename(file)
        except OSError:
            partial_file.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude the other workers; reentrant.

        Raises:
            UnavailableError: another worker holds the lock for too long.
        """
        if self._is_locked:
            yield
            return
        lock = os.open(self._folder, os.O_RDONLY)
        try:
            self._lock(lock)
            self._is_locked = True
            yield
        finally:
            self._is_locked = False
            fcntl.flock(lock, fcntl.LOCK_UN)  # also if a child process has inherited it
            os.close(lock)

    def _lock(self, lock: int) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(lock):
            if self._has_news() and self._follow_data(_read(self._state_file)):  # others wait for this worker
                self._write_report()
            if time.monotonic() > deadline or self._closing.wait(_LOCK_INTERVAL_SECONDS):
                found = f"another worker that does so for {_LOCK_SECONDS:.0f} s"
                raise UnavailableError(f"models: expected to change them, found {found}")


def read_state(folder: Path) -> RepositoryState | None:
    """Return the state of the workers that share a folder; None if there is none yet, or it cannot be read."""
    with contextlib.suppress(OSError):
        if (decoded := _decode(_read(folder / _STATE_FILE))) is not None:
            return decoded[1]
    return None


def _encode(number: int, state: RepositoryState) -> bytes:
    """Return a state in JSON, after a line with its hash."""
    document: dict[str, object] = {"number": number}
    for name in _MAPPINGS:
        document[name] = {str(path): astuple(version) for path, version in getattr(state, name).items()}
    body = json.dumps(document).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _decode(data: bytes) -> tuple[int, RepositoryState] | None:
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    document = json.loads(body)
    mappings = {name: {Path(path): Version(*fields) for path, fields in document[name].items()} for name in _MAPPINGS}
    return document["number"], RepositoryState(**mappings)


def _read(file: Path) -> bytes:
    """Return the content of a file, nothing if there is none."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _read_report(file: Path) -> tuple[int, Mapping[str, str]]:
    """Return the number of the state that a worker has tried to follow, and errors by model; -1 if it has ended."""
    try:
        number, errors = json.loads(_read(file))
        return int(number), dict(errors)
    except (ValueError, TypeError):
        return -1, {}


def _start_time(pid: int) -> str:
    """Return when a process started, which tells it from an earlier one with its number; "" if it has ended."""
    stat = _read(Path(f"/proc/{pid}/stat")).decode(errors="replace").rpartition(")")[2].split()
    return "" if not stat or stat[0] in "ZX" else stat[19]


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _partial(worker_file: Path) -> Path:
    return worker_file.with_name(f".{worker_file.name}")


def _remove(worker_file: Path) -> None:
    for file in (worker_file, _partial(worker_file)):
        with contextlib.suppress(OSError):
            file.unlink()


def _log_changes(changes: list[str]) -> None:
    for change in changes:
        _log.warning(change) if change.startswith("refused") else _log.info(change)
