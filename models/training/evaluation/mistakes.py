"""The mistakes of a predictor, worst first. Does not need torch.

A detection is correct if its IoU with an object of its label is at least 0.5 and no detection with a higher score is
matched with that object. Shapes: n images, m detections.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.training.data.dataset import ClassificationData, DetectionData
from vitrine.models.training.evaluation.metrics import ClassificationPredictions, DetectionPredictions

IOU = 0.5
_MIN_NEAR_IOU = 0.1  # smallest IoU of a badly placed box

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Misclassification:
    """An image classified as another class."""

    index: int  # in the data
    true: str
    predicted: str
    probability: float  # of the predicted class
    true_probability: float


@dataclass(frozen=True)
class MarkedBox:
    """A box in an image: `right`, `false` (a false positive) or `missed` (a false negative)."""

    kind: str
    label: str
    score: float | None  # None if missed
    box: tuple[float, float, float, float]  # xyxy in pixels


@dataclass(frozen=True)
class WrongImage:
    """An image with its detections and missed objects."""

    index: int  # in the data
    boxes: list[MarkedBox]


@dataclass(frozen=True)
class DetectionMistakes:
    """Mistakes among the detections with a score of at least `threshold`."""

    threshold: float  # by default the one with the best F1 score over all labels
    precision: float
    recall: float
    right: int
    missed: int
    false: dict[str, int]  # by kind: other label, duplicate, badly placed, nothing there
    worst: list[WrongImage]


def misclassifications(
    predictions: ClassificationPredictions, data: ClassificationData, count: int
) -> list[Misclassification]:
    """Return the `count` wrong predictions with the highest probability."""
    probabilities, true = predictions.probabilities, data.class_ids[predictions.indices]
    predicted, rows = probabilities.argmax(axis=1), np.arange(len(true))
    order = np.argsort(np.where(predicted == true, np.inf, -probabilities[rows, predicted]), kind="stable")
    return [
        Misclassification(
            int(predictions.indices[i]),
            data.labels[true[i]],
            data.labels[predicted[i]],
            float(probabilities[i, predicted[i]]),
            float(probabilities[i, true[i]]),
        )
        for i in order[:count]
        if predicted[i] != true[i]
    ]


def detection_mistakes(
    predictions: DetectionPredictions, data: DetectionData, count: int, threshold: float | None = None
) -> DetectionMistakes:
    """Return the mistakes at a threshold, and the `count` images with the most severe ones.

    The default threshold is the one with the best F1 score.
    """
    matched = match_objects(predictions, data)
    objects = sum(len(data.class_ids[i]) for i in predictions.indices.tolist())
    if threshold is None:
        threshold = best_threshold(predictions.scores, matched >= 0, objects)
    counted = predictions.scores >= threshold
    kinds: Counter[str] = Counter()
    images: list[tuple[float, WrongImage]] = []
    for index, rows in _by_image(predictions):
        rows = rows[counted[rows]]
        true_boxes, true_ids = data.boxes[index], data.class_ids[index]
        overlaps = iou(predictions.boxes[rows], true_boxes)
        boxes, severity = [], 0.0
        for detection, overlap in zip(rows.tolist(), overlaps, strict=True):
            score, class_id = float(predictions.scores[detection]), int(predictions.class_ids[detection])
            right = matched[detection] >= 0
            if not right:
                kinds[_false_positive_kind(overlap, true_ids == class_id)] += 1
                severity += score
            corners = tuple(predictions.boxes[detection].tolist())
            boxes.append(MarkedBox("right" if right else "false", data.labels[class_id], score, corners))
        for missed in sorted(set(range(len(true_ids))) - set(matched[rows].tolist())):
            boxes.append(MarkedBox("missed", data.labels[true_ids[missed]], None, tuple(true_boxes[missed].tolist())))
            severity += 1
        if severity:
            images.append((severity, WrongImage(index, boxes)))
    images.sort(key=lambda entry: -entry[0])
    right = int((counted & (matched >= 0)).sum())
    return DetectionMistakes(
        threshold,
        precision=right / max(1, int(counted.sum())),
        recall=right / max(1, objects),
        right=right,
        missed=objects - right,
        false=dict(kinds.most_common()),
        worst=[image for _, image in images[:count]],
    )


def match_objects(predictions: DetectionPredictions, data: DetectionData) -> NDArray[np.int64]:
    """Match each detection with an object of its image: the object's index in the image, or -1; int64 [m].

    A match depends only on detections with higher scores, so one matching serves every threshold.
    """
    matched = np.full(len(predictions.scores), -1, np.int64)
    for index, rows in _by_image(predictions):
        same = predictions.class_ids[rows, None] == data.class_ids[index]
        overlaps = np.where(same, iou(predictions.boxes[rows], data.boxes[index]), 0.0)
        for row in np.flatnonzero((overlaps >= IOU).any(axis=1)):
            best = int(overlaps[row].argmax())
            if overlaps[row, best] >= IOU:
                matched[rows[row]] = best
                overlaps[:, best] = 0.0
    return matched


def iou(boxes: Floats, others: Floats) -> NDArray[np.float64]:
    """Return the IoU of each pair of xyxy boxes, [a, 4] and [b, 4] to [a, b]; 0 for boxes without area."""
    a, b = boxes[:, None].astype(np.float64), others[None].astype(np.float64)
    edges = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = edges.clip(min=0).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _by_image(predictions: DetectionPredictions) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each image and the indices of its detections, best first."""
    order = np.lexsort((-predictions.scores, predictions.image))
    edges = np.searchsorted(predictions.image[order], [predictions.indices, predictions.indices + 1])
    for index, start, end in zip(predictions.indices.tolist(), *edges.tolist(), strict=True):
        yield index, order[start:end]


def best_threshold(scores: Floats, right: NDArray[np.bool_], objects: int) -> float:
    """Return the score threshold with the best F1, 2 right / (found + objects); 0.5 without detections."""
    if len(scores) == 0:
        return 0.5
    order = np.argsort(-scores, kind="stable")
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(scores) + 1) + objects)
    return float(scores[order][f1.argmax()])


def _false_positive_kind(overlap: NDArray[np.float64], same_label: NDArray[np.bool_]) -> str:
    if (overlap[same_label] >= IOU).any():
        return "duplicate"
    if (overlap >= IOU).any():
        return "other label"
    return "badly placed" if (overlap[same_label] >= _MIN_NEAR_IOU).any() else "nothing there"
