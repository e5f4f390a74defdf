"""Scores of a detector: how often detections of a score are right, and what a threshold keeps and loses.

A detection is right as in `evaluation.mistakes`. Shapes: m detections of all images.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from vitrine.models.training.data.dataset import DetectionData
from vitrine.models.training.evaluation.calibration import TEMPERATURES
from vitrine.models.training.evaluation.metrics import DetectionPredictions
from vitrine.models.training.evaluation.mistakes import best_threshold, match_objects

_MIN_DISTANCE = 1e-6  # scores nearer to 0 or 1 count as this far from them
_THRESHOLDS = tuple(step / 10 for step in range(1, 10))

Scores = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Threshold:
    """What is left of the detections if lower scores are dropped."""

    score: float
    precision: float  # share of the kept detections that is right; 1 if none is kept
    recall: float  # share of the objects that is found


def right_detections(predictions: DetectionPredictions, data: DetectionData) -> NDArray[np.bool_]:
    """Return which detections are right, [m]."""
    return match_objects(predictions, data) >= 0


def thresholds(predictions: DetectionPredictions, data: DetectionData) -> tuple[list[Threshold], float]:
    """Return precision and recall from scores of 0.1 to 0.9 on, and the score with the best F1, which is among them."""
    right = right_detections(predictions, data)
    objects = sum(len(data.boxes[i]) for i in predictions.indices.tolist())
    best = best_threshold(predictions.scores, right, objects)
    points = []
    for score in sorted({*_THRESHOLDS, best}):
        kept = predictions.scores >= score
        found = int((kept & right).sum())
        precision = found / int(kept.sum()) if kept.any() else 1.0
        points.append(Threshold(score, precision, found / max(1, objects)))
    return points, best


def fit_scores(scores: Scores, right: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the temperature T and the offset b with which sigmoid(logit / T + b) is the likeliest share of right ones.

    Platt 1999, "Probabilistic outputs for support vector machines", sec. 2.2, with its smoothed targets. (1, 0) if no
    detection is right, or none wrong.

    Args:
        scores: [m] at temperature 1 and offset 0, of images that the network was not trained on.
        right: [m].
    """
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return 1.0, 0.0
    logits = _logits(scores)
    targets = np.where(right, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(parameters: NDArray[np.float64]) -> float:
        scaled = logits * math.exp(-parameters[0]) + parameters[1]
        return float(np.mean(np.logaddexp(0, scaled) - targets * scaled))

    result = minimize(loss, np.zeros(2), bounds=[tuple(map(math.log, TEMPERATURES)), (None, None)])
    return math.exp(result.x[0]), float(result.x[1])


def apply_scores(scores: Scores, temperature: float, offset: float) -> NDArray[np.float64]:
    """Return sigmoid(logit / temperature + offset), [m]."""
    scaled: NDArray[np.float64] = expit(_logits(scores) / temperature + offset)
    return scaled


def unscaled(scores: Scores, temperature: float, offset: float) -> NDArray[np.float64]:
    """Return the scores that `apply_scores` was given, [m]."""
    original: NDArray[np.float64] = expit((_logits(scores) - offset) * temperature)
    return original


def _logits(scores: Scores) -> NDArray[np.float64]:
    logits: NDArray[np.float64] = logit(scores.astype(np.float64).clip(_MIN_DISTANCE, 1 - _MIN_DISTANCE))
    return logits
