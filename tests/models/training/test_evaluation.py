"""Metrics of predictors around hand-written networks: a callable over arrays is all that a predictor needs."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing
from bundle.predictors import Classifier, Detector
from models.training.data import ClassificationData, DetectionData
from models.training.errors import DataError
from models.training.evaluation import evaluate

CHANNELS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
CLASSIFICATION = ClassificationPreprocessing(input_size=(4, 4), **CHANNELS)
DETECTION = DetectionPreprocessing(shortest_edge=50, longest_edge=100, **CHANNELS)
LABELS = tuple("abcdefgh")
Array = NDArray[np.generic]


def png(width: int, height: int, grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), grey).save(buffer, "PNG")
    return buffer.getvalue()


CLASS_IDS = np.arange(100) % len(LABELS)
PICTURES = ClassificationData(
    "pictures", "test", LABELS, [str(i) for i in CLASS_IDS], [png(4, 4, int(i)) for i in CLASS_IDS], CLASS_IDS
)


def classifier(answer: Callable[[Array], Array]) -> Classifier:
    """A classifier whose logic gets the true class of each image, which is its grey value."""

    def network(**inputs: Array) -> Sequence[Array]:
        return [answer(inputs["pixels"][:, 0, 0, 0])]

    return Classifier(network, CLASSIFICATION, LABELS)


def one_hot(class_ids: Array) -> Array:
    return np.eye(len(LABELS), dtype=np.float32)[class_ids]


def graded(class_ids: Array) -> Array:
    """The true class is the third most probable."""
    order = (np.arange(len(LABELS)) - class_ids[:, None].astype(int)) % len(LABELS)  # 0 at the true class
    return np.where(order == 0, 5.5, order).astype(np.float32) / 100


@pytest.mark.parametrize(
    ("answer", "top1", "top5"),
    [
        pytest.param(one_hot, 1, 1, id="right"),
        pytest.param(lambda ids: one_hot((ids + 1) % 8) + 0.1 * one_hot(ids), 0, 1, id="second best"),
        pytest.param(graded, 0, 1, id="third best"),
        pytest.param(lambda ids: 1 - one_hot(ids), 0, 0, id="least probable"),
        pytest.param(
            lambda ids: one_hot(np.zeros_like(ids)) + 1e-3 * np.arange(8, dtype=np.float32), 0.13, 0.63, id="a"
        ),
    ],
)
def test_accuracy(answer: Callable[[Array], Array], top1: float, top5: float) -> None:
    """100 images: 13 are of class a, and 63 of the five that the last network thinks most probable (a, h, g, f, e)."""
    assert evaluate(classifier(answer), PICTURES) == pytest.approx({"top1": top1, "top5": top5}, abs=0.021)


def test_network_that_decides_nothing_is_no_better_than_chance() -> None:
    predictor = classifier(lambda ids: np.full((len(ids), len(LABELS)), 1 / 8, np.float32))
    assert evaluate(predictor, PICTURES)["top1"] <= 0.13


def test_network_that_answers_no_number_has_no_accuracy() -> None:
    predictor = classifier(lambda ids: np.full((len(ids), len(LABELS)), np.nan, np.float32))
    with pytest.raises(DataError, match="not finite"):
        evaluate(predictor, PICTURES)


def share_that_classify_gets_right(predictor: Classifier) -> float:
    images = [Image.open(io.BytesIO(encoded)).convert("RGB") for encoded in PICTURES.encoded]
    best = [predictor.classify(image, top_k=1)[0].class_id for image in images]
    return float(np.mean(np.array(best) == CLASS_IDS))


def test_top1_is_how_often_classify_is_right() -> None:
    random = np.random.default_rng(0).random((len(LABELS), len(LABELS)), dtype=np.float32)
    predictor = classifier(lambda ids: random[ids])
    assert evaluate(predictor, PICTURES)["top1"] == pytest.approx(share_that_classify_gets_right(predictor))


SIZES = [(100, 50), (60, 50), (50, 100), (80, 80)]
BOXES = [
    [[10, 10, 40, 40], [50, 5, 90, 45]],
    [[0, 0, 30, 50]],
    [],
    [[20, 20, 79, 79], [1, 1, 19, 19], [30, 2, 60, 18]],
]
OBJECTS = DetectionData(
    "objects",
    "test",
    ("cat", "dog"),
    [f"{i}.png" for i in range(len(SIZES))],
    [png(width, height, i) for i, (width, height) in enumerate(SIZES)],
    [np.arange(len(boxes)) % 2 for boxes in BOXES],
    [np.array(boxes, np.float32).reshape(-1, 4) for boxes in BOXES],
)


def detector(change: Callable[[Array, Array, Array], tuple[Array, Array, Array]]) -> Detector:
    """A detector that knows the truth (scores, class ids and boxes in fractions), and changes it."""

    def network(**inputs: Array) -> Sequence[Array]:
        image = int(inputs["pixels"][0, 0, 0, 0])
        boxes = OBJECTS.boxes[image] / np.array(SIZES[image] * 2, np.float32)
        scores = np.linspace(0.9, 0.8, len(boxes), dtype=np.float32)
        return [output[None] for output in change(scores, OBJECTS.class_ids[image], boxes)]

    return Detector(network, DETECTION, OBJECTS.labels)


def test_exact_boxes_have_an_average_precision_of_one() -> None:
    metrics = evaluate(detector(lambda scores, ids, boxes: (scores, ids, boxes)), OBJECTS)
    assert metrics.keys() >= {"AP", "AP50", "AP75", "AP50_cat", "AP50_dog"}
    assert metrics == pytest.approx(dict.fromkeys(metrics, 1.0))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda scores, ids, boxes: (scores, 1 - ids, boxes), id="other class"),
        pytest.param(lambda scores, ids, boxes: (scores, ids, boxes * 0.1), id="elsewhere"),
        pytest.param(lambda scores, ids, boxes: (scores[:0], ids[:0], boxes[:0]), id="nothing found"),
        pytest.param(lambda scores, ids, boxes: (scores * np.nan, ids, boxes), id="nan"),
    ],
)
def test_wrong_answers_have_none(change: Callable[[Array, Array, Array], tuple[Array, Array, Array]]) -> None:
    metrics = evaluate(detector(change), OBJECTS)
    assert metrics == pytest.approx(dict.fromkeys(metrics, 0.0))
    assert "AP" in metrics


def test_wide_boxes_pass_the_low_thresholds_only() -> None:
    def widen(scores: Array, ids: Array, boxes: Array) -> tuple[Array, Array, Array]:
        wider = boxes.copy()
        wider[:, 2] = boxes[:, 0] + (boxes[:, 2] - boxes[:, 0]) / 0.63  # an IoU of 0.63: over 0.5, 0.55 and 0.6
        return scores, ids, wider

    metrics = evaluate(detector(widen), OBJECTS)
    assert (metrics["AP50"], metrics["AP75"], metrics["AP"]) == pytest.approx((1, 0, 0.3))


def test_class_without_objects_is_left_out() -> None:
    data = DetectionData(
        "objects", "test", ("cat", "dog"), ["0"], [png(100, 50, 0)], [np.array([0])], [OBJECTS.boxes[0][:1]]
    )
    metrics = evaluate(detector(lambda scores, ids, boxes: (scores[:1], ids[:1], boxes[:1])), data)
    assert metrics["AP"] == pytest.approx(1)
    assert "AP50_dog" not in metrics


def test_other_labels() -> None:
    predictor = Classifier(classifier(one_hot).network, CLASSIFICATION, ("x",) * 8)
    with pytest.raises(DataError, match="pictures: labels: expected 8, found 8; the first that differs is number 0"):
        evaluate(predictor, PICTURES)


def test_other_task() -> None:
    predictor = Classifier(classifier(one_hot).network, CLASSIFICATION, OBJECTS.labels)
    with pytest.raises(DataError, match="expected data for Classifier, found DetectionData"):
        evaluate(predictor, OBJECTS)
