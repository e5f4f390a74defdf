"""How good a bundle's answers are, and how sure that is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.bundle.manifest import Metrics, ReliabilityBin
from vitrine.models.training.data.dataset import ClassificationData, Data, DetectionData
from vitrine.models.training.evaluation.calibration import calibration_error, negative_log_likelihood, reliability
from vitrine.models.training.evaluation.metrics import (
    ClassificationPredictions,
    DetectionPredictions,
    Predictions,
    average_weights,
    confusion_matrix,
    matched_detections,
    measure,
    precision_metrics,
    ranks,
)
from vitrine.models.training.evaluation.mistakes import IOU, iou

_MIN_SAMPLES, _MAX_SAMPLES = 200, 1000  # of the bootstrap
_MAX_ANSWERS = 10**8  # in all samples together: a minute for a detector
_PERCENTILES = 2.5, 97.5
_MAX_LABELS = 20  # of a confusion matrix that can be read
_CONFIDENT = 0.5  # score from which two detectors are compared

Values = dict[str, float]
Resampled = Callable[[NDArray[np.int64]], Values]


def measure_accuracy(predictions: Predictions, data: Data, notes: str) -> Metrics:
    """The metrics of `evaluation.metrics.measure` over the predicted images, with what a reader needs to judge them:
    95 % intervals, the confusion matrix of up to 20 labels, and the reliability of a classifier.

    The intervals are percentiles over bootstrap samples of the images (Efron & Tibshirani 1993, chapter 13): how far
    the figures would move with other images of the same kind. They say nothing about another training.
    """
    values = measure(predictions, data)
    confusion = bins = None
    if isinstance(predictions, ClassificationPredictions) and isinstance(data, ClassificationData):
        found = reliability(predictions.probabilities, data.class_ids[predictions.indices])
        columns = found.counts.tolist(), found.confidence.tolist(), found.accuracy.tolist()
        bins = tuple(ReliabilityBin(answers=n, confidence=c, accuracy=a) for n, c, a in zip(*columns, strict=True))
        if len(data.labels) <= _MAX_LABELS:
            confusion = tuple(map(tuple, confusion_matrix(predictions, data).tolist()))
    return Metrics(
        data=data.name,
        split=data.split,
        images=len(predictions.indices),
        values=values,
        intervals=_intervals(values, predictions, data),
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


def _intervals(values: Values, predictions: Predictions, data: Data) -> dict[str, tuple[float, float]]:
    random = np.random.default_rng(0)
    count = len(predictions.indices)
    answers = len(predictions.scores) if isinstance(predictions, DetectionPredictions) else count
    samples = max(_MIN_SAMPLES, min(_MAX_SAMPLES, _MAX_ANSWERS // max(1, answers)))
    resampled = resampling(predictions, data)
    drawn = [resampled(random.integers(0, count, count)) for _ in range(samples)]
    intervals = {}
    for name, value in values.items():
        found = [sample[name] for sample in drawn if name in sample]  # a rare label may be in none of the images
        low, high = np.percentile(found, _PERCENTILES)
        # images drawn twice raise an ECE: those of all samples may lie above that of a well calibrated network
        intervals[name] = min(float(low), value), max(float(high), value)
    return intervals


def resampling(predictions: Predictions, data: Data) -> Resampled:
    """What `measure` gives of other images: a function of the places of those drawn from the predicted ones.

    All that does not depend on the others is found once for each image.
    """
    if isinstance(predictions, ClassificationPredictions) and isinstance(data, ClassificationData):
        return _resampled_classification(predictions, data)
    assert isinstance(predictions, DetectionPredictions)
    assert isinstance(data, DetectionData)
    return _resampled_detection(predictions, data)


def _resampled_classification(predictions: ClassificationPredictions, data: ClassificationData) -> Resampled:
    class_ids = data.class_ids[predictions.indices]
    rank = ranks(predictions.probabilities, class_ids)
    # calibration asks two things of an image: how probable its answer is and its true class
    answer = predictions.probabilities.max(axis=1, keepdims=True)
    truth = np.take_along_axis(predictions.probabilities, class_ids[:, None], axis=1)
    wrong = (predictions.probabilities.argmax(axis=1) != class_ids).astype(np.int64)

    def measured(drawn: NDArray[np.int64]) -> Values:
        return {
            "top1": float((rank[drawn] < 1).mean()),
            "top5": float((rank[drawn] < 5).mean()),
            "ECE": calibration_error(answer[drawn], wrong[drawn]),  # class 0 is the answer itself
            "NLL": negative_log_likelihood(truth[drawn], np.zeros_like(drawn)),
        }

    return measured


@dataclass(frozen=True)
class _Ranked:
    """The detections of one label in one of COCO's ranges of areas, best first: m of them in n images."""

    image: NDArray[np.int64]  # [m], place of the image
    right: NDArray[np.bool_]  # [10, m], at each IoU threshold
    counted: NDArray[np.bool_]  # [10, m], the others are out of the range
    objects: NDArray[np.int64]  # [n], in the range

    def precision(self, times: NDArray[np.int64], recalls: NDArray[np.float64]) -> NDArray[np.float64]:
        """Precision [10, recalls] with each image as often as `times` [n] says; -1 without objects."""
        objects = int(times @ self.objects)
        if objects == 0:
            return np.full((len(self.right), len(recalls)), -1.0)
        weights = times[self.image]
        right = np.cumsum(self.right * weights, axis=1)
        precision = right / np.maximum(np.cumsum(self.counted * weights, axis=1), 1)
        best_from = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        places = np.array([np.searchsorted(recall, recalls) for recall in right / objects])
        return np.take_along_axis(np.pad(best_from, ((0, 0), (0, 1))), places, axis=1)  # 0 where none is reached


def _resampled_detection(predictions: DetectionPredictions, data: DetectionData) -> Resampled:
    evaluator = matched_detections(predictions, data)
    recalls, images = evaluator.params.recThrs, len(predictions.indices)
    shape = len(evaluator.params.catIds), len(evaluator.params.areaRng)
    matches = evaluator.evalImgs  # by label, area and image
    ranked = [_ranked(matches[start : start + images]) for start in range(0, len(matches), images)]

    def measured(drawn: NDArray[np.int64]) -> Values:
        times = np.bincount(drawn, minlength=images)
        precision = np.array([own.precision(times, recalls) for own in ranked])
        by_label = np.moveaxis(precision.reshape(*shape, *precision.shape[1:]), (0, 1), (2, 3))
        return precision_metrics(average_weights(by_label), data.labels)

    return measured


def _ranked(matches: Sequence[Mapping[str, Any] | None]) -> _Ranked:
    """From what pycocotools found in each image: `None` where there is neither a detection nor an object."""
    found = [(place, match) for place, match in enumerate(matches) if match is not None]
    objects = np.zeros(len(matches), np.int64)
    for place, match in found:
        objects[place] = np.count_nonzero(match["gtIgnore"] == 0)
    none = np.zeros((10, 0), bool)
    scores = np.concatenate([np.zeros(0), *(match["dtScores"] for _, match in found)])
    order = np.argsort(-scores, kind="stable")
    image = np.repeat([place for place, _ in found], [len(match["dtScores"]) for _, match in found])
    ignored = np.concatenate([none, *(match["dtIgnore"] for _, match in found)], axis=1)[:, order].astype(bool)
    matched = np.concatenate([none, *(match["dtMatches"] for _, match in found)], axis=1)[:, order] > 0
    return _Ranked(image[order].astype(np.int64), matched & ~ignored, ~ignored, objects)
