"""Cores and memory as limited by cgroups, on fake file systems."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitrine.bundle.machine import (
    Machine,
    available_cores,
    available_memory,
    cpu_quota,
    release_memory,
    this_machine,
)

GIB = 2**30


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("groups", "files", "quota", "cores"),
    [
        ("0::/\n", {}, None, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None, 3),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5, 1),
        ("0::/\n", {"cpu.max": "broken\n"}, None, 3),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.0, 1),
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2.0, 2),
        ("0::/../a\n", {"a/cpu.max": "200000 100000\n"}, 2.0, 2),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 3),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0, 2),
        (
            "5:memory:/x\n4:cpu,cpuacct:/pod/c\n",
            {"cpu,cpuacct/pod/cpu.cfs_quota_us": "100000", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000"},
            1.0,
            1,
        ),
        ("5:memory:/x\n", {"x/cpu.cfs_quota_us": "100000", "x/cpu.cfs_period_us": "100000"}, None, 3),
    ],
)
def test_cores(
    groups: str,
    files: dict[str, str],
    quota: float | None,
    cores: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    cgroup, proc = write_files(tmp_path / "cgroup", files), write_files(tmp_path / "proc", {"self/cgroup": groups})
    assert cpu_quota(cgroup, proc) == quota
    assert available_cores(cgroup, proc) == cores


@pytest.mark.parametrize(
    ("groups", "files", "memory"),
    [
        ("0::/\n", {}, 16 * GIB),
        ("0::/\n", {"memory.max": "max\n"}, 16 * GIB),
        ("0::/a/b\n", {"a/memory.max": f"{2 * GIB}\n", "a/b/memory.max": "max\n"}, 2 * GIB),
        ("5:memory:/pod\n", {"memory/pod/memory.limit_in_bytes": str(GIB)}, GIB),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 16 * GIB),
    ],
)
def test_memory(groups: str, files: dict[str, str], memory: int, tmp_path: Path) -> None:
    meminfo = f"MemTotal:       {16 * GIB // 1024} kB\nMemFree: 1 kB\n"
    proc = write_files(tmp_path / "proc", {"self/cgroup": groups, "meminfo": meminfo})
    assert available_memory(write_files(tmp_path / "cgroup", files), proc) == memory


def test_limited_memory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    proc = write_files(tmp_path / "proc", {"self/cgroup": "0::/pod\n", "meminfo": f"MemTotal: {4 * GIB // 1024} kB\n"})
    free = this_machine(tmp_path / "nothing", proc)
    assert free == Machine(cores=3, all_cores=8, quota=None, memory=4 * GIB, memory_is_limited=False)
    cgroup = write_files(tmp_path / "cgroup", {"pod/memory.max": str(GIB), "pod/cpu.max": "50000 100000"})
    assert this_machine(cgroup, proc) == Machine(1, 8, 0.5, GIB, True)


def test_without_cgroups_and_proc(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path) is None
    assert available_cores(tmp_path, tmp_path) >= 1
    assert available_memory(tmp_path, tmp_path) is None


def page_faults_of_a_large_block(setup: str) -> int:
    script = f"""
import resource
from vitrine.bundle.machine import keep_freed_memory
{setup}
bytearray(2**26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", script]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc only")
def test_freed_memory_can_be_kept() -> None:
    assert page_faults_of_a_large_block("") > 10 * page_faults_of_a_large_block("keep_freed_memory()")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_freed_memory_is_returned_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    held = [bytes(100_000) for _ in range(1000)]  # each below the mmap threshold of the C library
    full = resident()
    last = held.pop()
    held.clear()
    release_memory()
    assert full - resident() > 50_000_000
    assert len(last) == 100_000
