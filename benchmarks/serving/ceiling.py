"""The machine's limit without HTTP: decoding and inference in one process, in the fastest known ways."""

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vitrine.bundle.images import decode_for
from vitrine.bundle.loading import load_bundle, load_file
from vitrine.bundle.machine import available_cores
from vitrine.bundle.predictors import Predictor


def main(bundle: Path, image: Path, seconds: float) -> None:
    """Print, as JSON, the median milliseconds of one image and the images per second of all cores.

    For an image, both include decoding; for an array of pixels (.npy), they cover the network only.
    """
    load = load_file if bundle.is_file() else load_bundle
    one_core = load(bundle, threads=1).predictor
    all_cores = load(bundle, threads=available_cores()).predictor
    latency = min(_median(_work(predictor, image, 1), seconds / 2) for predictor in (one_core, all_cores))
    rate = max(_rate(_work(one_core, image, count), count, seconds) for count in (1, 8))
    print(json.dumps({"milliseconds": 1000 * latency, "rate": rate}))


def _work(predictor: Predictor, image: Path, count: int) -> Callable[[], object]:
    """Return a function that prepares `count` images one by one and runs them as one batch."""
    if image.suffix == ".npy":
        pixels = np.load(image)
        return lambda: predictor.infer([pixels] * count)
    data = image.read_bytes()

    def work() -> object:
        return predictor.infer([predictor.prepare(decode_for(data, predictor.preprocessing)) for _ in range(count)])

    return work


def _median(work: Callable[[], object], seconds: float) -> float:
    """Return the median seconds of a call."""
    work()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _rate(work: Callable[[], object], count: int, seconds: float) -> float:
    """Return the images per second of one thread per core, each of which calls `work`."""
    calls = [0] * available_cores()
    start = time.perf_counter()

    def run(thread: int) -> None:
        while time.perf_counter() < start + seconds:
            work()
            calls[thread] += 1

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count * sum(calls) / (time.perf_counter() - start)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
