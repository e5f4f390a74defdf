"""Accuracy and average precision of a predictor, whatever runtime is behind it. Needs no torch."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from bundle.predictors import Classifier, Detector, Predictor
from models.training.data import ClassificationData, Data, DetectionData, check_labels
from models.training.errors import DataError

_BATCH = 64


def evaluate(predictor: Predictor, data: Data) -> dict[str, float]:
    """The task's metrics as fractions: "top1", "top5", or COCO's "AP", "AP50", "AP75", ... and AP50 by label.

    Raises:
        DataError: the data's labels are not the predictor's, or the data is for another task.
    """
    check_labels(data, predictor.labels)
    if isinstance(predictor, Classifier) and isinstance(data, ClassificationData):
        return _evaluate_classifier(predictor, data)
    if isinstance(predictor, Detector) and isinstance(data, DetectionData):
        return _evaluate_detector(predictor, data)
    raise DataError(f"{data.name}: expected data for {type(predictor).__name__}, found {type(data).__name__}")


def _progress(items: range) -> "tqdm[int]":
    return tqdm(items, desc="evaluate", leave=False, disable=None)


def _evaluate_classifier(predictor: Classifier, data: ClassificationData) -> dict[str, float]:
    ranks = []
    for start in _progress(range(0, len(data), _BATCH)):
        images = [data.image(i) for i in range(start, min(start + _BATCH, len(data)))]
        probabilities = predictor.probabilities(images)
        truth = data.class_ids[start : start + _BATCH]
        if not np.isfinite(probabilities).all():
            raise DataError(f"{data.name}: the network answers probabilities that are not finite")
        order = np.argsort(-probabilities, axis=1, kind="stable")  # as `Classifier.classify` orders them
        ranks.append((order == truth[:, None]).argmax(axis=1))
    rank = np.concatenate(ranks)
    return {"top1": float((rank < 1).mean()), "top5": float((rank < 5).mean())}


def _evaluate_detector(predictor: Detector, data: DetectionData) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth: dict[str, list[dict[str, object]]] = {
        "images": [{"id": i} for i in range(len(data))],
        "categories": [{"id": i, "name": label} for i, label in enumerate(data.labels)],
        "annotations": [],
    }
    for image_id, (boxes, class_ids) in enumerate(zip(data.boxes, data.class_ids, strict=True)):
        for (x_min, y_min, x_max, y_max), class_id in zip(boxes.tolist(), class_ids.tolist(), strict=True):
            box = [x_min, y_min, x_max - x_min, y_max - y_min]
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": class_id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    if not truth["annotations"]:
        raise DataError(f"{data.name}: {data.split} has no boxes to measure with")
    found = [entry for i in _progress(range(len(data))) for entry in _coco_entries(predictor, data, i)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on standard output
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        results = coco.loadRes(found) if found else COCO()
        evaluator = COCOeval(coco, results, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    metrics = dict(zip(names, map(float, evaluator.stats), strict=False))
    precision = evaluator.eval["precision"]  # [thresholds, recalls, classes, areas, detections], -1 where undefined
    for class_id, label in enumerate(data.labels):
        own = precision[0, :, class_id, 0, -1]
        metrics[f"AP50_{label}"] = float(own.mean()) if (own > -1).all() else -1.0
    return {name: value for name, value in metrics.items() if value >= 0}


def _coco_entries(predictor: Detector, data: DetectionData, image_id: int) -> Iterator[dict[str, object]]:
    for detection in predictor.detect(data.image(image_id), threshold=0.0, max_detections=100):
        box = detection.box
        yield {
            "image_id": image_id,
            "category_id": detection.class_id,
            "bbox": [box.x_min, box.y_min, box.x_max - box.x_min, box.y_max - box.y_min],
            "score": detection.score,
        }
