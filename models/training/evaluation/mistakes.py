"""What a predictor gets wrong, the worst first. Needs no torch.

A detection is right where its IoU with an object of its label is at least 0.5 and no detection of a higher score has
that object. Shapes: n images, m detections.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.training.data.dataset import ClassificationData, DetectionData
from vitrine.models.training.evaluation.metrics import ClassificationPredictions, DetectionPredictions

IOU = 0.5
_NEAR = 0.1  # IoU from which a wrong box is a badly placed one

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class WrongAnswer:
    """An image that was taken for another class."""

    index: int  # in the data
    true: str
    answered: str
    probability: float  # of the answer
    true_probability: float


@dataclass(frozen=True)
class MarkedBox:
    """A box in an image: `right`, `false` (found where nothing of the label is) or `missed`."""

    kind: str
    label: str
    score: float | None  # None where missed
    box: tuple[float, float, float, float]  # xyxy in pixels


@dataclass(frozen=True)
class WrongImage:
    """An image with its detections and the objects that they missed."""

    index: int  # in the data
    boxes: list[MarkedBox]


@dataclass(frozen=True)
class DetectionMistakes:
    """What goes wrong where detections count from `threshold` on."""

    threshold: float  # with the best F1 score over all labels
    precision: float
    recall: float
    right: int
    missed: int
    false: dict[str, int]  # by kind: other label, duplicate, badly placed, nothing there
    worst: list[WrongImage]


def wrong_answers(predictions: ClassificationPredictions, data: ClassificationData, count: int) -> list[WrongAnswer]:
    """The `count` wrong answers that the network was surest of."""
    probabilities, true = predictions.probabilities, data.class_ids[predictions.indices]
    answered, rows = probabilities.argmax(axis=1), np.arange(len(true))
    order = np.argsort(np.where(answered == true, np.inf, -probabilities[rows, answered]), kind="stable")
    return [
        WrongAnswer(
            int(predictions.indices[i]),
            data.labels[true[i]],
            data.labels[answered[i]],
            float(probabilities[i, answered[i]]),
            float(probabilities[i, true[i]]),
        )
        for i in order[:count]
        if answered[i] != true[i]
    ]


def detection_mistakes(
    predictions: DetectionPredictions, data: DetectionData, count: int, threshold: float | None = None
) -> DetectionMistakes:
    """Mistakes at a threshold, and the `count` images with the most and the surest of them.

    Without `threshold` it is the one with the best F1 score.
    """
    matched = match_objects(predictions, data)
    objects = sum(len(data.class_ids[i]) for i in predictions.indices.tolist())
    if threshold is None:
        threshold = _best_threshold(predictions.scores, matched >= 0, objects)
    shown = predictions.scores >= threshold
    kinds: Counter[str] = Counter()
    images: list[tuple[float, WrongImage]] = []
    for index, own in _by_image(predictions):
        own = own[shown[own]]
        true_boxes, true_ids = data.boxes[index], data.class_ids[index]
        overlaps = iou(predictions.boxes[own], true_boxes)
        boxes, badness = [], 0.0
        for detection, overlap in zip(own.tolist(), overlaps, strict=True):
            score, class_id = float(predictions.scores[detection]), int(predictions.class_ids[detection])
            right = matched[detection] >= 0
            if not right:
                kinds[_false_kind(overlap, true_ids == class_id)] += 1
                badness += score
            corners = tuple(predictions.boxes[detection].tolist())
            boxes.append(MarkedBox("right" if right else "false", data.labels[class_id], score, corners))
        for lost in sorted(set(range(len(true_ids))) - set(matched[own].tolist())):
            boxes.append(MarkedBox("missed", data.labels[true_ids[lost]], None, tuple(true_boxes[lost].tolist())))
            badness += 1
        if badness:
            images.append((badness, WrongImage(index, boxes)))
    images.sort(key=lambda entry: -entry[0])
    right = int((shown & (matched >= 0)).sum())
    return DetectionMistakes(
        threshold,
        precision=right / max(1, int(shown.sum())),
        recall=right / max(1, objects),
        right=right,
        missed=objects - right,
        false=dict(kinds.most_common()),
        worst=[image for _, image in images[:count]],
    )


def match_objects(predictions: DetectionPredictions, data: DetectionData) -> NDArray[np.int64]:
    """The object that each detection found: its place among the objects of the image, or -1; int64 [m].

    What a detection gets depends on those of higher scores alone, so that one matching serves every threshold.
    """
    matched = np.full(len(predictions.scores), -1, np.int64)
    for index, own in _by_image(predictions):
        same = predictions.class_ids[own, None] == data.class_ids[index]
        overlaps = np.where(same, iou(predictions.boxes[own], data.boxes[index]), 0.0)
        for row in np.flatnonzero((overlaps >= IOU).any(axis=1)):
            best = int(overlaps[row].argmax())
            if overlaps[row, best] >= IOU:
                matched[own[row]] = best
                overlaps[:, best] = 0.0
    return matched


def iou(boxes: Floats, others: Floats) -> NDArray[np.float64]:
    """Intersection over union of each pair of xyxy boxes, [a, 4] and [b, 4] to [a, b]; 0 for boxes without area."""
    a, b = boxes[:, None].astype(np.float64), others[None].astype(np.float64)
    edges = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = edges.clip(min=0).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _by_image(predictions: DetectionPredictions) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each image, and where its detections are, best first."""
    order = np.lexsort((-predictions.scores, predictions.image))
    edges = np.searchsorted(predictions.image[order], [predictions.indices, predictions.indices + 1])
    for index, start, end in zip(predictions.indices.tolist(), *edges.tolist(), strict=True):
        yield index, order[start:end]


def _best_threshold(scores: Floats, right: NDArray[np.bool_], objects: int) -> float:
    """The score from which on detections have the best F1, 2 right / (found + objects); 0.5 without detections."""
    if len(scores) == 0:
        return 0.5
    order = np.argsort(-scores, kind="stable")
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(scores) + 1) + objects)
    return float(scores[order][f1.argmax()])


def _false_kind(overlap: NDArray[np.float64], same_label: NDArray[np.bool_]) -> str:
    if (overlap[same_label] >= IOU).any():
        return "duplicate"
    if (overlap >= IOU).any():
        return "other label"
    return "badly placed" if (overlap[same_label] >= _NEAR).any() else "nothing there"
