"""Metrics of predictors whose networks are functions of arrays."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing
from vitrine.bundle.predictors import Classifier, Detector
from vitrine.models.training.data.dataset import ClassificationData, DetectionData
from vitrine.models.training.errors import DataError
from vitrine.models.training.evaluation.metrics import (
    ClassificationPredictions,
    Confusion,
    DetectionPredictions,
    average_precision,
    confusion_matrix,
    confusion_text,
    evaluate,
    is_metric,
    measure,
    merge,
    most_confused,
    predict,
    summarize_precision,
)

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
    """A classifier of images whose grey value is their class: `answer` maps the true classes to the output."""

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
    metrics = evaluate(classifier(answer), PICTURES)
    assert metrics.keys() == {"top1", "top5", "ECE", "NLL"}
    assert (metrics["top1"], metrics["top5"]) == pytest.approx((top1, top5), abs=0.021)


def test_a_perfect_network_has_no_error_and_no_loss() -> None:
    metrics = evaluate(classifier(one_hot), PICTURES)
    assert (metrics["ECE"], metrics["NLL"]) == (0, 0)


def test_the_loss_of_a_network_that_knows_nothing_is_the_logarithm_of_the_classes() -> None:
    metrics = evaluate(classifier(lambda ids: np.full((len(ids), 8), 1 / 8, np.float32)), PICTURES)
    assert metrics["NLL"] == pytest.approx(np.log(8))
    assert metrics["ECE"] == pytest.approx(0.005)  # 13 of 100 are of class a, which is answered with 12.5 %


def test_a_constant_network_is_no_better_than_chance() -> None:
    predictor = classifier(lambda ids: np.full((len(ids), len(LABELS)), 1 / 8, np.float32))
    assert evaluate(predictor, PICTURES)["top1"] <= 0.13


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 70, 99])
def test_a_probability_that_is_not_finite_is_an_error_in_any_batch(at: int, broken: float) -> None:
    numbers = iter(range(100))

    def answer(ids: Array) -> Array:
        rows = one_hot(ids)
        rows[[next(numbers) == at for _ in ids], 3] = broken
        return rows

    with pytest.raises(DataError, match="not finite"):
        predict(classifier(answer), PICTURES, batch=8)


def test_a_classifier_computes_64_images_at_once_and_a_detector_one() -> None:
    sizes: list[int] = []

    def answer(ids: Array) -> Array:
        sizes.append(len(ids))
        return one_hot(ids)

    predicted = predict(classifier(answer), PICTURES)
    assert 0 <= predicted.seconds < 60
    found = predict(detector(lambda *objects: (sizes.append(1), *objects)[1:]), OBJECTS)
    assert 0 <= found.seconds < 60
    assert sizes == [64, 36, 1, 1, 1, 1]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(("options", "shown"), [({}, True), ({"progress": True}, True), ({"progress": False}, False)])
def test_progress_is_shown_in_a_terminal(
    terminal: bool, options: dict[str, bool], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    predict(classifier(one_hot), PICTURES, **options)
    printed = sys.stderr.getvalue()
    assert ("evaluate" in printed, "0/100" in printed) == (shown and terminal,) * 2


class Counted(list[bytes]):
    """Encoded images that count how many were read."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        return super().__getitem__(index)


def test_images_are_read_a_little_ahead_only() -> None:
    """Two batches, or two images per thread, of at most eight threads."""
    images = Counted(png(4, 4, i % 8) for i in range(100))
    data = replace(PICTURES, encoded=images)
    batches = iter(range(100))

    def answer(ids: Array) -> Array:
        assert images.read <= 2 * 16 + 16 * next(batches)
        return one_hot(ids)

    predict(classifier(answer), data, batch=16)
    assert images.read == 100
    images.read, images[0] = 0, b"no image"
    with pytest.raises(DataError):
        predict(classifier(answer), data, batch=16)
    assert images.read <= 2 * 16


def share_that_classify_gets_right(predictor: Classifier) -> float:
    images = [Image.open(io.BytesIO(encoded)).convert("RGB") for encoded in PICTURES.encoded]
    best = [predictor.classify(image, top_k=1)[0].class_id for image in images]
    return float(np.mean(np.array(best) == CLASS_IDS))


def test_top1_is_how_often_classify_is_right() -> None:
    random = np.random.default_rng(0).random((len(LABELS), len(LABELS)), dtype=np.float32)
    predictor = classifier(lambda ids: random[ids])
    assert evaluate(predictor, PICTURES)["top1"] == pytest.approx(share_that_classify_gets_right(predictor))


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_rank_is_the_position_in_the_sorted_classes(seed: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    probabilities = random.integers(0, 4, (20, classes)).astype(np.float32) / 4  # with many equals
    class_ids = random.integers(0, classes, 20)
    labels = tuple(map(str, range(classes)))
    data = ClassificationData("d", "test", labels, [""] * 20, [b""] * 20, class_ids)
    order = np.argsort(-probabilities, axis=1, kind="stable")  # as `Classifier.classify` orders them
    rank = (order == class_ids[:, None]).argmax(axis=1)
    metrics = measure(ClassificationPredictions(np.arange(20), probabilities, 1.0), data)
    assert (metrics["top1"], metrics["top5"]) == ((rank < 1).mean(), (rank < 5).mean())


def noisy(class_ids: Array) -> Array:
    random = np.random.default_rng(5).random((len(LABELS), len(LABELS)), dtype=np.float32)
    return (random / random.sum(axis=1, keepdims=True))[class_ids]


@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("batch", [1, 5, 64, 1000])
def test_shares_of_the_images_add_up_to_all_of_them(parts: int, batch: int) -> None:
    predictor = classifier(noisy)
    whole = predict(predictor, PICTURES)
    shares = [predict(predictor, PICTURES, np.arange(i, 100, parts), batch=batch, progress=False) for i in range(parts)]
    joined = merge(shares[::-1])
    assert isinstance(whole, ClassificationPredictions)
    assert isinstance(joined, ClassificationPredictions)
    np.testing.assert_array_equal(joined.indices, np.arange(100))
    np.testing.assert_array_equal(joined.probabilities, whole.probabilities)
    assert joined.seconds == max(share.seconds for share in shares)
    assert measure(joined, PICTURES) == measure(whole, PICTURES)


def test_more_processes_than_images() -> None:
    predictor, data = classifier(noisy), PICTURES.subset(np.arange(2))
    shares = [predict(predictor, data, np.arange(rank, 2, 4)) for rank in range(4)]
    assert measure(merge(shares), data) == evaluate(predictor, data)


def test_an_image_counts_once() -> None:
    part = predict(classifier(noisy), PICTURES, np.arange(3))
    with pytest.raises(ValueError, match="every image once"):
        merge([part, part])


def test_predictions_of_one_task_only() -> None:
    exact = predict(detector(lambda scores, ids, boxes: (scores, ids, boxes)), OBJECTS, np.arange(2, 4))
    with pytest.raises(ValueError, match="one task, found 1 and 1"):
        merge([predict(classifier(noisy), PICTURES, np.arange(2)), exact])
    with pytest.raises(ValueError, match="one task, found 0 and 0"):
        merge([])
    with pytest.raises(DataError, match="expected data for DetectionPredictions, found ClassificationData"):
        measure(exact, PICTURES)


def test_no_images_have_no_metrics() -> None:
    with pytest.raises(DataError, match="pictures: test has no images to measure with"):
        measure(predict(classifier(noisy), PICTURES, np.arange(0)), PICTURES)


def test_a_broken_image_is_named() -> None:
    encoded = [*PICTURES.encoded[:70], b"no image", *PICTURES.encoded[71:]]
    broken = ClassificationData("pictures", "test", LABELS, [f"{i}.png" for i in range(100)], encoded, CLASS_IDS)
    with pytest.raises(DataError, match=r"70\.png: "):
        evaluate(classifier(noisy), broken)


def test_confusion() -> None:
    """A network that predicts c for every b, and b for half of a's images."""
    seen = iter(range(100))

    def answer(ids: Array) -> Array:
        taken = [2 if i == 1 else 1 if i == 0 and next(seen) % 2 else int(i) for i in ids]
        return one_hot(np.array(taken))

    predictions = predict(classifier(answer), PICTURES)
    assert isinstance(predictions, ClassificationPredictions)
    matrix = confusion_matrix(predictions, PICTURES)
    assert matrix.sum() == 100
    assert (matrix[0, :2].tolist(), matrix[1, 1:3].tolist(), matrix[7, 7]) == ([7, 6], [0, 13], 12)
    assert most_confused(matrix, LABELS) == [Confusion("b", "c", 13, 1.0), Confusion("a", "b", 6, 6 / 13)]
    lines = confusion_text(matrix, LABELS).splitlines()
    assert lines[0].split() == list(LABELS)
    assert lines[2].split() == ["b", "0", "0", "13", "0", "0", "0", "0", "0"]


def test_a_confusion_matrix_is_printed_in_columns() -> None:
    matrix = np.array([[5, 0], [1, 1234567]])
    assert confusion_text(matrix, ["a", "a label of 23 characters"]).splitlines() == [
        "                           a a label",
        "a                          5       0",
        "a label of 23 charac       1 1234567",
    ]
    assert confusion_text(np.eye(12, dtype=np.int64), LABELS[:1] * 12).splitlines()[1] == "a" + "     1" + "     0" * 11
    assert confusion_text(np.eye(13, dtype=np.int64), LABELS[:1] * 13) == " count   share  true class as answered"


@pytest.mark.parametrize(("given", "expected"), [((), 10), ((3,), 3), ((200,), 90)])
def test_the_most_frequent_confusions_come_first(given: tuple[int, ...], expected: int) -> None:
    matrix = np.arange(100).reshape(10, 10)
    matrix[0, 0] = 10**6
    matrix[np.diag_indices(10)] += 1
    confused = most_confused(matrix, [f"label {i}" for i in range(10)], *given)
    counts = sorted(matrix[~np.eye(10, dtype=bool)].tolist(), reverse=True)
    assert [pair.count for pair in confused] == counts[:expected]
    assert confused[0] == Confusion("label 9", "label 8", 98, 98 / matrix[9].sum())


def test_confusion_of_many_classes_shows_the_largest_entries() -> None:
    matrix = np.diag(np.full(300, 10)) + 3 * np.eye(300, k=1, dtype=np.int64)
    matrix[4, 9] = 8
    lines = confusion_text(matrix, [f"label {i}" for i in range(300)]).splitlines()
    assert lines[1].split() == ["8", "38.1%", "label", "4", "as", "label", "9"]
    assert len(lines) == 16


def test_metrics_are_distinguished_from_loss_terms() -> None:
    names = {**evaluate(classifier(noisy), PICTURES)}
    names |= evaluate(detector(lambda scores, ids, boxes: (scores, ids, boxes)), OBJECTS)
    assert all(map(is_metric, names))
    assert not any(map(is_metric, ("epoch", "loss", "class", "l1", "giou", "lr", "seconds")))


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
    """A detector whose answers are the true objects (scores, class ids and boxes in fractions) after a change."""

    def network(**inputs: Array) -> Sequence[Array]:
        image = int(inputs["pixels"][0, 0, 0, 0])
        boxes = OBJECTS.boxes[image] / np.array(SIZES[image] * 2, np.float32)
        scores = np.linspace(0.9, 0.8, len(boxes), dtype=np.float32)
        return [output[None] for output in change(scores, OBJECTS.class_ids[image], boxes)]

    return Detector(network, DETECTION, OBJECTS.labels)


def test_exact_boxes_have_an_average_precision_of_one() -> None:
    metrics = evaluate(detector(lambda scores, ids, boxes: (scores, ids, boxes)), OBJECTS)
    assert metrics.keys() >= {"AP", "AP50", "AP75", "AP_cat", "AP50_cat", "AP_dog", "AP50_dog"}
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
def test_wrong_detections_have_no_average_precision(
    change: Callable[[Array, Array, Array], tuple[Array, Array, Array]],
) -> None:
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


@pytest.mark.parametrize("batch", [1, 3])
def test_shares_of_objects_add_up_to_all_of_them(batch: int) -> None:
    predictor = sorted_detector()
    whole = predict(predictor, OBJECTS)
    joined = merge([predict(predictor, OBJECTS, np.array(share), batch=batch) for share in ([3, 1], [0, 2])])
    assert isinstance(whole, DetectionPredictions)
    assert isinstance(joined, DetectionPredictions)
    for name in ("indices", "image", "scores", "class_ids", "boxes"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name), err_msg=name)
    assert measure(joined, OBJECTS) == measure(whole, OBJECTS)


def sorted_detector() -> Detector:
    """A detector with always three boxes per image, so that images can be batched."""

    def network(**inputs: Array) -> Sequence[Array]:
        grey = inputs["pixels"][:, 0, 0, 0].astype(np.float32)[:, None]
        scores = np.array([[0.9, 0.5, 0.7]], np.float32) - 0.1 * grey
        boxes = np.stack([np.full((len(grey), 3), x, np.float32) for x in (0.1, 0.1, 0.5, 0.9)], axis=-1)
        return [scores, np.tile([0, 1, 1], (len(grey), 1)), boxes]

    return Detector(network, DETECTION, OBJECTS.labels)


def test_metrics_of_a_part_do_not_depend_on_the_rest() -> None:
    """The detector finds all objects of the first image and none of the others."""

    def change(scores: Array, ids: Array, boxes: Array) -> tuple[Array, Array, Array]:
        return (scores, ids, boxes) if len(boxes) == 2 else (scores[:0], ids[:0], boxes[:0])

    predictor = detector(change)
    assert measure(predict(predictor, OBJECTS, np.array([0])), OBJECTS)["AP"] == pytest.approx(1)
    assert evaluate(predictor, OBJECTS)["AP"] < 0.6
    with pytest.raises(DataError, match="no boxes to measure with"):
        measure(predict(predictor, OBJECTS, np.array([2])), OBJECTS)


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_average_precision_by_area(size: str) -> None:
    """Objects below 32² pixels are small, those above 96² large."""
    edges = {"small": 31, "medium": 33, "large": 97}
    boxes = np.array([[0, 0, edge, edge] for edge in edges.values()], np.float32) + np.array([[0], [100], [200]])
    data = replace(
        OBJECTS, encoded=[png(300, 300, 0)], names=["0"], class_ids=[np.zeros(3, int)], boxes=[boxes.astype(np.float32)]
    )

    def network(**inputs: Array) -> Sequence[Array]:
        box = boxes[list(edges).index(size)] / 300
        return [np.float32([[0.9]]), np.array([[0]]), box[None, None].astype(np.float32)]

    metrics = evaluate(Detector(network, DETECTION, data.labels), data)
    found = {name: metrics[f"AP_{name}"] for name in edges}
    assert found == pytest.approx({name: float(name == size) for name in edges})


def test_precision_is_averaged_over_thresholds_recalls_labels_and_areas() -> None:
    precision = np.full((10, 101, 2, 4), -1.0)
    precision[..., 0, 0] = np.linspace(1, 0.1, 10)[:, None]  # 1 at an IoU of 0.5, 0.5 at 0.75
    precision[..., 1, 0] = precision[..., 0, 0] / 2
    precision[..., 0, 2] = 0.4
    found = summarize_precision(precision)
    areas = {"AP_small": -1, "AP_medium": 0.4, "AP_large": -1}
    assert found.summary == pytest.approx({"AP": 0.75 * 0.55, "AP50": 0.75, "AP75": 0.375, **areas})
    assert found.by_class.tolist() == pytest.approx([0.55, 0.275])
    assert found.by_class_50.tolist() == pytest.approx([1, 0.5])
    assert found.precision_50.tolist() == precision[0, ..., 0].tolist()


def test_a_hundred_detections_count_in_each_image() -> None:
    boxes = np.float32([[8 * i, 0, 8 * i + 8, 50] for i in range(12)])
    data = replace(OBJECTS, encoded=[png(96, 50, 0)], names=["0"], class_ids=[np.zeros(12, int)], boxes=[boxes])

    def network(**inputs: Array) -> Sequence[Array]:
        found = np.concatenate([boxes / np.float32([96, 50, 96, 50]), np.zeros((138, 4), np.float32)])
        return [np.linspace(1, 0, 150, dtype=np.float32)[None], np.zeros((1, 150), int), found[None]]

    predictions = predict(Detector(network, DETECTION, data.labels), data)
    assert isinstance(predictions, DetectionPredictions)
    assert len(predictions.scores) == 100
    assert measure(predictions, data)["AP"] == pytest.approx(1)


def test_a_label_named_like_an_area_keeps_its_own_value() -> None:
    data = replace(OBJECTS, labels=("small", "dog"))
    half = detector(lambda scores, ids, boxes: (scores[ids == 0], ids[ids == 0], boxes[ids == 0]))
    metrics = evaluate(Detector(half.network, DETECTION, data.labels), data)
    assert (metrics["AP_label_small"], metrics["AP50_small"], metrics["AP_dog"]) == pytest.approx((1, 1, 0))


def test_curves_fall_from_the_first_recall_to_the_last() -> None:
    predictions = predict(sorted_detector(), OBJECTS)
    assert isinstance(predictions, DetectionPredictions)
    measured = average_precision(predictions, OBJECTS)
    assert measured.precision_50.shape == (101, 2)
    assert (np.diff(measured.precision_50, axis=0) <= 0).all()
    np.testing.assert_allclose(measured.precision_50.mean(axis=0), measured.by_class_50)


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
