"""What the machine can do without HTTP: images of a model decoded and run in one process, in the best known ways."""

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

    With an image: decoding and the network. With an array of pixels (.npy): the network alone.
    """
    load = load_file if bundle.is_file() else load_bundle
    narrow = load(bundle, threads=1).predictor
    wide = load(bundle, threads=available_cores()).predictor
    print(
        json.dumps(
            {
                "milliseconds": 1000 * min(_median(_work(way, image, 1), seconds / 2) for way in (narrow, wide)),
                "rate": max(_rate(_work(narrow, image, count), count, seconds) for count in (1, 8)),
            }
        )
    )


def _work(predictor: Predictor, image: Path, count: int) -> Callable[[], object]:
    """Answer `count` images, each prepared by itself, in one call of the network."""
    if image.suffix == ".npy":
        pixels = np.load(image)
        return lambda: predictor.infer([pixels] * count)
    data = image.read_bytes()

    def work() -> object:
        return predictor.infer([predictor.prepare(decode_for(data, predictor.preprocessing)) for _ in range(count)])

    return work


def _median(work: Callable[[], object], seconds: float) -> float:
    work()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _rate(work: Callable[[], object], count: int, seconds: float) -> float:
    """Images per second of as many threads as there are cores, each with calls of its own."""
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
