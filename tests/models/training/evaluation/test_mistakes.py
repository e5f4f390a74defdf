"""Correct and wrong predictions, counted on hand-written examples."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrine.models.training.data.dataset import ClassificationData, DetectionData
from vitrine.models.training.evaluation.metrics import (
    ClassificationPredictions,
    DetectionPredictions,
    average_precision,
)
from vitrine.models.training.evaluation.mistakes import detection_mistakes, iou, match_objects, misclassifications

Box = tuple[float, float, float, float]


def test_the_most_confident_misclassifications_come_first() -> None:
    data = ClassificationData("d", "val", ("a", "b"), [""] * 4, [b""] * 4, np.array([0, 0, 1, 1]))
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.3, 0.7]], np.float32)
    predictions = ClassificationPredictions(np.arange(4), probabilities, 1.0)
    worst = misclassifications(predictions, data, 10)
    assert [(wrong.index, wrong.true, wrong.predicted) for wrong in worst] == [(2, "b", "a"), (1, "a", "b")]
    assert (worst[0].probability, worst[0].true_probability) == pytest.approx((0.8, 0.2))
    assert misclassifications(predictions, data, 1) == worst[:1]


def test_misclassifications_are_of_the_predicted_images() -> None:
    data = ClassificationData("d", "val", ("a", "b"), [""] * 9, [b""] * 9, np.array([1] * 8 + [0]))
    predictions = ClassificationPredictions(np.array([8]), np.array([[0.1, 0.9]], np.float32), 1.0)
    assert [(wrong.index, wrong.true) for wrong in misclassifications(predictions, data, 3)] == [(8, "a")]


def objects(*images: list[tuple[int, Box]]) -> DetectionData:
    return DetectionData(
        "d",
        "val",
        ("cat", "dog"),
        [f"{i}.png" for i in range(len(images))],
        [b""] * len(images),
        [np.array([class_id for class_id, _ in image], np.int64) for image in images],
        [np.array([box for _, box in image], np.float32).reshape(-1, 4) for image in images],
    )


def found(images: int, *detections: tuple[int, float, int, Box]) -> DetectionPredictions:
    """Detections as image, score, class id and box."""
    columns = list(zip(*detections, strict=True)) or [[], [], [], []]
    return DetectionPredictions(
        np.arange(images),
        np.array(columns[0], np.int64),
        np.array(columns[1], np.float32),
        np.array(columns[2], np.int64),
        np.array(columns[3], np.float32).reshape(-1, 4),
        1.0,
    )


LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0)
NEAR_LEFT = (0.0, 0.0, 10.0, 30.0)  # an IoU of 1/3


def test_every_kind_of_mistake_is_counted() -> None:
    data = objects([(0, LEFT), (1, RIGHT)], [(0, LEFT)], [(1, LEFT)], [])
    predictions = found(
        4,
        (0, 0.9, 0, LEFT),
        (0, 0.8, 0, LEFT),  # a duplicate
        (0, 0.9, 1, RIGHT),
        (1, 0.9, 1, LEFT),  # another label
        (2, 0.9, 1, NEAR_LEFT),
        (3, 0.9, 0, RIGHT),  # nothing there
    )
    np.testing.assert_array_equal(match_objects(predictions, data), [0, -1, 1, -1, -1, -1])
    mistakes = detection_mistakes(found(4, (3, 0.1, 1, LEFT), *as_list(predictions)), data, 10)
    assert mistakes.threshold == pytest.approx(0.9)
    assert (mistakes.right, mistakes.missed) == (2, 2)
    assert (mistakes.precision, mistakes.recall) == (2 / 5, 1 / 2)
    assert mistakes.false == {"other label": 1, "badly placed": 1, "nothing there": 1}
    assert [image.index for image in mistakes.worst] == [1, 2, 3]  # a miss and 0.9, the same, 0.9
    kinds = [(box.kind, box.label, box.score is None) for box in mistakes.worst[0].boxes]
    assert kinds == [("false", "dog", False), ("missed", "cat", True)]
    below = detection_mistakes(predictions, data, 0, threshold=0.5)
    assert (below.threshold, below.right, below.false["duplicate"]) == (0.5, 2, 1)


def as_list(predictions: DetectionPredictions) -> list[tuple[int, float, int, Box]]:
    columns = predictions.image, predictions.scores, predictions.class_ids, predictions.boxes
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_a_duplicate_is_counted_as_one() -> None:
    mistakes = detection_mistakes(found(1, (0, 0.9, 0, LEFT), (0, 0.9, 0, LEFT)), objects([(0, LEFT)]), 1)
    assert mistakes.false == {"duplicate": 1}


def test_nothing_found_is_all_missed() -> None:
    mistakes = detection_mistakes(found(2), objects([(0, LEFT)], []), 5)
    assert (mistakes.right, mistakes.missed, mistakes.precision, mistakes.false) == (0, 1, 0, {})
    assert [[box.kind for box in image.boxes] for image in mistakes.worst] == [["missed"]]


def random_predictions(seed: int) -> tuple[DetectionPredictions, DetectionData]:
    """Detections with distinct scores, some of them near the objects."""
    random = np.random.default_rng(seed)

    def boxes(count: int) -> list[Box]:
        corners = random.uniform(0, 40, (count, 2))
        return [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, random.uniform(5, 40, (count, 2)), strict=True)]

    data = objects(*([(int(random.integers(2)), box) for box in boxes(int(random.integers(1, 6)))] for _ in range(4)))
    scores = iter(random.permutation(200) / 200)
    detections = []
    for image in range(4):
        near = [tuple(box + random.normal(0, 2, 4)) for box in data.boxes[image]]
        for box in [*near, *boxes(3)]:
            x = sorted((box[0], box[2])), sorted((box[1], box[3]))
            detections.append(
                (image, float(next(scores)), int(random.integers(2)), (x[0][0], x[1][0], x[0][1], x[1][1]))
            )
    return found(4, *detections), data


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_the_threshold_has_the_best_f1(seed: int) -> None:
    predictions, data = random_predictions(seed)
    objects = sum(map(len, data.class_ids))

    def f1(threshold: float) -> float:
        right = detection_mistakes(predictions, data, 0, threshold).right
        return 2 * right / (np.count_nonzero(predictions.scores >= threshold) + objects)

    chosen = detection_mistakes(predictions, data, 0).threshold
    assert f1(chosen) == max(f1(float(score)) for score in predictions.scores)
    assert detection_mistakes(found(4), data, 0).threshold == 0.5


@given(st.integers(0, 2**32 - 1), st.floats(0, 1, width=32), st.integers(0, 4))
@settings(deadline=None, max_examples=25)
def test_the_images_with_the_most_severe_mistakes_come_first(seed: int, threshold: float, count: int) -> None:
    """A missed object weighs 1, a false positive its score."""
    predictions, data = random_predictions(seed)
    every = detection_mistakes(predictions, data, 9, threshold)
    severities = [
        sum({"false": box.score, "missed": 1}.get(box.kind, 0) for box in image.boxes) for image in every.worst
    ]
    assert severities == sorted(severities, reverse=True)
    assert all(severity > 0 for severity in severities)
    boxes = [box for image in every.worst for box in image.boxes]
    kinds = Counter(box.kind for box in boxes)
    assert (kinds["false"], kinds["missed"]) == (sum(every.false.values()), every.missed)
    assert kinds["right"] <= every.right
    assert all(box.score >= threshold for box in boxes if box.score is not None)
    assert detection_mistakes(predictions, data, count, threshold).worst == every.worst[:count]


def test_nothing_wrong() -> None:
    mistakes = detection_mistakes(found(2, (0, 0.9, 0, LEFT)), objects([(0, LEFT)], []), 5)
    assert (mistakes.precision, mistakes.recall, mistakes.right, mistakes.missed) == (1, 1, 1, 0)
    assert (mistakes.threshold, mistakes.false, mistakes.worst) == (pytest.approx(0.9), {}, [])
    empty = detection_mistakes(found(1), objects([]), 5)
    assert (empty.precision, empty.recall, empty.missed) == (0, 0, 0)


@pytest.mark.parametrize(
    ("label", "height", "expected"),
    [
        (0, 20, {}),  # an IoU of exactly 0.5 is right
        (0, 21, {"badly placed": 1}),
        (0, 100, {"badly placed": 1}),  # exactly 0.1
        (0, 101, {"nothing there": 1}),
        (1, 20, {"other label": 1}),
        (1, 21, {"nothing there": 1}),
    ],
)
def test_the_overlap_decides_what_a_detection_is(label: int, height: float, expected: dict[str, int]) -> None:
    data = objects([(0, LEFT)])
    assert detection_mistakes(found(1, (0, 0.9, label, (0, 0, 10, height))), data, 1, 0.5).false == expected
    duplicate = {"duplicate": 1} if (label, height) == (0, 20) else expected
    both = found(1, (0, 0.99, 0, LEFT), (0, 0.9, label, (0, 0, 10, height)))
    assert detection_mistakes(both, data, 1, 0.5).false == duplicate


def test_overlap() -> None:
    boxes = np.array([LEFT, (5, 0, 15, 10), (3, 3, 3, 3)], np.float32)
    np.testing.assert_allclose(iou(boxes, boxes), [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(iou(boxes / 100, boxes / 100), [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(iou(boxes, boxes + 20), np.zeros((3, 3)))  # apart in both directions


@given(st.integers(0, 2**32 - 1))
def test_matches_are_those_of_cocos_precision(seed: int) -> None:
    """With distinct scores, precision over recall from our matches is that of pycocotools at IoU 0.5."""
    predictions, data = random_predictions(seed)
    matched = match_objects(predictions, data) >= 0
    measured = average_precision(predictions, data)
    for class_id in range(2):
        total = sum(int((ids == class_id).sum()) for ids in data.class_ids)
        own = np.flatnonzero(predictions.class_ids == class_id)
        if total == 0:
            continue
        right = np.cumsum(matched[own[np.argsort(-predictions.scores[own])]])
        precision = right / np.arange(1, len(own) + 1)
        recall = right / total
        for i, at in enumerate(np.linspace(0, 1, 101)):
            reached = precision[recall >= at]
            assert measured.precision_50[i, class_id] == pytest.approx(reached.max() if len(reached) else 0, abs=1e-6)
