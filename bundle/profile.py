"""Measure a network on this machine, and choose how to run it.

Single-threaded calls side by side on all cores have the highest throughput. One call on all cores has the lowest
latency if the network is large enough, and batching pays off where a call is so short that its overhead matters. Which
of these holds depends on the processor as much as on the network, so it is measured when the network is loaded. The
best way to run a lone image also depends on the load of the machine, so that measurement never stops.
"""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.bundle.predictors import Classifier, Predictor

_SHORT_CALL = 0.015  # seconds; a longer call keeps a core busy by itself
_BATCH = 8  # images per call; larger batches gained nothing
_MAX_CALLS, _MAX_SECONDS = 4, 0.03  # per measurement
_FIRST_PROBES, _PROBE_EVERY = (4, 8, 16, 32), 50  # lone images that are run in the slower way, to measure it again
_DECAY = 0.1  # weight of a new latency that is above the estimate
_SLOW_DECAY = 0.01  # the same for the latency that decides about batches: a busy machine must not end them
_LIKE = 2.0  # factor of the reference's pixels within which latencies are compared


class ExecutionProfile:
    """How to run a bundle. Safe to read and update from several threads."""

    def __init__(
        self, seconds: float, *, pixels: int | None = None, batch: int = 1, all_cores: Predictor | None = None
    ) -> None:
        """Args: see the attributes; `batch` is the number of images per call if calls are short."""
        self.seconds = seconds  # per image on one core, measured at load
        self.pixels = pixels  # of the image that was measured; None if all have the same size
        self.all_cores = all_cores  # the same network on all cores; None on a single core
        self._lone_seconds: dict[bool, float] = {False: seconds}  # latency estimate of a lone image, by `all_cores`
        self._lone_images = 0
        self._batch, self._call_seconds = batch, seconds

    @property
    def batch(self) -> int:
        """Largest useful number of images per call: above 1 only if calls are short."""
        return self._batch if self._call_seconds < _SHORT_CALL else 1

    def record_latency(self, seconds: float, pixels: Sequence[int]) -> None:
        """Record a call on one core.

        A short latency counts at once, since a network loaded under load looks slow; a longer one is approached
        slowly. The share of an image in a batch is a lower bound of its latency, so it counts slowly, too.

        Args:
            pixels: of each image of the call; unlike images are ignored, as they say nothing about the usual ones.
        """
        if not all(map(self._is_like, pixels)):
            return
        latency = seconds / len(pixels)
        decay = 1.0 if latency < self._call_seconds and len(pixels) == 1 else _SLOW_DECAY
        self._call_seconds += decay * (latency - self._call_seconds)

    def _is_like(self, pixels: int) -> bool:
        return self.pixels is None or self.pixels / _LIKE <= pixels <= self.pixels * _LIKE

    def prefers_all_cores(self) -> bool:
        """Whether to run the next lone image on all cores."""
        if self.all_cores is None:
            return False
        self._lone_images += 1
        all_cores_faster = self._lone_seconds.get(True, 0.0) < self._lone_seconds[False]
        return all_cores_faster != (self._lone_images in _FIRST_PROBES or self._lone_images % _PROBE_EVERY == 0)

    def record_lone_latency(self, seconds: float, pixels: int, *, all_cores: bool) -> None:
        """Record the latency of a lone image, unless it is unlike the usual ones."""
        if not self._is_like(pixels):
            return
        estimate = self._lone_seconds.get(all_cores, seconds)
        # A long latency may be due to other load, a short one is always real.
        self._lone_seconds[all_cores] = seconds if seconds < estimate else estimate + _DECAY * (seconds - estimate)


def measure_profile(predictor: Predictor, all_cores: Predictor | None = None) -> ExecutionProfile:
    """Measure the speed of a network with a few calls.

    Args:
        predictor: the network on one core.
        all_cores: the network on all cores, if there are several.
    """
    inputs = _sample_inputs(predictor)
    best, remaining = float("inf"), _MAX_SECONDS
    for _ in range(_MAX_CALLS):
        start = time.perf_counter()
        predictor.network(**inputs)
        elapsed = time.perf_counter() - start
        best, remaining = min(best, elapsed), remaining - elapsed
        if remaining < 0:
            break
    height, width = inputs["pixels"].shape[1:3]
    return ExecutionProfile(best, pixels=height * width, batch=_BATCH, all_cores=all_cores)


def _sample_inputs(predictor: Predictor) -> dict[str, NDArray[np.generic]]:
    preprocessing = predictor.preprocessing
    if isinstance(preprocessing, ClassificationPreprocessing):
        height, width = preprocessing.input_size
    else:  # 4:3, as a photograph
        height, width = preprocessing.shortest_edge, preprocessing.shortest_edge * 4 // 3
    image = Image.new("RGB", (width, height), "grey")
    if isinstance(predictor, Classifier):  # the same call twice: mypy needs the union narrowed
        return predictor.inputs([predictor.prepare(image)])
    return predictor.inputs([predictor.prepare(image)])
