"""Calibration of a classifier: reliability diagrams, expected calibration error and temperature scaling.

A network is calibrated if the fraction p of all predictions with probability p is correct. Trained to the end, it is
usually overconfident. Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2)
divides the logits by one number T, fitted on held-out images: no prediction changes, only its confidence.

Log-probabilities are logits up to a constant for each image, so only probabilities are needed here.
Shapes: n images, K classes.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

BINS = 15  # as in Guo et al. and most papers
TEMPERATURES = 0.05, 20.0  # search range; beyond it a network is broken
_MIN_PROBABILITY = float(
    np.finfo(np.float32).tiny
)  # smaller probabilities underflow in float32 and count as this: 87 nats

Probabilities = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Reliability:
    """Predictions in bins of equal width by their probability; empty bins have confidence and accuracy 0."""

    counts: NDArray[np.int64]  # [bins], predictions
    confidence: NDArray[np.float64]  # [bins], mean probability of the predictions
    accuracy: NDArray[np.float64]  # [bins], fraction of them that is correct

    @property
    def error(self) -> float:
        """Expected calibration error (ECE): mean of |confidence - accuracy| over all predictions."""
        return float(self.counts @ np.abs(self.confidence - self.accuracy) / self.counts.sum())


def reliability(probabilities: Probabilities, class_ids: NDArray[np.int64], bins: int = BINS) -> Reliability:
    """Bin the most probable class of each image by its probability.

    Args:
        probabilities: [n, K].
        class_ids: [n], the true classes.
    """
    return bin_reliability(
        probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == class_ids, bins
    )


def bin_reliability(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Bin predictions by their probability.

    Args:
        confidence: [n], 0 to 1.
        correct: [n], whether each is.
    """
    bin_ids = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # bin i holds (i, i + 1] / bins
    counts = np.bincount(bin_ids, minlength=bins)
    sums = (np.bincount(bin_ids, weights=values, minlength=bins) for values in (confidence, correct))
    mean_confidence, accuracy = (total / np.maximum(counts, 1) for total in sums)
    return Reliability(counts, mean_confidence, accuracy)


def calibration_error(probabilities: Probabilities, class_ids: NDArray[np.int64], bins: int = BINS) -> float:
    """Return the expected calibration error of the most probable classes, 0 to 1."""
    return reliability(probabilities, class_ids, bins).error


def negative_log_likelihood(probabilities: Probabilities, class_ids: NDArray[np.int64]) -> float:
    """Return the mean of -log p of the true classes, in nats; a p that underflows to 0 counts as 87 nats."""
    true = probabilities[np.arange(len(class_ids)), class_ids]
    return float(-_log(true).mean())


def apply_temperature(probabilities: Probabilities, temperature: float) -> NDArray[np.float64]:
    """Return probabilities [n, K] with the logits divided by `temperature`; 1 / temperature is the inverse."""
    scaled = _log(probabilities) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(probabilities: Probabilities, class_ids: NDArray[np.int64]) -> float:
    """Return the temperature that minimises the negative log-likelihood of the images.

    As in Platt 1999 ("Probabilistic outputs for support vector machines", sec. 2.2), n of n correct predictions count
    as n + 1 of n + 2, so that a few images do not make a network certain. The likelihood is concave in 1 / T, so there
    is one optimum; it is searched within `TEMPERATURES`. 1.0 if nothing is better, and without images.

    Args:
        probabilities: [n, K] at temperature 1, of images that the network was not trained on.
        class_ids: [n], the true classes.

    Raises:
        ValueError: a probability is not in 0 to 1, or the numbers of images differ.
    """
    if len(probabilities) != len(class_ids):
        raise ValueError(f"expected probabilities of {len(class_ids)} images, found {len(probabilities)}")
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-4)).all():  # false for NaN
        raise ValueError("expected probabilities from 0 to 1, found others")
    if len(class_ids) == 0:
        return 1.0
    logits = _log(probabilities)
    logits -= logits.max(axis=1, keepdims=True)
    smoothing = 1 / (len(class_ids) + 2)
    true = (1 - smoothing) * logits[np.arange(len(class_ids)), class_ids] + smoothing * logits.mean(axis=1)

    def loss(log_temperature: float) -> float:
        beta = math.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(beta * logits).sum(axis=1)) - beta * true))

    bounds = tuple(map(math.log, TEMPERATURES))
    result = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(result.x) if result.fun < loss(0.0) else 1.0


def _log(probabilities: Probabilities) -> NDArray[np.float64]:
    return np.log(np.maximum(probabilities, _MIN_PROBABILITY).astype(np.float64))
