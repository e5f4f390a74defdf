"""Workers and threads by cores and memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vitrine.bundle.machine import Machine, available_cores, this_machine
from vitrine.service.runtime.sizing import (
    LOADED_FACTOR,
    SERVER_BYTES,
    THREAD_BYTES,
    WORKER_BYTES,
    choose,
    model_bytes,
    size,
)
from vitrine.service.settings import Settings

MIB, GIB = 2**20, 2**30
Serving = Callable[..., AbstractContextManager[Any]]


@pytest.mark.parametrize(
    ("cores", "memory", "models", "workers", "threads"),
    [
        (1, None, 0, 1, 1),
        (2, 4 * GIB, 0, 1, 2),
        (4, 4 * GIB, 0, 1, 4),
        (5, 4 * GIB, 0, 2, 2),
        (16, None, GIB, 4, 4),
        (64, 64 * GIB, 0, 16, 4),
        (64, 4 * GIB, GIB // 2, 2, 32),  # memory for two workers only
        (64, 2 * GIB, GIB // 2, 1, 64),  # memory for one worker only
        (64, 100 * MIB, 0, 1, 64),  # not even for one: try nevertheless
    ],
)
def test_the_default_sizing_fits_cores_and_memory(
    cores: int, memory: int | None, models: int, workers: int, threads: int
) -> None:
    chosen = choose(None, None, machine=Machine(cores, cores, memory=memory), models=models)
    assert (chosen.workers, chosen.threads) == (workers, threads)
    if memory is not None:
        need = SERVER_BYTES + workers * (WORKER_BYTES + LOADED_FACTOR * models + threads * THREAD_BYTES)
        assert (need > memory) == bool(chosen.warning)
        assert need <= memory or workers == 1


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_exactly_as_much_memory_as_is_needed_suffices(workers: int) -> None:
    machine = Machine(12, 12)
    threads = choose(workers, None, machine=machine, models=GIB).threads
    need = SERVER_BYTES + workers * (WORKER_BYTES + LOADED_FACTOR * GIB + threads * THREAD_BYTES)
    exact, less = (choose(None, None, machine=replace(machine, memory=size), models=GIB) for size in (need, need - 1))
    assert (exact.workers, exact.threads, exact.warning) == (workers, threads, "")
    assert (less.workers, bool(less.warning)) == (max(1, workers - 1), workers == 1)


def test_settings_override_the_default_sizing() -> None:
    eight = Machine(8, 8)
    assert choose(3, None, machine=eight, models=0).threads == 2
    assert choose(None, 16, machine=eight, models=0).workers == 1  # not 16 threads in each of several workers
    chosen = choose(3, 5, machine=Machine(2, 2), models=0)
    assert (chosen.workers, chosen.threads) == (3, 5)
    assert chosen.reason == "5 threads in 3 workers: 2 cores, workers and threads as set"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (
            Machine(2, 64, 2.5, 3 * GIB, True),
            "2 threads in 1 worker: 2 cores (CPU quota 2.5 of 64), 292 MiB of 3.0 GiB",
        ),
        (Machine(1, 8, 0.5), "1 thread in 1 worker: 1 core (CPU quota 0.5 of 8, less than a core)"),
        (Machine(1, 8, 1.0), "1 thread in 1 worker: 1 core (CPU quota 1 of 8)"),
        (Machine(2, 8, 1.5, GIB), "2 threads in 1 worker: 2 cores (CPU quota 1.5 of 8), 292 MiB of 1.0 GiB memory"),
        (Machine(2, 2, None, 3 * GIB // 2), "2 threads in 1 worker: 2 cores, 292 MiB of 1.5 GiB memory"),
        (Machine(3, 8), "3 threads in 1 worker: 3 cores of 8"),
        (Machine(6, 6, None, 8 * GIB), "3 threads in 2 workers: 6 cores, 516 MiB of 8.0 GiB memory"),
    ],
)
def test_the_reason_names_cores_and_memory(machine: Machine, reason: str) -> None:
    sizing = choose(None, None, machine=machine, models=0)
    assert sizing.reason == reason + (" memory (cgroup)" if machine.memory_is_limited else "")


def test_too_little_memory_is_a_warning_also_for_set_values() -> None:
    little = choose(None, None, machine=Machine(1, 1, memory=128 * MIB, memory_is_limited=True), models=100 * MIB)
    assert little.warning == (
        "memory may not be enough: expected about 476 MiB for 1 worker with 1 thread each, found 128 MiB"
    )
    assert "4 workers with 1 thread each" in choose(4, 1, machine=Machine(1, 1, memory=512 * MIB), models=0).warning


def test_the_sizing_is_that_of_the_settings_and_this_machine(tiny_bundles: Path) -> None:
    settings = Settings(bundles=str(tiny_bundles), workers=2, threads=3)
    models = model_bytes([tiny_bundles])
    assert size(settings) == choose(2, 3, machine=this_machine(), models=models)


def test_model_bytes_are_the_sizes_of_the_graphs(tiny_bundles: Path) -> None:
    files = [tiny_bundles / name / "1" / "model.onnx" for name in ("colours", "squares")]
    assert model_bytes([tiny_bundles]) == sum(file.stat().st_size for file in files)
    assert model_bytes([files[0], Path("/nowhere")]) == files[0].stat().st_size


def test_the_sizing_is_logged_once_for_all_workers(serve: Serving, tiny_bundles: Path) -> None:
    threads = max(1, available_cores() // 2)
    plural = "" if threads == 1 else "s"
    with serve(tiny_bundles, VITRINE_WORKERS="2") as (_, _, _, lines):
        logged = [line for line in lines if f"{threads} thread{plural} in 2 workers: " in line]
    assert len(logged) == 1
    assert logged[0].endswith("workers as set\n")
