"""Accuracy of a bundle and its variants, with confidence intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.bundle.manifest import GATE_METRIC, Calibration, Metrics, ReliabilityBin, ScoreThreshold, Task, Variant
from vitrine.models.training.data.dataset import ClassificationData, Data, DetectionData
from vitrine.models.training.evaluation.calibration import (
    apply_temperature,
    bin_reliability,
    calibration_error,
    negative_log_likelihood,
    reliability,
)
from vitrine.models.training.evaluation.metrics import (
    ClassificationPredictions,
    DetectionPredictions,
    Predictions,
    confusion_matrix,
    matched_detections,
    measure,
    precision_metrics,
    ranks,
    summarize_precision,
)
from vitrine.models.training.evaluation.mistakes import IOU, iou
from vitrine.models.training.evaluation.scores import right_detections, thresholds, unscaled

_MIN_SAMPLES, _MAX_SAMPLES = 200, 1000  # of the bootstrap
_MAX_PREDICTIONS = 10**8  # in all samples together: about a minute for a detector
_PERCENTILES = 2.5, 97.5
_MAX_LABELS = 20  # of a readable confusion matrix
_CONFIDENT = 0.5  # minimum score of the detections that are compared

Values = dict[str, float]
Resampled = Callable[[NDArray[np.int64]], Values]


def measure_accuracy(predictions: Predictions, data: Data, *, chosen: str = "", notes: str = "") -> Metrics:
    """Measure the metrics of `evaluation.metrics.measure` with 95 % confidence intervals, the confusion matrix of up to
    20 labels, the reliability of probabilities or scores, and what thresholds a detector's scores allow.

    The intervals are percentiles over bootstrap samples of the images (Efron & Tibshirani 1993, chapter 13): they show
    the variation over other images of the same kind, not over training runs. `chosen` and `notes` are copied.
    """
    values = measure(predictions, data)
    confusion = listed = None
    if isinstance(predictions, ClassificationPredictions) and isinstance(data, ClassificationData):
        curve = reliability(predictions.probabilities, data.class_ids[predictions.indices])
        if len(data.labels) <= _MAX_LABELS:
            confusion = tuple(map(tuple, confusion_matrix(predictions, data).tolist()))
    else:
        assert isinstance(predictions, DetectionPredictions)
        assert isinstance(data, DetectionData)
        curve = bin_reliability(predictions.scores.astype(np.float64), right_detections(predictions, data))
        points, best = thresholds(predictions, data)
        listed = tuple(
            ScoreThreshold(
                score=point.score, precision=point.precision, recall=point.recall, best_f1=point.score == best
            )
            for point in points
        )
    columns = curve.counts.tolist(), curve.confidence.tolist(), curve.accuracy.tolist()
    bins = tuple(ReliabilityBin(answers=n, confidence=c, accuracy=a) for n, c, a in zip(*columns, strict=True))
    return Metrics(
        data=data.name,
        split=data.split,
        images=len(predictions.indices),
        values=values,
        intervals=_intervals(values, predictions, data),
        confusion=confusion,
        reliability=bins,
        thresholds=listed,
        chosen=chosen,
        notes=notes,
    )


def measure_variant(
    reference: Predictions, predictions: Predictions, data: Data, float_layers: tuple[str, ...]
) -> Variant:
    """Compare a variant's predictions with those of the float32 graph, the `reference`."""
    name = GATE_METRIC[Task.CLASSIFICATION if isinstance(data, ClassificationData) else Task.DETECTION]
    values = measure(predictions, data)
    return Variant(
        metrics=values,
        drop=round(100 * (measure(reference, data)[name] - values[name]), 4),
        agreement=agreement(reference, predictions),
        float_layers=float_layers,
    )


def measure_calibration(calibration: Calibration, predictions: Predictions, data: Data) -> Calibration:
    """Measure the expected calibration error of the served predictions, without and with their calibration."""
    temperature, offset = calibration.temperature, calibration.offset
    if isinstance(predictions, ClassificationPredictions) and isinstance(data, ClassificationData):
        after = calibration_error(predictions.probabilities, data.class_ids)
        before = calibration_error(apply_temperature(predictions.probabilities, 1 / temperature), data.class_ids)
    else:
        assert isinstance(predictions, DetectionPredictions)
        assert isinstance(data, DetectionData)
        scores, right = predictions.scores.astype(np.float64), right_detections(predictions, data)
        after = bin_reliability(scores, right).error
        before = bin_reliability(unscaled(scores, temperature, offset), right).error
    return calibration.model_copy(update={"ece_before": before, "ece_after": after})


def agreement(a: Predictions, b: Predictions) -> float:
    """Share of predictions that agree, 0 to 1.

    Of classifiers, the images with the same label. Of detectors, the detections of either with a score of at least 0.5
    for which the other has one in the same image with the same label and an IoU of at least 0.5.
    """
    if isinstance(a, ClassificationPredictions) and isinstance(b, ClassificationPredictions):
        return float((a.probabilities.argmax(axis=1) == b.probabilities.argmax(axis=1)).mean())
    assert isinstance(a, DetectionPredictions)
    assert isinstance(b, DetectionPredictions)
    matched = np.concatenate((_matched(a, b), _matched(b, a)))
    return float(matched.mean()) if len(matched) else 1.0


def _matched(a: DetectionPredictions, b: DetectionPredictions) -> NDArray[np.bool_]:
    """Whether each confident detection of `a` matches one of `b`."""
    matched: list[bool] = []
    for index in a.indices.tolist():
        of_a, of_b = (np.flatnonzero((p.image == index) & (p.scores >= _CONFIDENT)) for p in (a, b))
        same = a.class_ids[of_a, None] == b.class_ids[of_b]
        matched += ((iou(a.boxes[of_a], b.boxes[of_b]) >= IOU) & same).any(axis=1).tolist()
    return np.array(matched, bool)


def _intervals(values: Values, predictions: Predictions, data: Data) -> dict[str, tuple[float, float]]:
    random = np.random.default_rng(0)
    count = len(predictions.indices)
    size = len(predictions.scores) if isinstance(predictions, DetectionPredictions) else count
    repetitions = max(_MIN_SAMPLES, min(_MAX_SAMPLES, _MAX_PREDICTIONS // max(1, size)))
    resampled = resampling(predictions, data)
    samples = [resampled(random.integers(0, count, count)) for _ in range(repetitions)]
    intervals = {}
    for name, value in values.items():
        sampled = [sample[name] for sample in samples if name in sample]  # a sample may lack a rare label
        low, high = np.percentile(sampled, _PERCENTILES)
        # Repeated images raise the ECE: for a well calibrated network, all samples may exceed the value itself.
        intervals[name] = min(float(low), value), max(float(high), value)
    return intervals


def resampling(predictions: Predictions, data: Data) -> Resampled:
    """Return a function that measures a bootstrap sample, given the indices of its images among the predicted ones.

    Quantities that depend on a single image are computed only once.
    """
    if isinstance(predictions, ClassificationPredictions) and isinstance(data, ClassificationData):
        return _resampled_classification(predictions, data)
    assert isinstance(predictions, DetectionPredictions)
    assert isinstance(data, DetectionData)
    return _resampled_detection(predictions, data)


def _resampled_classification(predictions: ClassificationPredictions, data: ClassificationData) -> Resampled:
    class_ids = data.class_ids[predictions.indices]
    rank = ranks(predictions.probabilities, class_ids)
    # Calibration depends on two probabilities of an image: of its prediction and of its true class.
    confidence = predictions.probabilities.max(axis=1, keepdims=True)
    truth = np.take_along_axis(predictions.probabilities, class_ids[:, None], axis=1)
    wrong = (predictions.probabilities.argmax(axis=1) != class_ids).astype(np.int64)

    def measured(drawn: NDArray[np.int64]) -> Values:
        return {
            "top1": float((rank[drawn] < 1).mean()),
            "top5": float((rank[drawn] < 5).mean()),
            "ECE": calibration_error(confidence[drawn], wrong[drawn]),  # class 0 is the prediction
            "NLL": negative_log_likelihood(truth[drawn], np.zeros_like(drawn)),
        }

    return measured


@dataclass(frozen=True)
class _Ranked:
    """The m detections of one label and area range in n images, by descending score."""

    image: NDArray[np.int64]  # [m], index of the image
    correct: NDArray[np.bool_]  # [10, m], at each IoU threshold
    counted: NDArray[np.bool_]  # [10, m], False outside the area range
    objects: NDArray[np.int64]  # [n], ground truth in the area range

    def precision(self, times: NDArray[np.int64], recalls: NDArray[np.float64]) -> NDArray[np.float64]:
        """Precision [10, recalls] with each image repeated `times` [n]; -1 without objects."""
        objects = int(times @ self.objects)
        if objects == 0:
            return np.full((len(self.correct), len(recalls)), -1.0)
        weights = times[self.image]
        correct = np.cumsum(self.correct * weights, axis=1)
        precision = correct / np.maximum(np.cumsum(self.counted * weights, axis=1), 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        indices = np.array([np.searchsorted(recall, recalls) for recall in correct / objects])
        return np.take_along_axis(np.pad(envelope, ((0, 0), (0, 1))), indices, axis=1)  # 0 at recalls not reached


def _resampled_detection(predictions: DetectionPredictions, data: DetectionData) -> Resampled:
    evaluator = matched_detections(predictions, data)
    recalls, images = evaluator.params.recThrs, len(predictions.indices)
    shape = len(evaluator.params.catIds), len(evaluator.params.areaRng)
    matches = evaluator.evalImgs  # by label, area and image
    ranked = [_ranked(matches[start : start + images]) for start in range(0, len(matches), images)]

    def measured(drawn: NDArray[np.int64]) -> Values:
        times = np.bincount(drawn, minlength=images)
        precision = np.array([detections.precision(times, recalls) for detections in ranked])
        by_label = np.moveaxis(precision.reshape(*shape, *precision.shape[1:]), (0, 1), (2, 3))
        return precision_metrics(summarize_precision(by_label), data.labels)

    return measured


def _ranked(matches: Sequence[Mapping[str, Any] | None]) -> _Ranked:
    """Convert pycocotools' matches of each image, None for an image without detections and objects."""
    present = [(index, match) for index, match in enumerate(matches) if match is not None]
    objects = np.zeros(len(matches), np.int64)
    for index, match in present:
        objects[index] = np.count_nonzero(match["gtIgnore"] == 0)
    empty = np.zeros((10, 0), bool)
    scores = np.concatenate([np.zeros(0), *(match["dtScores"] for _, match in present)])
    order = np.argsort(-scores, kind="stable")
    image = np.repeat([index for index, _ in present], [len(match["dtScores"]) for _, match in present])
    ignored = np.concatenate([empty, *(match["dtIgnore"] for _, match in present)], axis=1)[:, order].astype(bool)
    matched = np.concatenate([empty, *(match["dtMatches"] for _, match in present)], axis=1)[:, order] > 0
    return _Ranked(image[order].astype(np.int64), matched & ~ignored, ~ignored, objects)
