"""How fast a network is on this machine, and how it is therefore best run.

One call on one core after the other, side by side on all cores, has the highest throughput; one call on all cores the
lowest latency, if the network is large enough; and several images in one call pay where a call takes so little time
that what surrounds it counts. Which of this holds depends on the processor as much as on the network, so it is measured
when the network is loaded. What is best for an image that is alone also depends on what else the machine does: it is
measured on and on.
"""

import time

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.bundle.predictors import Classifier, Predictor

_SHORT_CALL = 0.015  # seconds; longer ones keep a core busy by themselves
_BATCH = 8  # images in one call; more of them gained nothing further
_MAX_CALLS, _MAX_SECONDS = 4, 0.03  # of each measurement
_FIRST_PROBES, _PROBE_EVERY = (4, 8, 16, 32), 50  # lone images run in the way that has been the slower one so far
_DECAY = 0.1  # of a time that was shorter than what is measured now


class ExecutionProfile:
    """How a bundle is run. Threads may ask and tell at the same time."""

    def __init__(self, seconds: float, *, batch: int = 1, all_cores: Predictor | None = None) -> None:
        """Args: see the attributes; `batch`: images in one call, if a call is short."""
        self.seconds = seconds  # that one image takes on one core, as measured when it was loaded
        self.all_cores = all_cores  # the same network on all cores, if there are several
        self._alone: dict[bool, float] = {False: seconds}  # what a lone image takes, by whether it is run wide
        self._turn = 0
        self._batch, self._quickest = batch, seconds

    @property
    def batch(self) -> int:
        """Images in one call, beyond which more of them gain nothing: several only where a call is short."""
        return self._batch if self._quickest < _SHORT_CALL else 1

    def record_latency(self, seconds: float) -> None:
        """Learn what an image took on one core. What is loaded while others compute seems slow at first."""
        self._quickest = min(self._quickest, seconds)

    def prefers_all_cores(self) -> bool:
        """Whether an image that is alone on the machine is best run on all cores."""
        if self.all_cores is None:
            return False
        self._turn += 1
        quicker = self._alone.get(True, 0.0) < self._alone[False]
        return quicker != (self._turn in _FIRST_PROBES or self._turn % _PROBE_EVERY == 0)

    def record_lone_latency(self, seconds: float, *, all_cores: bool) -> None:
        """Learn what a lone image took."""
        before = self._alone.get(all_cores, seconds)
        # What takes long once was disturbed; what is short was possible.
        self._alone[all_cores] = seconds if seconds < before else before + _DECAY * (seconds - before)


def measure_profile(predictor: Predictor, all_cores: Predictor | None = None) -> ExecutionProfile:
    """Measure how fast a network is; it takes a few calls.

    Args:
        predictor: the network on one core.
        all_cores: the network on all cores, if there are several.
    """
    inputs = _inputs(predictor)
    best, left = float("inf"), _MAX_SECONDS
    for _ in range(_MAX_CALLS):
        start = time.perf_counter()
        predictor.network(**inputs)
        took = time.perf_counter() - start
        best, left = min(best, took), left - took
        if left < 0:
            break
    return ExecutionProfile(best, batch=_BATCH, all_cores=all_cores)


def _inputs(predictor: Predictor) -> dict[str, NDArray[np.generic]]:
    preprocessing = predictor.preprocessing
    if isinstance(preprocessing, ClassificationPreprocessing):
        height, width = preprocessing.input_size
    else:  # a photograph's 4 : 3
        height, width = preprocessing.shortest_edge, preprocessing.shortest_edge * 4 // 3
    image = Image.new("RGB", (width, height), "grey")
    if isinstance(predictor, Classifier):
        return predictor.inputs([predictor.prepare(image)])
    return predictor.inputs([predictor.prepare(image)])
