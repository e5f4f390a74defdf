"""What of the machine this process may use: cores and memory, as its control groups (cgroups) limit them.

A group's limit holds for all groups in it, so those of every group above this process's own count, too (Linux,
`cgroups(7)`). Elsewhere the machine's own figures are taken.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What this process may use, and what there is."""

    cores: int  # that it may use: `available_cores`
    all_cores: int  # of the machine
    quota: float | None = None  # in cores; None: no limit
    memory: int | None = None  # bytes that it may use: `available_memory`
    memory_is_limited: bool = False  # by its groups, below what the machine has


def this_machine(cgroup: Path = CGROUP, proc: Path = PROC) -> Machine:
    """The machine that this process runs on."""
    memory, total = available_memory(cgroup, proc), _total_memory(proc)
    return Machine(
        cores=available_cores(cgroup, proc),
        all_cores=os.cpu_count() or 1,
        quota=cpu_quota(cgroup, proc),
        memory=memory,
        memory_is_limited=memory is not None and (total is None or memory < total),
    )


def available_cores(cgroup: Path = CGROUP, proc: Path = PROC) -> int:
    """Whole cores, at least one: the least of the machine's, the process's affinity and its groups' CPU quotas."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = min(cores, len(os.sched_getaffinity(0)))
    quota = cpu_quota(cgroup, proc)
    return max(1, cores if quota is None else min(cores, int(quota)))


def cpu_quota(cgroup: Path = CGROUP, proc: Path = PROC) -> float | None:
    """Cores' worth of time that the groups allow, in fractions; None without a limit."""
    quotas = []
    for folder in _groups("cpu", cgroup, proc):
        with contextlib.suppress(OSError, ValueError):  # version 2; "max" means no quota
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):  # version 1; -1 means no quota
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            period_us = int((folder / "cpu.cfs_period_us").read_text())
            quotas += [quota_us / period_us] if quota_us > 0 else []
    return min(quotas, default=None)


def available_memory(cgroup: Path = CGROUP, proc: Path = PROC) -> int | None:
    """Bytes that the process's groups, or the machine, have at most; None where neither says."""
    limits = []
    for folder in _groups("memory", cgroup, proc):
        for name in ("memory.max", "memory.limit_in_bytes"):  # versions 2 and 1
            with contextlib.suppress(OSError, ValueError):  # "max" means no limit
                limits.append(int((folder / name).read_text()))
    total = _total_memory(proc)
    return min(limits if total is None else [*limits, total], default=None)


def _total_memory(proc: Path) -> int | None:
    """Bytes that the machine has."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    return None


def _groups(controller: str, cgroup: Path, proc: Path) -> Iterator[Path]:
    """The folders of the process's groups, innermost first, of version 1 and 2 (a machine may have both)."""
    yield cgroup  # of a container that sees its own group as the root
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
    """Return memory that is free again to the system, where the C library can: loading a network leaves much of it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
