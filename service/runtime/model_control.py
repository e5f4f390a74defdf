"""Loading and unloading while serving: done by one worker, followed by all others, answered when all have followed.

The workers of a server share a folder. A change is done in one worker first, under a lock; only if it succeeds is it
written to a journal, which every worker reads and repeats. A worker that joins later begins at the journal's end, with
the models that stand there as unloaded left out and what was loaded while it started itself.
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

_POLL_SECONDS = 0.1  # between looks at the journal's size
_FOLLOW_TIMEOUT_SECONDS = 30.0  # that the other workers get to follow


@dataclass(frozen=True)
class _Change:
    do: Literal["load", "unload", "refresh"]
    name: str = ""


@dataclass(frozen=True)
class _WorkerState:
    changes: int  # of the journal
    error: str = ""  # of the last of them


class ModelControl:
    """The changes of one worker's repository, in step with those of the other workers."""

    def __init__(self, repository: Repository, folder: Path, *, poll_seconds: float = 0.0) -> None:
        """Join the workers that share `folder`.

        Args:
            poll_seconds: between looks at the bundles' folders, by one of the workers; 0: never.
        """
        self._repository, self._folder, self._poll_seconds = repository, folder, poll_seconds
        self._journal = folder / "journal"
        self._own = folder / f"worker-{os.getpid()}"
        self._following = threading.Lock()
        self._followed = 0
        self._read = 0  # bytes of the journal
        folder.mkdir(parents=True, exist_ok=True)
        unloaded: set[str] = set()
        with self._locked("journal.lock"):
            for change in self._new_changes():
                unloaded = unloaded | {change.name} if change.do == "unload" else unloaded - {change.name}
            for name in unloaded:
                with contextlib.suppress(VitrineError):  # it is not there any more
                    repository.unload(name)
            if self._followed:
                self._refresh()
            self._report("")

    async def load(self, name: str) -> None:
        """`Repository.load` in every worker.

        Raises:
            UnknownModelError, BundleError: as `Repository.load`; nothing has changed then.
            WorkerError: another worker could not follow.
        """
        await self._change(_Change("load", name))

    async def unload(self, name: str) -> None:
        """`Repository.unload` in every worker.

        Raises:
            UnknownModelError: it is not served.
            WorkerError: another worker did not follow.
        """
        await self._change(_Change("unload", name))

    async def watch(self) -> None:
        """Follow the other workers and, if this one is to, look for changed folders, for ever."""
        next_poll = time.monotonic() + self._poll_seconds
        with contextlib.ExitStack() as stack:
            polls = False
            while True:
                await asyncio.sleep(_POLL_SECONDS)
                try:
                    if self._journal_size() > self._read:
                        await asyncio.to_thread(self._follow)
                    if self._poll_seconds and time.monotonic() >= next_poll:
                        next_poll = time.monotonic() + self._poll_seconds
                        polls = polls or self._try_lock(stack, "poll.lock")  # if this worker ends, another one polls
                        if polls:
                            await asyncio.to_thread(self._poll)
                except Exception:  # a full disk, say: what is loaded goes on answering
                    _log.exception("looking for changed bundles failed")

    def close(self) -> None:
        """Leave the other workers."""
        self._own.unlink(missing_ok=True)

    async def _change(self, change: _Change) -> None:
        number = await asyncio.to_thread(self._do_first, change)
        deadline = time.monotonic() + _FOLLOW_TIMEOUT_SECONDS
        for other in self._folder.glob("worker-*"):
            pid = int(other.name.removeprefix("worker-"))
            while (followed := _read(other)) is not None and followed.changes < number and _is_alive(pid):
                if time.monotonic() > deadline:
                    raise WorkerError(pid, f"nothing after {_FOLLOW_TIMEOUT_SECONDS:.0f} s")
                await asyncio.sleep(_POLL_SECONDS / 5)
            if followed is not None and followed.changes == number and followed.error and _is_alive(pid):
                raise WorkerError(pid, followed.error)

    def _do_first(self, change: _Change) -> int:
        """Make a change that no worker has made yet; its number in the journal."""
        with self._locked("journal.lock"):
            self._follow()
            with self._following:
                self._do(change)
                return self._publish(change)

    def _poll(self) -> None:
        with self._locked("journal.lock"):
            self._follow()
            with self._following:
                if self._refresh():
                    self._publish(_Change("refresh"))

    def _refresh(self) -> list[str]:
        """`Repository.refresh`, said in the log; without the folders everything stays as it is."""
        try:
            changes = self._repository.refresh()
        except VitrineError as error:
            _log.warning("bundles stay as they are: %s", error)
            return []
        for sentence in changes:
            _log.warning(sentence) if sentence.startswith("refused") else _log.info(sentence)
        return changes

    def _do(self, change: _Change) -> None:
        if change.do == "refresh":
            self._repository.refresh()
        elif change.do == "load":
            self._repository.load(change.name)
        else:
            self._repository.unload(change.name)
        _log.info("%s", f"{change.do}: {change.name}".rstrip(": "))

    def _publish(self, change: _Change) -> int:
        with self._journal.open("a") as journal:
            journal.write(json.dumps(asdict(change)) + "\n")
        self._read = self._journal_size()
        self._followed += 1
        self._report("")
        return self._followed

    def _follow(self) -> None:
        """Repeat what other workers have changed."""
        with self._following:
            for change in self._new_changes():
                error = ""
                try:
                    self._do(change)
                except VitrineError as caught:
                    error = str(caught)
                    _log.warning("cannot follow another worker: %s", error)
                self._report(error)

    def _new_changes(self) -> Iterator[_Change]:
        if not self._journal.exists():
            return
        with self._journal.open() as journal:
            journal.seek(self._read)
            lines = journal.read()
        for line in lines.splitlines(keepends=True):
            if line.endswith("\n"):  # else it is being written
                self._read += len(line.encode())
                self._followed += 1
                yield _Change(**json.loads(line))

    def _journal_size(self) -> int:
        try:
            return self._journal.stat().st_size
        except FileNotFoundError:
            return 0

    def _report(self, error: str) -> None:
        partial = self._own.with_name(f".{self._own.name}")
        partial.write_text(json.dumps(asdict(_WorkerState(self._followed, error))))
        partial.rename(self._own)

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


def _read(worker: Path) -> _WorkerState | None:
    try:
        return _WorkerState(**json.loads(worker.read_text()))
    except FileNotFoundError:  # it has ended
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
