"""The predictors with small hand-made ONNX graphs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from PIL import Image

from vitrine.bundle.errors import ParameterError
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing
from vitrine.bundle.predictors import Classifier, Detector, make_predictor
from vitrine.bundle.runtime import OnnxNetwork

CHANNELS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
CLASSIFICATION = ClassificationPreprocessing(input_size=(8, 8), **CHANNELS)
DETECTION = DetectionPreprocessing(shortest_edge=16, longest_edge=32, **CHANNELS)
PIXELS = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", "height", "width", 3])


def network(
    file: Path,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    **constants: np.ndarray,
) -> OnnxNetwork:
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    return OnnxNetwork(file)


@pytest.fixture
def classifier(tmp_path: Path) -> Classifier:
    """Returns the share of each channel in the total intensity: red, green, blue."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "edges"], ["mean"], keepdims=0),
        helper.make_node("ReduceSum", ["mean", "channels"], ["sum"], keepdims=1),
        helper.make_node("Div", ["mean", "sum"], ["probabilities"]),
    ]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])]
    constants = {"edges": np.array([1, 2]), "channels": np.array([1])}
    graph = network(tmp_path / "classifier.onnx", nodes, [PIXELS], outputs, **constants)
    return Classifier(graph, CLASSIFICATION, ("red", "green", "blue"))


SCORES = np.array([[0.3, 0.9, 0.5, 0.5, 0.0]], np.float32)
CLASS_IDS = np.array([[1, 0, 1, 0, 1]])
BOXES = np.array(
    [[[0, 0, 1, 1], [0.25, 0.5, 0.75, 1], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 0.1, 0.1]]], np.float32
)


@pytest.fixture
def detector(tmp_path: Path) -> Detector:
    """Returns the same five boxes for any image."""
    nodes = [
        helper.make_node("Cast", ["sizes"], ["float_sizes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float_sizes", "zero"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["fixed_scores", "nothing"], ["scores"]),
        helper.make_node("Identity", ["fixed_ids"], ["class_ids"]),
        helper.make_node("Identity", ["fixed_boxes"], ["boxes"]),
    ]
    sizes = helper.make_tensor_value_info("sizes", TensorProto.INT64, ["batch", 2])
    outputs = [
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 5]),
        helper.make_tensor_value_info("class_ids", TensorProto.INT64, [1, 5]),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 5, 4]),
    ]
    constants = {"fixed_scores": SCORES, "fixed_ids": CLASS_IDS, "fixed_boxes": BOXES, "zero": np.float32([0])}
    graph = network(tmp_path / "detector.onnx", nodes, [PIXELS, sizes], outputs, **constants)
    return Detector(graph, DETECTION, ("cell", "platelet"))


def test_most_probable_first(classifier: Classifier) -> None:
    found = classifier.classify(Image.new("RGB", (20, 30), (50, 100, 150)))
    assert [prediction.label for prediction in found] == ["blue", "green", "red"]
    assert [prediction.class_id for prediction in found] == [2, 1, 0]
    assert [prediction.probability for prediction in found] == pytest.approx([1 / 2, 1 / 3, 1 / 6])


@pytest.mark.parametrize(("top_k", "expected"), [(1, 1), (2, 2), (3, 3), (1000, 3)])
def test_top_k(classifier: Classifier, top_k: int, expected: int) -> None:
    assert len(classifier.classify(Image.new("RGB", (8, 8), "white"), top_k=top_k)) == expected


def test_ties_keep_the_order_of_the_labels(classifier: Classifier) -> None:
    found = classifier.classify(Image.new("RGB", (8, 8), "white"))
    assert [prediction.label for prediction in found] == ["red", "green", "blue"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_batch_gives_the_answers_of_single_images(classifier: Classifier, count: int) -> None:
    images = [Image.new("RGB", (5 + i, 9), (10 * i, 20, 30)) for i in range(count)]
    batch = classifier.probabilities(images)
    assert (batch.shape, batch.dtype) == ((count, 3), np.float32)
    for image, row in zip(images, batch, strict=True):
        np.testing.assert_array_equal(classifier.probabilities([image])[0], row)
    rows = classifier.infer([classifier.prepare(image) for image in images])
    np.testing.assert_array_equal([probabilities for (probabilities,) in rows], batch)


@pytest.mark.parametrize("labels", [None, [], ["red"], ["red", "green"], ["red", "green", "blue"]])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_labels_select_among_the_classes(classifier: Classifier, labels: list[str] | None, top_k: int) -> None:
    image = Image.new("RGB", (8, 8), (50, 100, 150))  # red is the least probable
    every = [found for found in classifier.classify(image) if labels is None or found.label in labels]
    assert classifier.classify(image, top_k=top_k, labels=labels) == every[:top_k]


@pytest.mark.parametrize("labels", [None, [], ["platelet"], ["cell"], ["cell", "platelet"]])
@pytest.mark.parametrize("max_detections", [1, 2, 5])
def test_labels_select_among_the_objects(detector: Detector, labels: list[str] | None, max_detections: int) -> None:
    image = Image.new("RGB", (8, 8))
    every = [found for found in detector.detect(image, threshold=0) if labels is None or found.label in labels]
    found = detector.detect(image, threshold=0, max_detections=max_detections, labels=labels)
    assert found == every[:max_detections]


@pytest.mark.parametrize(
    ("label", "such_as"), [("platelets", "platelet"), ("zebra", "cell"), ("x" * 200, "cell"), ("", "cell")]
)
def test_an_unknown_label_is_refused_and_one_like_it_named(
    classifier: Classifier, detector: Detector, label: str, such_as: str
) -> None:
    known = ("cell", "platelet", "nucleus")
    predictors = Classifier(classifier.network, CLASSIFICATION, known), Detector(detector.network, DETECTION, known)
    for predict in (predictors[0].classify, predictors[1].detect):
        with pytest.raises(ParameterError) as refused:
            predict(Image.new("RGB", (8, 8)), labels=["nucleus", label])
        assert str(refused.value) == (
            f"labels: expected some of the model's 3 labels, such as {such_as!r}, found {label[:100]!r}"
        )


def test_five_classes_and_a_hundred_objects_by_default() -> None:
    labels = tuple(f"label {i}" for i in range(150))

    def classes(**inputs: np.ndarray) -> list[np.ndarray]:
        return [np.linspace(0, 1, 150, dtype=np.float32)[None]]

    def objects(**inputs: np.ndarray) -> list[np.ndarray]:
        return [np.full((1, 150), 0.5, np.float32), np.arange(150)[None], np.zeros((1, 150, 4), np.float32)]

    image = Image.new("RGB", (8, 8))
    assert len(Classifier(classes, CLASSIFICATION, labels).classify(image)) == 5
    assert len(Detector(objects, DETECTION, labels).detect(image)) == 100


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_rejected(classifier: Classifier, top_k: int) -> None:
    with pytest.raises(ParameterError, match=f"top_k: expected an integer of at least 1, found {top_k}"):
        classifier.classify(Image.new("RGB", (8, 8)), top_k=top_k)


def test_highest_score_first_in_pixels_of_the_image(detector: Detector) -> None:
    found = detector.detect(Image.new("RGB", (200, 100)))
    assert [detection.score for detection in found] == pytest.approx([0.9, 0.5, 0.5])
    assert [detection.label for detection in found] == ["cell", "platelet", "cell"]  # the tie stays in query order
    box = found[0].box
    assert (box.x_min, box.y_min, box.x_max, box.y_max) == (50, 50, 150, 100)


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 5), (0.3, 4), (0.31, 3), (0.5, 3), (0.9, 1), (0.91, 0), (1, 0)])
def test_threshold(detector: Detector, threshold: float, count: int) -> None:
    """A score equal to the threshold (as float32) passes."""
    found = detector.detect(Image.new("RGB", (10, 10)), threshold=float(np.float32(threshold)))
    assert len(found) == count


@pytest.mark.parametrize("max_detections", [1, 2, 5, 100])
def test_max_detections(detector: Detector, max_detections: int) -> None:
    everything = detector.detect(Image.new("RGB", (10, 10)), threshold=0)
    found = detector.detect(Image.new("RGB", (10, 10)), threshold=0, max_detections=max_detections)
    assert found == everything[:max_detections]


@pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan"), float("inf"), -float("inf")])
def test_threshold_outside_its_range(detector: Detector, threshold: float) -> None:
    with pytest.raises(ParameterError, match="threshold: expected a number from 0 to 1, found"):
        detector.detect(Image.new("RGB", (10, 10)), threshold=threshold)


@pytest.mark.parametrize("max_detections", [0, -5])
def test_max_detections_outside_its_range(detector: Detector, max_detections: int) -> None:
    with pytest.raises(ParameterError, match="max_detections: expected an integer of at least 1, found"):
        detector.detect(Image.new("RGB", (10, 10)), max_detections=max_detections)


def test_a_padded_batch_gives_the_answers_of_single_images() -> None:
    """The box of this detector depends on the mean of the valid pixels, so that padding would change it."""

    def network(**inputs: np.ndarray) -> list[np.ndarray]:
        pixels, sizes = inputs["pixels"], inputs["sizes"]
        light = pixels.sum(axis=(1, 2, 3)) / sizes.prod(axis=1) / (3 * 255)
        boxes = np.stack([np.zeros_like(light), np.zeros_like(light), light, light], axis=-1)[:, None]
        return [light[:, None].astype(np.float32), np.zeros((len(light), 1), np.int64), boxes.astype(np.float32)]

    detector = Detector(network, DETECTION, ("light", "dark"))
    sizes = ((40, 30), (16, 32), (100, 20))
    images = [Image.new("RGB", size, (grey,) * 3) for size, grey in zip(sizes, (50, 100, 150), strict=True)]
    prepared = [detector.prepare(image) for image in images]
    assert [(image.width, image.height) for image in prepared] == list(sizes)
    together = detector.predict(prepared, threshold=0.0, max_detections=100)
    assert together == [detector.detect(image, threshold=0.0) for image in images]
    assert [found[0].box.x_max / width for found, (width, _) in zip(together, sizes, strict=True)] == pytest.approx(
        [50 / 255, 100 / 255, 150 / 255], abs=0.01
    )


def test_make_predictor_selects_by_preprocessing(classifier: Classifier, detector: Detector) -> None:
    assert type(make_predictor(classifier.network, CLASSIFICATION, "abc")) is Classifier
    assert type(make_predictor(detector.network, DETECTION, "ab")) is Detector
