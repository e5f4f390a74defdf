"""Loading and unloading models while serving, in step across all workers.

The workers of a server share a folder. One worker applies a change first, under a lock; if it succeeds, the worker
appends it to a journal, which all others read and replay. The request is answered when all have done so. A worker that
joins later starts at the end of the journal: it unloads the models that the journal unloaded, and loads those that were
loaded while it was starting.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vitrine.bundle.errors import VitrineError
from vitrine.bundle.repository import Repository
from vitrine.service.errors import WorkerError

_log = logging.getLogger("bentoml.vitrine")

_POLL_SECONDS = 0.1  # polling interval of the journal
_REPLAY_TIMEOUT_SECONDS = 30.0  # for the other workers to replay a change


@dataclass(frozen=True)
class _Change:
    action: Literal["load", "unload", "refresh"]
    name: str = ""


@dataclass(frozen=True)
class _WorkerState:
    change_count: int  # replayed changes of the journal
    error: str = ""  # error of the last change


class ModelControl:
    """Loads and unloads models of this worker's repository in step with the other workers."""

    def __init__(self, repository: Repository, folder: Path, *, poll_seconds: float = 0.0) -> None:
        """Join the workers that share `folder`.

        Args:
            poll_seconds: interval at which one of the workers polls the bundle folders; 0: never.
        """
        self._repository, self._folder, self._poll_seconds = repository, folder, poll_seconds
        self._journal = folder / "journal"
        self._state_file = folder / f"worker-{os.getpid()}"
        self._apply_lock = threading.Lock()
        self._change_count = 0  # replayed changes of the journal
        self._offset = 0  # replayed bytes of the journal
        folder.mkdir(parents=True, exist_ok=True)
        unloaded: set[str] = set()
        with self._locked("journal.lock"):
            for change in self._read_journal():
                unloaded = unloaded | {change.name} if change.action == "unload" else unloaded - {change.name}
            for name in unloaded:
                with contextlib.suppress(VitrineError):  # no longer in the folders
                    repository.unload(name)
            if self._change_count:
                self._refresh()
            self._write_state()

    async def load(self, name: str) -> None:
        """Load a model, or reload it, in every worker. See `Repository.load`.

        Raises:
            UnknownModelError, BundleError: see `Repository.load`; no worker has changed.
            WorkerError: another worker could not replay the change.
        """
        await self._change(_Change("load", name))

    async def unload(self, name: str) -> None:
        """Unload a model in every worker. See `Repository.unload`.

        Raises:
            UnknownModelError: the model is not served.
            WorkerError: another worker could not replay the change.
        """
        await self._change(_Change("unload", name))

    async def watch(self) -> None:
        """Replay the other workers' changes and, in one of the workers, poll the bundle folders; never returns."""
        next_poll = time.monotonic() + self._poll_seconds
        with contextlib.ExitStack() as stack:
            polls = False
            while True:
                await asyncio.sleep(_POLL_SECONDS)
                try:
                    if self._journal_size() > self._offset:
                        await asyncio.to_thread(self._replay)
                    if self._poll_seconds and time.monotonic() >= next_poll:
                        next_poll = time.monotonic() + self._poll_seconds
                        polls = polls or self._try_lock(stack, "poll.lock")  # released when this worker ends
                        if polls:
                            await asyncio.to_thread(self._poll)
                except Exception:  # such as a full disk: keep serving what is loaded
                    _log.exception("following the other workers or polling the bundles failed")

    def close(self) -> None:
        """Leave the other workers."""
        self._state_file.unlink(missing_ok=True)

    async def _change(self, change: _Change) -> None:
        number = await asyncio.to_thread(self._apply_first, change)
        deadline = time.monotonic() + _REPLAY_TIMEOUT_SECONDS
        for file in self._folder.glob("worker-*"):
            pid = int(file.name.removeprefix("worker-"))
            while (state := _read_state(file)) is not None and state.change_count < number and _is_alive(pid):
                if time.monotonic() > deadline:
                    raise WorkerError(pid, f"nothing after {_REPLAY_TIMEOUT_SECONDS:.0f} s")
                await asyncio.sleep(_POLL_SECONDS / 5)
            if state is not None and state.change_count == number and state.error and _is_alive(pid):
                raise WorkerError(pid, state.error)

    def _apply_first(self, change: _Change) -> int:
        """Apply a new change and append it to the journal; return its number there."""
        with self._locked("journal.lock"):
            self._replay()
            with self._apply_lock:
                self._apply(change)
                return self._append(change)

    def _poll(self) -> None:
        with self._locked("journal.lock"):
            self._replay()
            with self._apply_lock:
                if self._refresh():
                    self._append(_Change("refresh"))

    def _refresh(self) -> list[str]:
        """Refresh the repository and log the changes; if a bundle folder is missing, change nothing."""
        try:
            changes = self._repository.refresh()
        except VitrineError as error:
            _log.warning("bundles not refreshed: %s", error)
            return []
        for change in changes:
            _log.warning(change) if change.startswith("refused") else _log.info(change)
        return changes

    def _apply(self, change: _Change) -> None:
        if change.action == "refresh":
            self._repository.refresh()
        elif change.action == "load":
            self._repository.load(change.name)
        else:
            self._repository.unload(change.name)
        _log.info("%s", f"{change.action}: {change.name}".rstrip(": "))

    def _append(self, change: _Change) -> int:
        with self._journal.open("a") as journal:
            journal.write(json.dumps(asdict(change)) + "\n")
        self._offset = self._journal_size()
        self._change_count += 1
        self._write_state()
        return self._change_count

    def _replay(self) -> None:
        """Apply the new changes of other workers."""
        with self._apply_lock:
            for change in self._read_journal():
                error = ""
                try:
                    self._apply(change)
                except VitrineError as caught:
                    error = str(caught)
                    _log.warning("cannot replay another worker's change: %s", error)
                self._write_state(error)

    def _read_journal(self) -> Iterator[_Change]:
        """Yield the changes that were appended since the last call."""
        if not self._journal.exists():
            return
        with self._journal.open() as journal:
            journal.seek(self._offset)
            lines = journal.read()
        for line in lines.splitlines(keepends=True):
            if line.endswith("\n"):  # else it is still being written
                self._offset += len(line.encode())
                self._change_count += 1
                yield _Change(**json.loads(line))

    def _journal_size(self) -> int:
        try:
            return self._journal.stat().st_size
        except FileNotFoundError:
            return 0

    def _write_state(self, error: str = "") -> None:
        partial = self._state_file.with_name(f".{self._state_file.name}")
        partial.write_text(json.dumps(asdict(_WorkerState(self._change_count, error))))
        partial.rename(self._state_file)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._folder / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _try_lock(self, stack: contextlib.ExitStack, name: str) -> bool:
        lock = (self._folder / name).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        stack.enter_context(lock)
        return True


def _read_state(file: Path) -> _WorkerState | None:
    try:
        return _WorkerState(**json.loads(file.read_text()))
    except FileNotFoundError:  # the worker has ended
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
