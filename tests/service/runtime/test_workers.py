"""Workers: which of them are silent, and what becomes of one whose parent has ended."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vitrine.service.runtime import workers
from vitrine.service.runtime.workers import is_child

WAIT = 20.0  # seconds

WORKER = """
import asyncio, os, sys
from pathlib import Path
from vitrine.service.runtime.workers import Workers
workers = Workers(Path(sys.argv[1]), os.getppid(), 0.5)
print(os.getpid(), flush=True)
asyncio.run(workers.beat())
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WORKER!r}, sys.argv[1]])
child.wait()
"""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(program: str, folder: Path, root: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a program that prints the process id of its worker."""
    command = [sys.executable, "-c", program, str(folder)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


WATCHER = """
import os, sys, time
from pathlib import Path
from vitrine.service.runtime.workers import Workers
workers = Workers(Path(sys.argv[1]), os.getppid(), 1.5)
print(os.getpid(), flush=True)
before = None
while True:
    workers._beat()
    if workers.silent != before:
        before = workers.silent
        print(*before, flush=True)
    time.sleep(0.05)
"""


def test_a_stopped_worker_is_silent_until_it_continues_or_ends(tmp_path: Path, root: Path) -> None:
    watcher, _ = start(WATCHER, tmp_path, root)
    assert watcher.stdout is not None
    other, pid = start(WORKER, tmp_path, root)
    try:
        assert watcher.stdout.readline() == "\n"
        for after in (signal.SIGCONT, signal.SIGKILL):
            other.send_signal(signal.SIGSTOP)
            assert watcher.stdout.readline() == f"{pid}\n"
            other.send_signal(after)
            assert watcher.stdout.readline() == "\n"
        assert not (tmp_path / f"{pid}.heartbeat").exists()
    finally:
        for process in (watcher, other):
            process.kill()
            process.wait()


def test_a_worker_ends_when_its_parent_is_killed_even_if_it_is_stopped(tmp_path: Path, root: Path) -> None:
    for stopped in (False, True):
        folder = tmp_path / str(stopped)
        folder.mkdir()
        parent, pid = start(PARENT, folder, root)
        assert is_child(pid, parent.pid)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + WAIT
        while not has_ended(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not folder.exists()


@pytest.mark.parametrize("fault", ["removed", "limited"])
def test_a_worker_whose_heartbeat_cannot_be_written_is_not_silent(fault: str, tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "missing" if fault == "removed" else tmp_path
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n" if fault == "limited" else ""
    watcher, _ = start(WATCHER, tmp_path, root)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "\n"
    other, _ = start(limit + WORKER, folder, root)
    stopped, pid = start(WORKER, tmp_path, root)
    try:
        stopped.send_signal(signal.SIGSTOP)
        assert watcher.stdout.readline() == f"{pid}\n"  # and no other
        assert other.poll() is None
    finally:
        for process in (watcher, other, stopped):
            process.kill()
            process.wait()


def test_a_duty_that_fails_is_logged_and_begins_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "_DUTY_PAUSE_SECONDS", 0.0)
    outcomes = iter([RuntimeError("can't start new thread"), None])

    async def duty() -> None:
        if error := next(outcomes, asyncio.CancelledError()):
            raise error

    with caplog.at_level(logging.ERROR, "bentoml.vitrine"), pytest.raises(asyncio.CancelledError):
        asyncio.run(workers.perform(duty))
    (record,) = caplog.records
    assert "can't start new thread" in str(record.exc_info)


def test_only_living_children_count() -> None:
    child = subprocess.Popen(["sleep", "60"])
    assert is_child(child.pid, os.getpid())
    assert not is_child(child.pid, 1)
    assert not is_child(2**22, os.getpid())
    child.kill()
    wait_until(lambda: not is_child(child.pid, os.getpid()))  # a zombie does not count
    child.wait()
