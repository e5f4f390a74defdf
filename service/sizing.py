"""How many processes and threads serve on this machine."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bundle.loading import find_bundles
from bundle.machine import available_cores, available_memory, cpu_quota
from bundle.manifest import MODEL_FILE
from service.settings import Settings

CORES_A_WORKER = 8
"""Decoding and inference release Python's lock, so that one process keeps this many cores busy: its event loop answers
some thousand requests a second, eight cores compute some hundred to two thousand of the smallest images."""

BASE_BYTES = 160 * 2**20  # of a worker that has loaded nothing yet, as measured
LOADED_FACTOR = 4  # bytes of memory for a byte of model.onnx: weights, their packed copy, work buffers


@dataclass(frozen=True)
class Sizing:
    """Processes, threads of each, and why."""

    workers: int
    threads: int
    reason: str


def size(settings: Settings) -> Sizing:
    """The settings' workers and threads; what they leave open is chosen by this process's cores and memory."""
    return choose(
        settings.workers,
        settings.threads,
        cores=available_cores(),
        quota=cpu_quota(),
        memory=available_memory(),
        models=model_bytes(settings.bundles),
    )


def choose(
    workers: int | None, threads: int | None, *, cores: int, quota: float | None, memory: int | None, models: int
) -> Sizing:
    """See `size`. `quota` is in cores, `memory` and `models` (of all graphs that are loaded) in bytes."""
    need = BASE_BYTES + LOADED_FACTOR * models
    room = None if memory is None else memory // need
    chosen = workers or max(1, min(math.ceil(cores / CORES_A_WORKER), cores if room is None else room))
    each = threads or max(1, cores // chosen)
    why = [f"{cores} cores" if cores > 1 else "1 core"]
    if quota is not None:
        why[0] += f" (CPU quota {quota:g})"
    if memory is not None:
        why.append(f"{memory / 2**30:.1f} GiB of memory for about {need / 2**20:.0f} MiB a worker")
        if room == 0:
            why.append("which may be too little")
    set_by = [name for name, value in (("workers", workers), ("threads", threads)) if value is not None]
    if set_by:
        why.append(f"{' and '.join(set_by)} as set")
    plural = "" if chosen == 1 else "s"
    return Sizing(chosen, each, f"{each} threads in each of {chosen} worker{plural}: {', '.join(why)}")


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
