"""How many processes and threads serve on this machine.

Threads compute: decoding and ONNX Runtime release Python's lock, so that one process can keep several cores busy. What
a process cannot spread is its event loop, so that on many cores several processes share the work.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vitrine.bundle.loading import find_bundles
from vitrine.bundle.machine import Machine, this_machine
from vitrine.bundle.manifest import MODEL_FILE
from vitrine.service.settings import Settings

CORES_A_WORKER = 4
"""One process answers about 1300 requests with an image a second, whatever its network costs. On four cores that is
enough for all that needs 3 ms or more to compute; DETR and ViT at 224 pixels need 20 and more."""

# As measured: BentoML's own process has 80 MiB of its own and a worker 120, what they share counts once. ONNX Runtime
# takes 1.5 bytes for a byte of float32 weights. Photographs of 12 megapixels took less than 10 MiB a thread; a PNG of
# 49 megapixels took 200 (4 bytes a pixel), which is not counted here: `VITRINE_MAX_PIXELS` bounds it.
SERVER_BYTES = 100 * 2**20
WORKER_BYTES = 160 * 2**20
THREAD_BYTES = 16 * 2**20
LOADED_FACTOR = 2


@dataclass(frozen=True)
class Sizing:
    """Processes, threads of each, and why."""

    workers: int
    threads: int
    reason: str
    warning: str = ""  # of what may go wrong with it


def size(settings: Settings) -> Sizing:
    """The settings' workers and threads; what they leave open is chosen by this process's cores and memory."""
    return choose(settings.workers, settings.threads, machine=this_machine(), models=model_bytes(settings.bundles))


def choose(workers: int | None, threads: int | None, *, machine: Machine, models: int) -> Sizing:
    """See `size`. `models` are the bytes of all graphs that are loaded.

    Who sets threads alone gets them in one process.
    """
    most = 1 if threads is not None else math.ceil(machine.cores / CORES_A_WORKER)
    chosen = workers or next(
        (count for count in range(most, 1, -1) if _fits(count, _threads(count, threads, machine), machine, models)), 1
    )
    each = _threads(chosen, threads, machine)
    need = _need(chosen, each, models)
    memory = ""
    if machine.memory is not None:
        limit = " (cgroup)" if machine.memory_is_limited else ""
        memory = f", {_mib(need)} of {_mib(machine.memory)} memory{limit}"
    set_by = [name for name, value in (("workers", workers), ("threads", threads)) if value is not None]
    as_set = f", {' and '.join(set_by)} as set" if set_by else ""
    reason = f"{_plural(each, 'thread')} in {_plural(chosen, 'worker')}: {_cores(machine)}{memory}{as_set}"
    warning = ""
    if not _fits(chosen, each, machine, models):
        assert machine.memory is not None
        warning = (
            f"memory may not be enough: expected about {_mib(need)} for {_plural(chosen, 'worker')} with "
            f"{_plural(each, 'thread')} each, found {_mib(machine.memory)}"
        )
    return Sizing(chosen, each, reason, warning)


def _threads(workers: int, threads: int | None, machine: Machine) -> int:
    return threads or max(1, machine.cores // workers)


def _need(workers: int, threads: int, models: int) -> int:
    """Bytes of memory, about."""
    return SERVER_BYTES + workers * (WORKER_BYTES + LOADED_FACTOR * models + threads * THREAD_BYTES)


def _fits(workers: int, threads: int, machine: Machine, models: int) -> bool:
    return machine.memory is None or _need(workers, threads, models) <= machine.memory


def _cores(machine: Machine) -> str:
    cores = _plural(machine.cores, "core")
    if machine.quota is not None:
        less = ", less than a core" if machine.quota < 1 else ""
        return f"{cores} (CPU quota {machine.quota:g} of {machine.all_cores}{less})"
    return cores if machine.cores == machine.all_cores else f"{cores} of {machine.all_cores}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _mib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def model_bytes(roots: Iterable[Path]) -> int:
    """Bytes of the graphs under the roots; what cannot be read counts nothing (loading will say why)."""
    total = 0
    for root in roots:
        if root.is_file():
            total += root.stat().st_size
        elif root.is_dir():
            files = (path / MODEL_FILE for path in find_bundles(root))
            total += sum(file.stat().st_size for file in files if file.is_file())
    return total
