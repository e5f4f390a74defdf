"""Look at a server's processes from outside (Linux)."""

from pathlib import Path
from typing import NamedTuple

import psutil

_MIB = 2**20


class Usage(NamedTuple):
    """What all processes of a server use together."""

    memory: float  # MiB; shared pages count once (PSS)
    files: int  # open file descriptors
    threads: int


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all that descend from it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def usage(pid: int) -> Usage:
    """Return what a server uses now, given the pid of its first process."""
    memory, files, threads = 0.0, 0, 0
    for process in family(pid):
        try:
            memory += process.memory_full_info().pss / _MIB
            files += process.num_fds()
            threads += process.num_threads()
        except psutil.NoSuchProcess:  # has just ended
            continue
    return Usage(memory, files, threads)


def reset_peak(pid: int) -> None:
    """Let `peak_memory` count from now."""
    for process in family(pid):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def peak_memory(pid: int) -> float:
    """Return the sum of the peaks of the resident memory of a server's processes, in MiB, since `reset_peak`."""
    return sum(_status(process.pid, "VmHWM") for process in family(pid))


def resident_memory(pid: int) -> float:
    """Return the sum of the resident memory of a server's processes, in MiB; shared pages count in each."""
    return sum(_status(process.pid, "VmRSS") for process in family(pid))


def _status(pid: int, field: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024
