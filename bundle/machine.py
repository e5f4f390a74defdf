"""The cores and memory available to this process within its control groups (cgroups).

A cgroup's limits apply to all groups below it, so those of every ancestor of this process's group count (Linux,
`cgroups(7)`). Other systems report the whole machine.
"""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
_PAUSE_SECONDS = 1e-4
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(frozen=True)
class Machine:
    """Resources available to this process."""

    cores: int  # see `available_cores`
    all_cores: int  # of the whole machine
    quota: float | None = None  # CPU quota in cores; None: no limit
    memory: int | None = None  # bytes, see `available_memory`
    memory_is_limited: bool = False  # by a cgroup, to less than the machine has


def this_machine(cgroup: Path = CGROUP, proc: Path = PROC) -> Machine:
    """Return the resources available to this process."""
    memory, total = available_memory(cgroup, proc), _total_memory(proc)
    return Machine(
        cores=available_cores(cgroup, proc),
        all_cores=os.cpu_count() or 1,
        quota=cpu_quota(cgroup, proc),
        memory=memory,
        memory_is_limited=memory is not None and (total is None or memory < total),
    )


def available_cores(cgroup: Path = CGROUP, proc: Path = PROC) -> int:
    """Return the whole cores available, at least 1: the minimum of cores, CPU affinity and cgroup quotas."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = min(cores, len(os.sched_getaffinity(0)))
    quota = cpu_quota(cgroup, proc)
    return max(1, cores if quota is None else min(cores, int(quota)))


def cpu_quota(cgroup: Path = CGROUP, proc: Path = PROC) -> float | None:
    """Return the CPU quota of the cgroups in (fractional) cores; None without a limit."""
    quotas = []
    for folder in _cgroup_folders("cpu", cgroup, proc):
        with contextlib.suppress(OSError, ValueError):  # version 2; "max" means no quota
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):  # version 1; -1 means no quota
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            period_us = int((folder / "cpu.cfs_period_us").read_text())
            quotas += [quota_us / period_us] if quota_us > 0 else []
    return min(quotas, default=None)


def available_memory(cgroup: Path = CGROUP, proc: Path = PROC) -> int | None:
    """Return the memory limit of the cgroups or the machine in bytes; None if unknown."""
    limits = []
    for folder in _cgroup_folders("memory", cgroup, proc):
        for name in ("memory.max", "memory.limit_in_bytes"):  # versions 2 and 1
            with contextlib.suppress(OSError, ValueError):  # "max" means no limit
                limits.append(int((folder / name).read_text()))
    total = _total_memory(proc)
    return min(limits if total is None else [*limits, total], default=None)


def _total_memory(proc: Path) -> int | None:
    """Return the memory of the machine in bytes; None if unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup_folders(controller: str, cgroup: Path, proc: Path) -> Iterator[Path]:
    """Yield the folders of the process's cgroups, innermost first, versions 1 and 2 (a machine may have both)."""
    yield cgroup  # a container may see its own group as the root
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = [f"0:{controller}:/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", controller) and controller not in controllers.split(","):
            continue
        roots = [cgroup] if not controllers else [cgroup / controllers, cgroup / controller]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for root in roots:
            for depth in range(len(parts), -1, -1):
                yield root.joinpath(*parts[:depth])


def release_memory() -> None:
    """Return freed memory to the system, if the C library can; loading a network leaves a lot of it."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Keep freed memory of any size in this process from now on, if the C library can.

    By default, large blocks are given back to the system at once, and the next ones faulted in again page by page.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _glibc(name: str) -> Callable[..., int] | None:
    """Return a function that only glibc has, if it is this system's C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def let_others_run() -> None:
    """Sleep for a moment, so that other threads, such as an event loop, get Python's lock.

    For loops in Python, or with NumPy on small arrays, about once per millisecond. NumPy gives the lock back for
    microseconds: a thread that waits for it is awake too late and, as the lock has been free, does not insist on it
    either. It would wait for half a second. Behind several loops in Python, it would wait for each of them in turn.
    """
    time.sleep(_PAUSE_SECONDS)
