"""Accuracy and average precision of a predictor on any runtime. Does not need torch.

Two steps: `predict` runs the predictor, `measure` compares its predictions with the data. `merge` joins the predictions
of several processes.

Shapes: n images, K classes, m detections.
"""

import contextlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vitrine.bundle.predictors import Classifier, Detection, Detector, Predictor
from vitrine.models.training.data.dataset import ClassificationData, Data, DetectionData, check_labels
from vitrine.models.training.errors import DataError
from vitrine.models.training.evaluation.calibration import calibration_error, negative_log_likelihood

MAX_DETECTIONS = 100  # per image, as in COCO
_CLASSIFIER_BATCH = 64
_DETECTOR_BATCH = 1  # images of different sizes would be padded to the largest: no gain on a CPU
_MAX_COLUMNS, _MAX_NAME, _MAX_PAIRS = 12, 20, 15  # of a confusion matrix printed as text
_METRICS = {"top1", "top5", "ECE", "NLL", "AP", "AP50", "AP75"}
_AREAS = ("AP_small", "AP_medium", "AP_large")

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class ClassificationPredictions:
    """Predictions of a classifier for some images of a data set."""

    indices: NDArray[np.int64]  # [n], of the images in the data
    probabilities: NDArray[np.float32]  # [n, K]
    seconds: float  # wall-clock time


@dataclass(frozen=True)
class DetectionPredictions:
    """Detections in some images of a data set, at most `MAX_DETECTIONS` in each."""

    indices: NDArray[np.int64]  # [n], of the images in the data
    image: NDArray[np.int64]  # [m], index in the data of the image of each detection
    scores: NDArray[np.float32]  # [m], 0 to 1
    class_ids: NDArray[np.int64]  # [m]
    boxes: NDArray[np.float32]  # [m, 4], xyxy in pixels of the upright image
    seconds: float  # wall-clock time


Predictions = ClassificationPredictions | DetectionPredictions


@dataclass(frozen=True)
class Confusion:
    """One class that was predicted as another."""

    true: str
    predicted: str
    count: int
    share: float  # fraction of the images of the true class


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's metrics: AP averages IoU thresholds 0.50:0.05:0.95, AP50 and AP75 use one; -1 is undefined."""

    summary: dict[str, float]  # AP, AP50, AP75, AP_small, AP_medium, AP_large
    by_class: NDArray[np.float64]  # [K]
    by_class_50: NDArray[np.float64]  # [K]
    precision_50: NDArray[np.float64]  # [101, K], at recalls 0, 0.01, ..., 1


def evaluate(predictor: Predictor, data: Data) -> dict[str, float]:
    """Return the metrics of a predictor on all data: `predict`, then `measure`."""
    return measure(predict(predictor, data), data)


def predict(
    predictor: Predictor,
    data: Data,
    indices: NDArray[np.int64] | None = None,
    *,
    batch: int | None = None,
    progress: bool = True,
) -> Predictions:
    """Run the predictor on the images at `indices` of the data, by default on all of them.

    Threads decode the next images while the network computes.

    Args:
        batch: images per call of the network; by default 64 for classification and 1 for detection.

    Raises:
        DataError: the labels of the data and the predictor differ, their tasks differ, an image is broken, or the
            network returns probabilities that are not finite.
    """
    check_labels(data, predictor.labels)
    chosen = np.arange(len(data)) if indices is None else np.asarray(indices, np.int64)
    size = batch or (_CLASSIFIER_BATCH if isinstance(predictor, Classifier) else _DETECTOR_BATCH)
    started = time.monotonic()
    with tqdm(total=len(chosen), desc="evaluate", leave=False, disable=None if progress else True) as bar:
        if isinstance(predictor, Classifier) and isinstance(data, ClassificationData):
            probabilities = _probabilities(predictor, data, chosen, size, bar)
            return ClassificationPredictions(chosen, probabilities, time.monotonic() - started)
        if isinstance(predictor, Detector) and isinstance(data, DetectionData):
            found = _detections(predictor, data, chosen, size, bar)
            return _detection_predictions(chosen, found, time.monotonic() - started)
    raise DataError(f"{data.name}: expected data for {type(predictor).__name__}, found {type(data).__name__}")


def merge(parts: Sequence[Predictions]) -> Predictions:
    """Join the predictions of several processes in the order of the data; `seconds` is that of the slowest.

    Raises:
        ValueError: there are none, their tasks differ, or two have the same image.
    """
    seconds = max((part.seconds for part in parts), default=0.0)
    indices = np.concatenate([part.indices for part in parts] or [np.zeros(0, np.int64)])
    if len(np.unique(indices)) != len(indices):
        raise ValueError("expected every image once, found some in two parts")
    order = np.argsort(indices)
    classified = [part for part in parts if isinstance(part, ClassificationPredictions)]
    detected = [part for part in parts if isinstance(part, DetectionPredictions)]
    if classified and not detected:
        probabilities = np.concatenate([part.probabilities for part in classified])
        return ClassificationPredictions(indices[order], probabilities[order], seconds)
    if detected and not classified:
        image = np.concatenate([part.image for part in detected])
        by_image = np.argsort(image, kind="stable")  # keeps the order of detections within an image
        return DetectionPredictions(
            indices[order],
            image[by_image],
            np.concatenate([part.scores for part in detected])[by_image],
            np.concatenate([part.class_ids for part in detected])[by_image],
            np.concatenate([part.boxes for part in detected])[by_image],
            seconds,
        )
    raise ValueError(f"expected predictions of one task, found {len(classified)} and {len(detected)}")


def measure(predictions: Predictions, data: Data) -> dict[str, float]:
    """Return the metrics of the task over the predicted images.

    Classification: "top1" and "top5" accuracy; "ECE", the expected calibration error in 15 bins (Guo et al. 2017);
    "NLL", the negative log-likelihood in nats. Detection: COCO's "AP", "AP50", "AP75", "AP_small", "AP_medium",
    "AP_large", and for each label "AP_<label>" and "AP50_<label>"; undefined values (no such object) are omitted.
    All but NLL are fractions.

    Raises:
        DataError: the predictions are for another task, or there are no images or boxes.
    """
    if len(predictions.indices) == 0:
        raise DataError(f"{data.name}: {data.split} has no images to measure with")
    if isinstance(predictions, ClassificationPredictions) and isinstance(data, ClassificationData):
        class_ids = data.class_ids[predictions.indices]
        rank = ranks(predictions.probabilities, class_ids)
        return {
            "top1": float((rank < 1).mean()),
            "top5": float((rank < 5).mean()),
            "ECE": calibration_error(predictions.probabilities, class_ids),
            "NLL": negative_log_likelihood(predictions.probabilities, class_ids),
        }
    if isinstance(predictions, DetectionPredictions) and isinstance(data, DetectionData):
        return precision_metrics(average_precision(predictions, data), data.labels)
    raise DataError(f"{data.name}: expected data for {type(predictions).__name__}, found {type(data).__name__}")


def precision_metrics(measured: AveragePrecision, labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of a detector by name, without undefined ones."""
    metrics = dict(measured.summary)
    for class_id, label in enumerate(labels):
        metrics[label_metric(label)] = float(measured.by_class[class_id])
        metrics[f"AP50_{label}"] = float(measured.by_class_50[class_id])
    return {name: value for name, value in metrics.items() if value >= 0}


def label_metric(label: str) -> str:
    """Return the metric name of a label's AP: "AP_<label>", unless that is the name of an area range."""
    return f"AP_{label}" if f"AP_{label}" not in _AREAS else f"AP_label_{label}"


def is_metric(name: str) -> bool:
    """Return whether `name` is a metric of `measure`; other values in metrics.jsonl are of training."""
    return name in _METRICS or name.startswith(("AP_", "AP50_"))


def ranks(probabilities: NDArray[np.float32], class_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rank of the true class, from 0; ties are broken as in `Classifier.classify`."""
    true = probabilities[np.arange(len(class_ids)), class_ids][:, None]
    before = np.arange(probabilities.shape[1]) < class_ids[:, None]
    positions: NDArray[np.int64] = ((probabilities > true) | ((probabilities == true) & before)).sum(axis=1)
    return positions


def confusion_matrix(predictions: ClassificationPredictions, data: ClassificationData) -> NDArray[np.int64]:
    """Count the images of each true class (rows) by predicted class (columns), [K, K]."""
    classes = len(data.labels)
    pairs = data.class_ids[predictions.indices] * classes + predictions.probabilities.argmax(axis=1)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def most_confused(matrix: NDArray[np.int64], labels: Sequence[str], count: int = 10) -> list[Confusion]:
    """Return the `count` most frequent confusions of one class with another."""
    wrong = matrix * (1 - np.eye(len(labels), dtype=np.int64))
    images = matrix.sum(axis=1)
    largest = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(pair), len(labels)) for pair in largest]
    return [
        Confusion(
            labels[true], labels[predicted], int(wrong[true, predicted]), float(wrong[true, predicted] / images[true])
        )
        for true, predicted in pairs
        if wrong[true, predicted] > 0
    ]


def confusion_text(matrix: NDArray[np.int64], labels: Sequence[str]) -> str:
    """Format the confusion matrix as a table (rows true, columns predicted); with many classes, its largest entries."""
    if len(labels) > _MAX_COLUMNS:
        pairs = most_confused(matrix, labels, _MAX_PAIRS)
        lines = [f"{pair.count:6}  {pair.share:6.1%}  {pair.true} as {pair.predicted}" for pair in pairs]
        return "\n".join([" count   share  true class as answered", *lines])
    names = [label[:_MAX_NAME] for label in labels]
    width = max(map(len, names))
    column = max(6, len(str(matrix.max())) + 1)
    head = "".join(f"{name[: column - 1]:>{column}}" for name in names)
    rows = [
        f"{name:<{width}}" + "".join(f"{n:>{column}}" for n in row) for name, row in zip(names, matrix, strict=True)
    ]
    return "\n".join([" " * width + head, *rows])


def average_precision(predictions: DetectionPredictions, data: DetectionData) -> AveragePrecision:
    """Compute COCO's average precision over the predicted images with pycocotools.

    Raises:
        DataError: the images have no boxes.
    """
    evaluator = matched_detections(predictions, data)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluator.accumulate()
    return summarize_precision(evaluator.eval["precision"][..., -1])


def summarize_precision(precision: NDArray[np.float64]) -> AveragePrecision:
    """Average COCO's precision at each IoU threshold, recall, label and area range.

    Args:
        precision: [10, 101, K, 4], for all, small, medium and large objects; -1 where undefined.
    """

    def mean(values: NDArray[np.float64]) -> float:
        defined = values[values >= 0]
        return float(defined.mean()) if len(defined) else -1.0

    all_areas = precision[..., 0]
    summary = {"AP": mean(all_areas), "AP50": mean(all_areas[0]), "AP75": mean(all_areas[5])}
    summary |= {name: mean(precision[..., area]) for area, name in enumerate(_AREAS, start=1)}
    return AveragePrecision(summary, all_areas.mean(axis=(0, 1)), all_areas[0].mean(axis=0), all_areas[0])


def matched_detections(predictions: DetectionPredictions, data: DetectionData) -> Any:
    """Return a `COCOeval` in which the detections of each image are matched with its objects.

    Raises:
        DataError: the images have no boxes.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, object]] = []
    for image in predictions.indices.tolist():
        for (x_min, y_min, x_max, y_max), class_id in zip(
            data.boxes[image].tolist(), data.class_ids[image].tolist(), strict=True
        ):
            width, height = x_max - x_min, y_max - y_min
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 would mean unmatched
                    "image_id": image,
                    "category_id": class_id,
                    "bbox": [x_min, y_min, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    if not annotations:
        raise DataError(f"{data.name}: {data.split} has no boxes to measure with")
    columns = predictions.image[:, None], predictions.boxes, predictions.scores[:, None], predictions.class_ids[:, None]
    found = np.concatenate(columns, axis=1).astype(np.float64)
    found[:, 3:5] -= found[:, 1:3]  # COCO boxes: x, y, width, height
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in predictions.indices.tolist()],
            "categories": [{"id": i, "name": label} for i, label in enumerate(data.labels)],
            "annotations": annotations,
        }
        coco.createIndex()
        results = coco.loadRes(found) if len(found) else COCO()
        evaluator = COCOeval(coco, results, "bbox")
        evaluator.evaluate()
    return evaluator


def _probabilities(
    predictor: Classifier, data: ClassificationData, indices: NDArray[np.int64], size: int, bar: "tqdm[int]"
) -> NDArray[np.float32]:
    answers = [np.zeros((0, len(data.labels)), np.float32)]
    for prepared in _batches(indices, lambda i: predictor.prepare(data.image_for(i, predictor.preprocessing)), size):
        answers.append(predictor.predict(prepared))
        if not np.isfinite(answers[-1]).all():
            raise DataError(f"{data.name}: the network answers probabilities that are not finite")
        bar.update(len(prepared))
    return np.concatenate(answers)


def _detections(
    predictor: Detector, data: DetectionData, indices: NDArray[np.int64], size: int, bar: "tqdm[int]"
) -> list[list[Detection]]:
    found: list[list[Detection]] = []
    for prepared in _batches(indices, lambda i: predictor.prepare(data.image_for(i, predictor.preprocessing)), size):
        found += predictor.predict(prepared, threshold=0.0, max_detections=MAX_DETECTIONS)
        bar.update(len(prepared))
    return found


def _detection_predictions(
    indices: NDArray[np.int64], found: list[list[Detection]], seconds: float
) -> DetectionPredictions:
    flat = [detection for detections in found for detection in detections]
    boxes = [(d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max) for d in flat]
    return DetectionPredictions(
        indices,
        np.repeat(indices, np.array([len(detections) for detections in found], np.int64)),
        np.array([detection.score for detection in flat], np.float32),
        np.array([detection.class_id for detection in flat], np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
        seconds,
    )


def _batches(indices: NDArray[np.int64], prepare: Callable[[int], Prepared], size: int) -> Iterator[list[Prepared]]:
    """Yield prepared images in order, `size` at a time; threads prepare up to two batches ahead."""
    threads = min(8, os.cpu_count() or 1)
    pending: deque[Future[Prepared]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        futures = (pool.submit(prepare, i) for i in indices.tolist())
        try:
            while True:
                pending.extend(islice(futures, max(2 * size, 2 * threads) - len(pending)))
                if not pending:
                    return
                yield [pending.popleft().result() for _ in range(min(size, len(pending)))]
        finally:
            for future in pending:
                future.cancel()
