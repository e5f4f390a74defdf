"""Workers watch the processes around them: they end when their parent is gone, and know which others are silent."""

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from io import FileIO
from pathlib import Path

_log = logging.getLogger("bentoml.vitrine")

SILENT_SECONDS = 10.0  # after which a worker is reported as stopped or hung
ORPHAN_SECONDS = 10.0  # for requests in work after the parent has ended
BEAT_SECONDS = 1.0
_WATCH_SECONDS = 0.5
_DUTY_PAUSE_SECONDS = 1.0  # until a duty that has failed begins again
_SUFFIX = ".heartbeat"
_TIME = struct.Struct("=d")  # time.monotonic(), whose clock all processes of a machine share
_PR_SET_PDEATHSIG = 1


class Workers:
    """This worker's heartbeat, and a thread that watches those of the others, and the parent."""

    def __init__(self, folder: Path, parent: int, silent_seconds: float = SILENT_SECONDS) -> None:
        """Start to watch.

        Args:
            folder: shared by the workers of this server; removed when the parent has ended.
            parent: id of the process that started the workers.
        """
        self._folder, self._parent, self._silent_seconds = folder, parent, silent_seconds
        self._path = folder / f"{os.getpid()}{_SUFFIX}"
        self._file: FileIO | None = None
        self._beats_arrive = False
        self.silent: tuple[int, ...] = ()  # process ids of workers that are stopped, or whose event loop hangs
        self._closed = threading.Event()
        self._beat()
        if sys.platform == "linux":  # a stopped worker goes on when its parent ends, and notices
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
        threading.Thread(target=self._watch, name="workers", daemon=True).start()

    async def beat(self) -> None:
        """Show the others that this event loop runs, until cancelled."""
        while True:
            self._beat()
            await asyncio.sleep(BEAT_SECONDS)

    def close(self) -> None:
        """Stop to watch the others: this worker ends, and a stopped one must not keep the server from ending."""
        for pid in self.silent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._closed.set()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _beat(self) -> None:
        try:
            if self._file is None:
                self._file = FileIO(self._path, "w+")
            os.pwrite(self._file.fileno(), _TIME.pack(time.monotonic()), 0)
            self._beats_arrive = True
        except OSError:  # such as a full disk
            self._beats_arrive = False

    def _watch(self) -> None:
        checked = time.monotonic()
        while os.getppid() == self._parent:
            time.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            was_stopped = now - checked > self._silent_seconds / 2  # like the others, maybe: let them beat first
            checked = now
            if not was_stopped and not self._closed.is_set():
                try:
                    self._update_silent(now)
                except Exception:  # such as no memory; this thread must see the parent end
                    _log.exception("looking for silent workers failed")
        _log.warning("process %d, which started the workers, is gone: worker %d ends", self._parent, os.getpid())
        shutil.rmtree(self._folder, ignore_errors=True)
        end_within(ORPHAN_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    def _update_silent(self, now: float) -> None:
        beats = self._beats() if self._beats_arrive else {}  # else the others' may not arrive either
        silent = tuple(sorted(pid for pid, beat in beats.items() if now - beat > self._silent_seconds))
        for pid in set(silent) - set(self.silent):
            _log.error("worker %d has been silent for %.0f s: it is stopped, or hangs", pid, self._silent_seconds)
        for pid in set(self.silent) - set(silent):
            _log.info("worker %d is no longer silent, or has ended", pid)
        self.silent = silent

    def _beats(self) -> dict[int, float]:
        """Return when each living worker last beat; forget those that have ended."""
        beats: dict[int, float] = {}
        files: list[Path] = []
        with contextlib.suppress(OSError):  # such as too many open files
            files = list(self._folder.glob(f"[0-9]*{_SUFFIX}"))
        for file in files:
            pid = int(file.name.removesuffix(_SUFFIX))
            with contextlib.suppress(OSError, struct.error):  # it ends or starts just now, or has no room
                if is_child(pid, self._parent):
                    beats[pid] = _TIME.unpack(file.read_bytes())[0]
                else:
                    file.unlink()
        return beats


async def perform(duty: Callable[[], Awaitable[None]]) -> None:
    """Perform a duty of this worker that never ends; if it fails, as for want of a thread, log that and begin again."""
    while True:
        try:
            await duty()
        except Exception:
            _log.exception("a duty of this worker failed, and begins again")
        await asyncio.sleep(_DUTY_PAUSE_SECONDS)


def is_child(pid: int, parent: int) -> bool:
    """Return whether a process is alive and a child of `parent`; without /proc, whether it exists."""
    try:
        state, found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False
    return state not in "ZX" and int(found) == parent  # Z: a zombie


def end_within(seconds: float) -> None:
    """Let this process end after `seconds` at the latest, whatever its threads do."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
