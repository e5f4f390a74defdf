"""How good a bundle's answers are, and how sure that is."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Metrics, ReliabilityBin
from models.training.calibration import reliability
from models.training.data import ClassificationData, Data, DetectionData
from models.training.evaluation import (
    ClassificationPredictions,
    DetectionPredictions,
    Predictions,
    accumulate,
    confusion_matrix,
    matched_detections,
    measure,
    precision_metrics,
)
from models.training.mistakes import IOU, iou

_SAMPLES = 200  # of the bootstrap
_PERCENTILES = 2.5, 97.5
_MOST_LABELS = 20  # of a confusion matrix that can be read
_CONFIDENT = 0.5  # score from which two detectors are compared

Values = dict[str, float]


def measure_accuracy(predictions: Predictions, data: Data, notes: str) -> Metrics:
    """The metrics of `models.training.evaluation.measure` over the predicted images, with what a reader needs to judge
    them: 95 % intervals, the confusion matrix of up to 20 labels, and the reliability of a classifier.

    The intervals are percentiles over bootstrap samples of the images (Efron & Tibshirani 1993, chapter 13): how far
    the figures would move with other images of the same kind. They say nothing about another training.
    """
    confusion = bins = None
    if isinstance(predictions, ClassificationPredictions) and isinstance(data, ClassificationData):
        found = reliability(predictions.probabilities, data.class_ids[predictions.indices])
        columns = found.counts.tolist(), found.confidence.tolist(), found.accuracy.tolist()
        bins = tuple(ReliabilityBin(answers=n, confidence=c, accuracy=a) for n, c, a in zip(*columns, strict=True))
        if len(data.labels) <= _MOST_LABELS:
            confusion = tuple(map(tuple, confusion_matrix(predictions, data).tolist()))
    return Metrics(
        data=data.name,
        split=data.split,
        images=len(predictions.indices),
        values=measure(predictions, data),
        intervals=_intervals(predictions, data),
        confusion=confusion,
        reliability=bins,
        notes=notes,
    )


def agreement(reference: Predictions, others: Predictions) -> float:
    """The share of the reference's answers that the others give, too.

    Of classifiers, the images that get the same label. Of detectors, the detections with a score of at least 0.5 for
    which the other has one of the same label with an IoU of at least 0.5 in the same image, and the other way round.
    """
    if isinstance(reference, ClassificationPredictions) and isinstance(others, ClassificationPredictions):
        same = reference.probabilities.argmax(axis=1) == others.probabilities.argmax(axis=1)
        return float(same.mean())
    assert isinstance(reference, DetectionPredictions)
    assert isinstance(others, DetectionPredictions)
    found = np.concatenate((_found(reference, others), _found(others, reference)))
    return float(found.mean()) if len(found) else 1.0


def _found(reference: DetectionPredictions, others: DetectionPredictions) -> NDArray[np.bool_]:
    """For each confident detection of the reference, whether the others have it."""
    found: list[bool] = []
    for index in reference.indices.tolist():
        own, their = (np.flatnonzero((p.image == index) & (p.scores >= _CONFIDENT)) for p in (reference, others))
        same = reference.class_ids[own, None] == others.class_ids[their]
        found += ((iou(reference.boxes[own], others.boxes[their]) >= IOU) & same).any(axis=1).tolist()
    return np.array(found, bool)


def _intervals(predictions: Predictions, data: Data) -> dict[str, tuple[float, float]]:
    random = np.random.default_rng(0)
    count = len(predictions.indices)
    again = _resampling(predictions, data)
    samples = [again(random.integers(0, count, count)) for _ in range(_SAMPLES)]
    intervals = {}
    for name in measure(predictions, data):
        values = [sample[name] for sample in samples if name in sample]  # a rare label may be in none of the images
        low, high = np.percentile(values, _PERCENTILES)
        intervals[name] = float(low), float(high)
    return intervals


def _resampling(predictions: Predictions, data: Data) -> Callable[[NDArray[np.int64]], Values]:
    """The metrics as if the data were other images: a function of which of the predicted ones are drawn."""
    if isinstance(predictions, ClassificationPredictions):

        def classified(drawn: NDArray[np.int64]) -> Values:
            chosen = ClassificationPredictions(predictions.indices[drawn], predictions.probabilities[drawn], 0.0)
            return measure(chosen, data)

        return classified
    assert isinstance(data, DetectionData)
    labels, evaluator = data.labels, matched_detections(predictions, data)
    shape = len(evaluator.params.catIds), len(evaluator.params.areaRng), len(predictions.indices)
    matched = np.empty(shape, object)
    matched[:] = np.array(evaluator.evalImgs, object).reshape(shape)

    def detected(drawn: NDArray[np.int64]) -> Values:
        evaluator.evalImgs = matched[:, :, drawn].ravel().tolist()
        return precision_metrics(accumulate(evaluator), labels)

    return detected
