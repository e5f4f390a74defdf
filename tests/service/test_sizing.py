"""Workers and threads by cores and memory."""

from pathlib import Path

import pytest

from service.sizing import BASE_BYTES, LOADED_FACTOR, choose, model_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("cores", "memory", "models", "workers", "threads"),
    [
        (1, None, 0, 1, 1),
        (2, 4 * GIB, 0, 1, 2),
        (8, 4 * GIB, 0, 1, 8),
        (9, 4 * GIB, 0, 2, 4),
        (64, 64 * GIB, 0, 8, 8),
        (64, 4 * GIB, GIB // 2, 1, 64),  # memory for one worker only
        (64, 100 * 2**20, 0, 1, 64),  # not even for one: it is tried
        (16, None, GIB, 2, 8),
    ],
)
def test_what_is_chosen(cores: int, memory: int | None, models: int, workers: int, threads: int) -> None:
    chosen = choose(None, None, cores=cores, quota=None, memory=memory, models=models)
    assert (chosen.workers, chosen.threads) == (workers, threads)
    if memory is not None:
        assert chosen.workers * (BASE_BYTES + LOADED_FACTOR * models) <= memory or chosen.workers == 1


def test_what_is_set_is_kept() -> None:
    assert choose(3, None, cores=8, quota=None, memory=None, models=0).threads == 2
    chosen = choose(3, 5, cores=2, quota=None, memory=None, models=0)
    assert (chosen.workers, chosen.threads) == (3, 5)
    assert chosen.reason == "5 threads in each of 3 workers: 2 cores, workers and threads as set"


def test_the_reason_names_quota_and_memory() -> None:
    chosen = choose(None, None, cores=1, quota=0.5, memory=GIB, models=0)
    assert chosen.reason == (
        "1 threads in each of 1 worker: 1 core (CPU quota 0.5), 1.0 GiB of memory for about 160 MiB a worker"
    )
    little = choose(None, None, cores=1, quota=None, memory=2**20, models=0)
    assert little.reason.endswith("which may be too little")


def test_models_count_by_their_graphs(tiny_bundles: Path) -> None:
    files = [tiny_bundles / name / "1" / "model.onnx" for name in ("colours", "squares")]
    assert model_bytes([tiny_bundles]) == sum(file.stat().st_size for file in files)
    assert model_bytes([files[0], Path("/nowhere")]) == files[0].stat().st_size
