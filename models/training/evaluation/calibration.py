"""Are probabilities as good as they say? Reliability, its error, and the one number that mends most of it.

A network is calibrated where, of all answers that it gives with probability p, the share p is right. Trained to the
end, it is usually too sure. Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017,
section 4.2) divides the logits by one number T, fitted on held-out images: no answer changes, only how sure it is.

Log-probabilities are logits up to a constant for each image, so probabilities are all that is needed here.
Shapes: n images, K classes.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

BINS = 15  # as Guo et al. and most others report it
TEMPERATURES = 0.05, 20.0  # beyond them a network is broken
_SMALLEST = float(np.finfo(np.float32).tiny)  # what float32 has lost below it counts as this: 87 nats

Probabilities = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Reliability:
    """Answers in bins of equal width by their probability; empty bins have confidence and accuracy 0."""

    counts: NDArray[np.int64]  # [bins], answers
    confidence: NDArray[np.float64]  # [bins], mean probability of the answers
    accuracy: NDArray[np.float64]  # [bins], share of them that is right

    @property
    def error(self) -> float:
        """The expected calibration error (ECE): mean distance of confidence and accuracy, weighted by the answers."""
        return float(self.counts @ np.abs(self.confidence - self.accuracy) / self.counts.sum())


def reliability(probabilities: Probabilities, class_ids: NDArray[np.int64], bins: int = BINS) -> Reliability:
    """How often the most probable class is right, by how probable it is.

    Args:
        probabilities: [n, K].
        class_ids: [n], the true classes.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == class_ids
    bin_ids = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # bin i holds (i, i + 1] / bins
    counts = np.bincount(bin_ids, minlength=bins)
    sums = (np.bincount(bin_ids, weights=values, minlength=bins) for values in (confidence, right))
    mean_confidence, accuracy = (total / np.maximum(counts, 1) for total in sums)
    return Reliability(counts, mean_confidence, accuracy)


def calibration_error(probabilities: Probabilities, class_ids: NDArray[np.int64], bins: int = BINS) -> float:
    """The expected calibration error of the most probable classes, 0 to 1."""
    return reliability(probabilities, class_ids, bins).error


def negative_log_likelihood(probabilities: Probabilities, class_ids: NDArray[np.int64]) -> float:
    """Mean of -log p of the true classes, in nats; a p that float32 holds as 0 counts as 87 nats."""
    true = probabilities[np.arange(len(class_ids)), class_ids]
    return float(-_log(true).mean())


def apply_temperature(probabilities: Probabilities, temperature: float) -> NDArray[np.float64]:
    """Probabilities [n, K] as they would be with the logits divided by `temperature`; 1 / temperature undoes it."""
    scaled = _log(probabilities) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(probabilities: Probabilities, class_ids: NDArray[np.int64]) -> float:
    """The temperature with which these images get the smallest negative log-likelihood.

    As in Platt 1999 ("Probabilistic outputs for support vector machines", sec. 2.2), an answer that was right n times
    of n counts as right n + 1 times of n + 2, so that few images do not make a network certain.
    The likelihood is concave in 1 / T, so that there is one optimum; it is sought within `TEMPERATURES`. 1.0 where
    nothing is better, and where there are no images.

    Args:
        probabilities: [n, K] of temperature 1, of images that the network was not trained on.
        class_ids: [n], the true classes.

    Raises:
        ValueError: a probability is not a number from 0 to 1, or there are not as many rows as classes.
    """
    if len(probabilities) != len(class_ids):
        raise ValueError(f"expected probabilities of {len(class_ids)} images, found {len(probabilities)}")
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-4)).all():  # NaN is neither
        raise ValueError("expected probabilities from 0 to 1, found others")
    if len(class_ids) == 0:
        return 1.0
    logits = _log(probabilities)
    logits -= logits.max(axis=1, keepdims=True)
    doubt = 1 / (len(class_ids) + 2)
    true = (1 - doubt) * logits[np.arange(len(class_ids)), class_ids] + doubt * logits.mean(axis=1)

    def loss(log_temperature: float) -> float:
        beta = math.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(beta * logits).sum(axis=1)) - beta * true))

    bounds = tuple(map(math.log, TEMPERATURES))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0


def _log(probabilities: Probabilities) -> NDArray[np.float64]:
    return np.log(np.maximum(probabilities, _SMALLEST).astype(np.float64))
