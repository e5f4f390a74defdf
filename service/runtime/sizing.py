"""The number of worker processes and threads on this machine.

Decoding and ONNX Runtime release the GIL, so the threads of one process can keep several cores busy. Its event loop
runs on one core only, so on many cores several processes share the load.
"""

import contextlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vitrine.bundle.errors import BundleError
from vitrine.bundle.loading import find_bundles
from vitrine.bundle.machine import Machine, this_machine
from vitrine.bundle.manifest import MODEL_FILE
from vitrine.service.settings import Settings

CORES_PER_WORKER = 4
"""One process handles at most about 1300 single-image requests per second, whatever the network costs. On four cores
that suffices for networks that take 3 ms or more per image; DETR and ViT at 224 pixels take 20 ms and more."""

# Measured: BentoML's own process has 80 MiB of private memory and a worker 120; shared memory counts once. ONNX Runtime
# takes 1.5 bytes per byte of float32 weights. Photographs of 12 megapixels took less than 10 MiB per thread.
# Larger images take 4 to 17 bytes per pixel (docs/settings.md), not included here: `VITRINE_MAX_PIXELS` bounds them.
SERVER_BYTES = 100 * 2**20
WORKER_BYTES = 160 * 2**20
THREAD_BYTES = 16 * 2**20
LOADED_FACTOR = 2


@dataclass(frozen=True)
class Sizing:
    """Number of processes, threads of each, and the reason."""

    workers: int
    threads: int
    reason: str
    warning: str = ""  # such as too little memory


def size(settings: Settings) -> Sizing:
    """Return the workers and threads of the settings; unset ones are chosen by this process's cores and memory."""
    return choose(settings.workers, settings.threads, machine=this_machine(), models=model_bytes(settings.bundles))


def choose(workers: int | None, threads: int | None, *, machine: Machine, models: int) -> Sizing:
    """Choose workers and threads, see `size`. If only threads are set, there is one worker.

    Args:
        models: bytes of all loaded graphs.
    """
    most = 1 if threads is not None else math.ceil(machine.cores / CORES_PER_WORKER)
    counts = range(most, 1, -1)
    workers_chosen = workers or next(
        (count for count in counts if _fits(count, _threads(count, threads, machine), machine, models)), 1
    )
    threads_chosen = _threads(workers_chosen, threads, machine)
    need = _memory_need(workers_chosen, threads_chosen, models)
    memory = ""
    if machine.memory is not None:
        limit = " (cgroup)" if machine.memory_is_limited else ""
        memory = f", {_mib(need)} of {_mib(machine.memory)} memory{limit}"
    names = [name for name, value in (("workers", workers), ("threads", threads)) if value is not None]
    as_set = f", {' and '.join(names)} as set" if names else ""
    threads_text, workers_text = _plural(threads_chosen, "thread"), _plural(workers_chosen, "worker")
    reason = f"{threads_text} in {workers_text}: {_cores(machine)}{memory}{as_set}"
    warning = ""
    if machine.memory is not None and need > machine.memory:
        warning = (
            f"memory may not be enough: expected about {_mib(need)} for {workers_text} with {threads_text} each, "
            f"found {_mib(machine.memory)}"
        )
    return Sizing(workers_chosen, threads_chosen, reason, warning)


def _threads(workers: int, threads: int | None, machine: Machine) -> int:
    return threads or max(1, machine.cores // workers)


def _memory_need(workers: int, threads: int, models: int) -> int:
    """Estimate the memory, in bytes."""
    return SERVER_BYTES + workers * (WORKER_BYTES + LOADED_FACTOR * models + threads * THREAD_BYTES)


def _fits(workers: int, threads: int, machine: Machine, models: int) -> bool:
    return machine.memory is None or _memory_need(workers, threads, models) <= machine.memory


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
    """Return the bytes of all graphs under the roots; unreadable ones count 0 (loading reports them)."""
    total = 0
    for root in roots:
        with contextlib.suppress(BundleError):
            for file in [root] if os.path.isfile(root) else [path / MODEL_FILE for path in find_bundles(root)]:
                with contextlib.suppress(OSError):
                    total += file.stat().st_size
    return total
