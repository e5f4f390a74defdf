"""Intervals, confusion, reliability and agreement on random predictions; the bootstrap against plain evaluation."""

from dataclasses import replace

import numpy as np
import pytest

from vitrine.bundle.manifest import Calibration
from vitrine.export.accuracy import agreement, measure_accuracy, measure_calibration, resampling
from vitrine.models.training.data.dataset import ClassificationData, DetectionData
from vitrine.models.training.evaluation.calibration import bin_reliability
from vitrine.models.training.evaluation.metrics import ClassificationPredictions, DetectionPredictions, measure
from vitrine.models.training.evaluation.mistakes import detection_mistakes
from vitrine.models.training.evaluation.scores import apply_scores, right_detections

LABELS = ("blue", "green", "red")
IMAGES = 60


@pytest.fixture(scope="module")
def pictures() -> ClassificationData:
    class_ids = np.arange(IMAGES) % 3
    return ClassificationData("pictures", "test", LABELS, list(map(str, class_ids)), [b""] * IMAGES, class_ids)


@pytest.fixture(scope="module")
def classified(pictures: ClassificationData) -> ClassificationPredictions:
    """Probabilities that are correct for about two of three images."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 1, (IMAGES, 3)) + 1.5 * np.eye(3)[pictures.class_ids]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return ClassificationPredictions(np.arange(IMAGES), probabilities.astype(np.float32), 0.0)


@pytest.fixture(scope="module")
def scenes() -> DetectionData:
    """Objects of all sizes; one image has none, and "red" is in the first image only."""
    random = np.random.default_rng(0)
    boxes, class_ids = [], []
    for image in range(IMAGES):
        count = 0 if image == 1 else int(random.integers(1, 5))
        corners = random.uniform(0, 300, (count, 2))
        boxes.append(np.concatenate([corners, corners + random.uniform(10, 150, (count, 2))], axis=1, dtype=np.float32))
        class_ids.append(np.full(count, 2) if image == 0 else random.integers(0, 2, count))
    return DetectionData("scenes", "test", LABELS, list(map(str, range(IMAGES))), [b""] * IMAGES, class_ids, boxes)


@pytest.fixture(scope="module")
def detected(scenes: DetectionData) -> DetectionPredictions:
    """Each object roughly detected, some with a wrong label, and as many false positives."""
    random = np.random.default_rng(1)
    image = np.repeat(np.arange(IMAGES), list(map(len, scenes.boxes)))
    boxes = np.concatenate(scenes.boxes)
    found = boxes + random.normal(0, 4, boxes.shape).astype(np.float32)
    class_ids = np.where(random.random(len(image)) < 0.2, 0, np.concatenate(scenes.class_ids))
    return DetectionPredictions(
        np.arange(IMAGES),
        np.concatenate([image, image[::-1]]),
        random.random(2 * len(image)).astype(np.float32),
        np.concatenate([class_ids, class_ids]),
        np.concatenate([found, found]),
        0.0,
    )


def redrawn(predictions: DetectionPredictions, data: DetectionData, drawn: np.ndarray) -> dict[str, float]:
    """The metrics of a data set of the drawn images."""
    own = [np.flatnonzero(predictions.image == image) for image in drawn]
    again = DetectionPredictions(
        np.arange(len(drawn)),
        np.repeat(np.arange(len(drawn)), list(map(len, own))),
        *(array[np.concatenate(own)] for array in (predictions.scores, predictions.class_ids, predictions.boxes)),
        0.0,
    )
    images = {name: [getattr(data, name)[i] for i in drawn] for name in ("names", "encoded", "class_ids", "boxes")}
    return measure(again, replace(data, **images))


def test_bootstrap_sample_of_a_classifier_equals_plain_evaluation(
    pictures: ClassificationData, classified: ClassificationPredictions
) -> None:
    drawn = np.random.default_rng(2).integers(0, IMAGES, IMAGES)
    chosen = ClassificationPredictions(drawn, classified.probabilities[drawn], 0.0)
    assert resampling(classified, pictures)(drawn) == pytest.approx(measure(chosen, pictures), abs=1e-12)


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_bootstrap_sample_of_a_detector_equals_plain_evaluation(
    seed: int, scenes: DetectionData, detected: DetectionPredictions
) -> None:
    drawn = np.random.default_rng(seed).integers(0, IMAGES, IMAGES)
    assert resampling(detected, scenes)(drawn) == pytest.approx(redrawn(detected, scenes, drawn), abs=1e-12)


def test_a_label_that_no_drawn_image_has_is_left_out(scenes: DetectionData, detected: DetectionPredictions) -> None:
    found = resampling(detected, scenes)(np.arange(2, 20))
    assert "AP_red" not in found
    assert "AP_blue" in found


def test_no_detections_are_measured_too(scenes: DetectionData) -> None:
    none = np.zeros(0, np.int64)
    nothing = DetectionPredictions(np.arange(IMAGES), none, none.astype(np.float32), none, np.zeros((0, 4)), 0.0)
    metrics = measure_accuracy(nothing, scenes)
    assert (metrics.values["AP"], metrics.intervals["AP"]) == (0.0, (0.0, 0.0))


def test_intervals_hold_the_values_and_narrow_with_more_images(
    pictures: ClassificationData, classified: ClassificationPredictions
) -> None:
    metrics = measure_accuracy(classified, pictures, notes="a note")
    assert metrics.values == measure(classified, pictures)
    for name, (low, high) in metrics.intervals.items():
        assert low <= metrics.values[name] <= high, name
    low, high = metrics.intervals["top1"]
    deviation = (metrics.values["top1"] * (1 - metrics.values["top1"]) / IMAGES) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)  # of the binomial distribution
    assert measure_accuracy(classified, pictures, notes="a note") == metrics


def test_the_interval_of_a_small_calibration_error_holds_it() -> None:
    sure = np.linspace(0.51, 0.99, 400, dtype=np.float32)  # approximately calibrated
    right = np.diff(np.floor(np.cumsum(sure)), prepend=0) > 0
    data = ClassificationData("fair", "test", ("a", "b"), ["x"] * 400, [b""] * 400, np.where(right, 0, 1))
    metrics = measure_accuracy(ClassificationPredictions(np.arange(400), np.stack([sure, 1 - sure], 1), 0.0), data)
    low, high = metrics.intervals["ECE"]
    assert low == metrics.values["ECE"] < 0.02 < high


def test_a_classifier_has_confusion_and_reliability(
    pictures: ClassificationData, classified: ClassificationPredictions
) -> None:
    metrics = measure_accuracy(classified, pictures)
    assert metrics.confusion is not None
    assert metrics.reliability is not None
    assert np.trace(metrics.confusion) / IMAGES == metrics.values["top1"]
    assert sum(entry.answers for entry in metrics.reliability) == IMAGES
    error = sum(entry.answers * abs(entry.confidence - entry.accuracy) for entry in metrics.reliability) / IMAGES
    assert error == pytest.approx(metrics.values["ECE"])


def test_a_detectors_scores(scenes: DetectionData, detected: DetectionPredictions) -> None:
    metrics = measure_accuracy(detected, scenes)
    right = right_detections(detected, scenes)
    assert metrics.confusion is None
    assert metrics.reliability is not None
    assert sum(entry.answers for entry in metrics.reliability) == len(right)
    assert sum(entry.answers * entry.accuracy for entry in metrics.reliability) == pytest.approx(right.sum())
    assert metrics.thresholds is not None
    assert [point.score for point in metrics.thresholds if point.best_f1] == [
        detection_mistakes(detected, scenes, 0).threshold
    ]
    kept = detected.scores >= 0.3
    (point,) = (point for point in metrics.thresholds if point.score == 0.3)
    assert point.precision == pytest.approx(right[kept].mean())
    assert point.recall == pytest.approx(right[kept].sum() / sum(map(len, scenes.boxes)))
    assert set(metrics.intervals) == set(metrics.values) == set(measure(detected, scenes))


def test_calibration_of_scores_is_measured(scenes: DetectionData, detected: DetectionPredictions) -> None:
    right = right_detections(detected, scenes)
    served = replace(detected, scores=apply_scores(detected.scores, 0.5, -1.0).astype(np.float32))
    calibration = measure_calibration(Calibration(temperature=0.5, offset=-1.0), served, scenes)
    assert calibration.ece_before == pytest.approx(bin_reliability(detected.scores, right).error, abs=1e-3)
    assert calibration.ece_after == pytest.approx(bin_reliability(served.scores, right).error)


def test_the_confusion_of_many_labels_is_left_out(classified: ClassificationPredictions) -> None:
    labels = tuple(map(str, range(21)))
    data = ClassificationData("many", "test", labels, ["x"] * 3, [b""] * 3, np.arange(3))
    answers = ClassificationPredictions(np.arange(3), np.eye(21, dtype=np.float32)[:3], 0.0)
    assert measure_accuracy(answers, data).confusion is None


def test_agreement_of_classifiers(classified: ClassificationPredictions) -> None:
    assert agreement(classified, classified) == 1
    turned = classified.probabilities.copy()
    turned[:15] = np.roll(turned[:15], 1, axis=1)
    assert agreement(classified, replace(classified, probabilities=turned)) == 0.75


def test_agreement_of_detectors(detected: DetectionPredictions) -> None:
    assert agreement(detected, detected) == 1
    unsure = replace(detected, scores=np.zeros_like(detected.scores))
    assert agreement(detected, unsure) == 0
    assert agreement(unsure, unsure) == 1
    relabelled = replace(detected, class_ids=(detected.class_ids + 1) % 3)
    assert agreement(detected, relabelled) < 0.1
