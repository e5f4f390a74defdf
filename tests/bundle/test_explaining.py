"""Heat maps highlight the evidence for an answer, at its place in the image."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitrine.bundle.errors import ParameterError
from vitrine.bundle.explaining import (
    Explainer,
    Method,
    Occlusion,
    Point,
    Question,
    default_question,
    methods_of,
    read_explanation,
)
from vitrine.bundle.images import classification_box
from vitrine.bundle.loading import load_bundle, load_explain_network, load_file
from vitrine.bundle.manifest import (
    ClassificationPreprocessing,
    DetectionPreprocessing,
    Explanation,
    Manifest,
    Preprocessing,
    Task,
    TensorSpec,
)
from vitrine.bundle.predictors import Classifier, Detection, Detector, Network, Prediction, PreparedImage
from vitrine.models.training.data.layouts import load_split

HALF = (0.5, 0.5, 0.5)
PIXELS = ClassificationPreprocessing(input_size=(16, 24), mean=HALF, std=HALF)
BOXES = DetectionPreprocessing(shortest_edge=32, longest_edge=64, mean=HALF, std=HALF)
LABELS = ("dark", "bright")


@pytest.fixture
def manifest_of(tiny_bundles: Path) -> Callable[..., Manifest]:
    """Make a manifest with an explanation."""

    def make(preprocessing: Preprocessing, **shapes: tuple[int | str, ...]) -> Manifest:
        task = Task(preprocessing.task)
        name = {Task.CLASSIFICATION: "colours", Task.DETECTION: "squares"}[task]
        base = load_bundle(tiny_bundles / name / "1").manifest
        assert isinstance(base, Manifest)
        outputs = tuple(TensorSpec(name=name, datatype="FP32", shape=shape) for name, shape in shapes.items())
        method = "class-activation" if "activation" in shapes else "attention"
        explanation = Explanation(method=method, outputs=outputs) if outputs else None
        return base.model_copy(
            update={"preprocessing": preprocessing, "labels": LABELS, "task": task, "explanation": explanation}
        )

    return make


def answering(*outputs: NDArray[np.generic]) -> Network:
    """A network that always answers the same."""
    return lambda **inputs: [output[None] for output in outputs]


class Corner:
    """A network whose probability of "bright" is the brightness of the patch in row 2, column 3."""

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        bright = inputs["pixels"][:, 8:, 16:].mean(axis=(1, 2, 3)) / 255
        return [np.stack((1 - bright, bright), axis=1).astype(np.float32)]


class Finder:
    """A detector of one bright box on black, which scores by its area; its other answer is of another class."""

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        scores, boxes = [], []
        for pixels, (height, width) in zip(inputs["pixels"], inputs["sizes"], strict=True):
            grey = pixels[:height, :width].mean(axis=-1)
            rows, columns = np.nonzero(grey > 150)
            found = len(rows) > 0
            corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if found else (0, 0, 1, 1)
            scores.append([len(rows) / (height * width) ** 0.5 / 16 if found else 0.0, 0.7])
            boxes.append([np.array(corners) / (width, height, width, height), [0.0, 0.0, 1.0, 1.0]])
        class_ids = np.tile([1, 0], (len(scores), 1))
        return [np.array(scores, np.float32), class_ids, np.array(boxes, np.float32)]


def test_methods_follow_the_outputs_of_the_explain_graph(tiny_bundles: Path) -> None:
    vit, detr = (load_bundle(tiny_bundles / name / "1").manifest for name in ("colours", "squares"))
    assert methods_of(vit) == ("attention-rollout", "class-attention", "occlusion")
    assert methods_of(detr) == ("cross-attention", "occlusion", "encoder-attention")
    assert methods_of(load_file(tiny_bundles / "colours" / "1" / "model.onnx").manifest) == ("occlusion",)


def test_occlusion_highlights_the_evidence(manifest_of: Callable[..., Manifest]) -> None:
    manifest = manifest_of(PIXELS)
    explainer = Explainer(manifest, Classifier(Corner(), PIXELS, LABELS), None)
    image = Image.new("RGB", (24, 16), "white")
    (found,) = explainer.explain(image, default_question(manifest, grid=3))
    assert found.target == Prediction("bright", 1, 1.0)
    np.testing.assert_allclose(found.heatmap.values, [[0, 0, 0], [0, 0, 0.5]], atol=0.01)
    assert found.heatmap.box.xyxy() == (0, 0, 24, 16)
    (against,) = explainer.explain(image, default_question(manifest, grid=3, target=0))
    np.testing.assert_allclose(against.heatmap.values, [[0, 0, 0], [0, 0, -0.5]], atol=0.01)


@pytest.mark.parametrize("grid", [2, 7, 16])
def test_hidden_parts_cover_every_pixel_once(grid: int) -> None:
    for predictor, size in (
        (Classifier(Corner(), PIXELS, LABELS), (24, 16)),
        (Detector(Finder(), BOXES, LABELS), (61, 32)),
    ):
        image = Image.new("RGB", size, "white")
        prepared = predictor.prepare(image)
        occlusion = Occlusion(predictor, prepared, size, grid)
        assert max(occlusion.rows, occlusion.columns) == grid
        hidden = [occlusion.hide(part) for part in range(len(occlusion))]
        pixels = [part.pixels if isinstance(part, PreparedImage) else part for part in hidden]
        assert (sum((part != 255).all(axis=-1).astype(int) for part in pixels) == 1).all()


def test_occlusion_runs_in_batches_of_bounded_size(manifest_of: Callable[..., Manifest]) -> None:
    sizes = []

    def network(**inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        sizes.append(len(inputs["pixels"]))
        return Corner()(**inputs)

    manifest = manifest_of(PIXELS)
    explainer = Explainer(manifest, Classifier(network, PIXELS, LABELS), None)
    (found,) = explainer.explain(Image.new("RGB", (24, 16), "white"), default_question(manifest, grid=12))
    assert found.heatmap.values[4:, 8:].sum() == pytest.approx(0.5, abs=0.01)
    assert sizes == [1, 32, 32, 32]


@settings(deadline=None, max_examples=30)
@given(left=st.integers(0, 40), top=st.integers(0, 20))
def test_heat_of_a_detection_moves_with_the_object(left: int, top: int, tiny_bundles: Path) -> None:
    manifest = load_bundle(tiny_bundles / "squares" / "1").manifest
    explainer = Explainer(manifest, Detector(Finder(), BOXES, LABELS), None)
    image = Image.new("RGB", (61, 32))
    ImageDraw.Draw(image).rectangle((left, top, left + 11, top + 9), fill="white")
    (found,) = explainer.explain(
        image, default_question(manifest, method=Method.OCCLUSION, grid=16, labels=("bright",), threshold=0.1)
    )
    heatmap = found.heatmap
    assert isinstance(found.target, Detection)
    rows, columns = heatmap.values.shape
    row, column = np.unravel_index(int(heatmap.values.argmax()), heatmap.values.shape)
    x, y = (column + 0.5) / columns * heatmap.box.x_max, (row + 0.5) / rows * heatmap.box.y_max
    assert left - 2 <= x <= left + 14
    assert top - 2 <= y <= top + 12


def test_occlusion_compares_detections_of_the_same_class_at_the_same_place(
    manifest_of: Callable[..., Manifest],
) -> None:
    manifest = manifest_of(BOXES)
    explainer = Explainer(manifest, Detector(Finder(), BOXES, LABELS), None)
    question = default_question(manifest, grid=4, target=0)
    (found,) = explainer.explain(Image.new("RGB", (64, 32)), question)
    assert found.target.label == "dark"  # always there, with 0.7
    assert np.abs(found.heatmap.values).max() < 1e-6


def test_a_class_activation_map_is_of_the_class_that_is_asked_for(manifest_of: Callable[..., Manifest]) -> None:
    activation = np.array([[[1, -2]], [[-3, 4]]], np.float32)  # [2 classes, 1, 2]
    network = answering(np.array([0.3, 0.7], np.float32), activation)
    manifest = manifest_of(PIXELS, probabilities=("batch", 2), activation=("batch", 2, 1, 2))
    explainer = Explainer(manifest, Classifier(network, PIXELS, LABELS), network)
    image = Image.new("RGB", (48, 16))
    best, other = (explainer.explain(image, default_question(manifest, target=target))[0] for target in (None, 0))
    assert (best.target.label, best.heatmap.values.tolist()) == ("bright", [[-3, 4]])
    assert (other.target.label, other.heatmap.values.tolist()) == ("dark", [[1, -2]])
    assert best.heatmap.box.xyxy() == (12, 0, 36, 16)  # the network sees the centre


def test_class_attention_is_that_of_the_last_layer(manifest_of: Callable[..., Manifest]) -> None:
    attention = np.random.default_rng(0).random((3, 2, 2, 4), np.float32)  # [layers, heads, h, w]
    network = answering(np.array([0.3, 0.7], np.float32), attention, np.ones((2, 4), np.float32))
    shapes = {"probabilities": ("batch", 2), "attention": ("batch", 3, 2, 2, 4), "rollout": ("batch", 2, 4)}
    manifest = manifest_of(PIXELS, **shapes)
    explainer = Explainer(manifest, Classifier(network, PIXELS, LABELS), network)
    question = default_question(manifest, method=Method.CLASS_ATTENTION, heads=True)
    (found,) = explainer.explain(Image.new("RGB", (24, 16)), question)
    np.testing.assert_array_equal(found.heads, attention[-1])
    np.testing.assert_allclose(found.heatmap.values, attention[-1].mean(axis=0), rtol=1e-6)
    (rollout,) = explainer.explain(Image.new("RGB", (24, 16)), default_question(manifest))
    assert rollout.heads is None
    assert (rollout.heatmap.values == 1).all()


SHAPES = {
    "scores": ("batch", 3),
    "class_ids": ("batch", 3),
    "boxes": ("batch", 3, 4),
    "cross_attention": ("batch", 3, "rows", "columns"),
    "encoder_attention": ("batch", "r", "c", "r", "c"),
}


def attending(rows: int, columns: int) -> Network:
    """A detector of three objects, whose query i attends to cell (0, i), and cell (r, c) of the encoder to itself."""
    cross = np.zeros((3, rows, columns), np.float32)
    cross[[0, 1, 2], 0, [0, 1, 2]] = 1
    encoder = np.eye(rows * columns, dtype=np.float32).reshape(rows, columns, rows, columns)
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 1]], np.float32)
    return answering(np.array([0.6, 0.9, 0.2], np.float32), np.array([0, 1, 0]), boxes, cross, encoder)


def test_cross_attention_is_that_of_each_detections_query(manifest_of: Callable[..., Manifest]) -> None:
    network = attending(4, 8)  # 32 x 64 pixels in cells of 8
    manifest = manifest_of(BOXES, **SHAPES)
    predictor = Detector(lambda **inputs: network(**inputs)[:3], BOXES, LABELS)
    explainer = Explainer(manifest, predictor, network)
    image = Image.new("RGB", (128, 64))
    found = explainer.explain(image, default_question(manifest))
    assert [entry.target for entry in found] == predictor.detect(image)
    assert [int(entry.heatmap.values.argmax()) for entry in found] == [1, 0]  # by descending score
    assert {entry.heatmap.box.xyxy() for entry in found} == {(0, 0, 128, 64)}
    (second,) = explainer.explain(image, default_question(manifest, target=1))
    assert second.target == found[1].target
    (of_label,) = explainer.explain(image, default_question(manifest, labels=("dark",)))
    assert of_label.target == found[1].target
    assert of_label.heatmap.values.argmax() == 0
    assert len(explainer.explain(image, default_question(manifest, max_targets=1))) == 1
    assert explainer.explain(image, default_question(manifest, threshold=0.95)) == []
    with pytest.raises(
        ParameterError, match=r"target: expected an index below the number of detections, 2 at threshold=0.5"
    ):
        explainer.explain(image, default_question(manifest, target=2))


def test_encoder_attention_is_from_the_cell_of_the_point(manifest_of: Callable[..., Manifest]) -> None:
    manifest, network = manifest_of(BOXES, **SHAPES), attending(4, 8)
    predictor = Detector(lambda **inputs: network(**inputs)[:3], BOXES, LABELS)
    explainer = Explainer(manifest, predictor, network)
    image = Image.new("RGB", (128, 64))  # two pixels of the image are one of the network
    for point, cell in ((Point(0, 0), (0, 0)), (Point(127.9, 63.9), (3, 7)), (Point(40, 17), (1, 2))):
        question = default_question(manifest, method=Method.ENCODER_ATTENTION, point=point)
        (found,) = explainer.explain(image, question)
        assert found.target == point
        assert np.unravel_index(int(found.heatmap.values.argmax()), (4, 8)) == cell
    question = default_question(manifest, method=Method.ENCODER_ATTENTION, point=Point(128, 0))
    with pytest.raises(ParameterError, match="x, y: expected a pixel of the image of 128 x 64, found 128, 0"):
        explainer.explain(image, question)


@settings(deadline=None)
@given(
    height=st.integers(20, 300),
    width=st.integers(64, 300),
    stride=st.sampled_from([8, 16, 32]),
    multiple=st.sampled_from([1, 32]),
)
def test_maps_lie_where_their_cells_are(height: int, width: int, stride: int, multiple: int) -> None:
    padded = [-(-edge // multiple) * multiple for edge in (height, width)]
    rows, columns = (-(-edge // stride) for edge in padded)
    prepared = PreparedImage(np.zeros((height, width, 3), np.uint8), 2 * width, 2 * height)
    outputs = attending(rows, max(3, columns))()
    question = Question(Method.CROSS_ATTENTION, max_targets=3)
    predictor = Detector(answering(), BOXES, LABELS)
    row = [output[0][..., :columns] if output[0].ndim == 3 else output[0] for output in outputs[:4]]
    found = read_explanation(question, predictor, tuple(SHAPES)[:4], prepared, (2 * width, 2 * height), tuple(row))
    shown_rows, shown_columns = found[0].heatmap.values.shape
    assert (shown_rows - 1) * stride < height <= shown_rows * stride  # every cell has a pixel, every pixel a cell
    assert (shown_columns - 1) * stride < width <= shown_columns * stride
    box = found[0].heatmap.box
    assert box.xyxy() == pytest.approx((0, 0, 2 * shown_columns * stride, 2 * shown_rows * stride))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 2}, "target: expected a label, or a class id from 0 to 1, found 2"),
        ({"target": -1}, "target: expected a label, or a class id from 0 to 1, found -1"),
        ({"grid": 1}, "grid: expected an integer from 2 to 16, found 1"),
        ({"grid": 17}, "grid: expected an integer from 2 to 16, found 17"),
        ({"max_targets": 0}, "max_targets: expected an integer from 1 to 32, found 0"),
        ({"heads": True}, "heads: expected method=class-attention, found occlusion"),
        ({"point": Point(1, 1)}, "x, y: expected both for method=encoder-attention, none for others"),
        ({"method": Method.CROSS_ATTENTION}, "method: expected one of occlusion, found cross-attention"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    changes: dict[str, object], message: str, manifest_of: Callable[..., Manifest]
) -> None:
    manifest = manifest_of(PIXELS)
    explainer = Explainer(manifest, Classifier(Corner(), PIXELS, LABELS), None)
    with pytest.raises(ParameterError, match=message):
        explainer.explain(Image.new("RGB", (24, 16)), default_question(manifest, **changes))


@pytest.mark.parametrize("method", ["attention-rollout", "class-attention", "occlusion"])
def test_explains_a_classifier(method: str, tiny_bundles: Path, colours: Path) -> None:
    bundle = load_bundle(path := tiny_bundles / "colours" / "1")
    explainer = Explainer(bundle.manifest, bundle.predictor, load_explain_network(path))
    image = load_split(colours, Task.CLASSIFICATION, "test").image(0)
    (found,) = explainer.explain(image, default_question(bundle.manifest, method=Method(method)))
    assert isinstance(bundle.predictor, Classifier)
    assert isinstance(found.target, Prediction)
    best = bundle.predictor.classify(image)[0]
    assert found.target.label == best.label
    assert found.target.probability == pytest.approx(best.probability, abs=1e-5)
    assert found.heatmap.box.xyxy() == classification_box(*image.size, bundle.predictor.preprocessing)
    if method != "occlusion":
        assert found.heatmap.values.shape == (4, 4)
        assert found.heatmap.values.sum() == pytest.approx(1, abs=1e-5) or method == "class-attention"


@pytest.mark.parametrize("method", ["cross-attention", "encoder-attention", "occlusion"])
def test_explains_a_detector(method: str, tiny_bundles: Path, squares: Path) -> None:
    bundle = load_bundle(path := tiny_bundles / "squares" / "1")
    explainer = Explainer(bundle.manifest, bundle.predictor, load_explain_network(path))
    image = load_split(squares, Task.DETECTION, "test").image(0)
    point = Point(3, 4) if method == "encoder-attention" else None
    question = default_question(
        bundle.manifest, method=Method(method), threshold=0.0, max_targets=5, point=point, grid=3
    )
    found = explainer.explain(image, question)
    assert isinstance(bundle.predictor, Detector)
    expected = bundle.predictor.detect(image, threshold=0.0, max_detections=5)
    assert [entry.target for entry in found] == ([point] if point else expected)
    if method != "occlusion":
        for entry in found:
            assert entry.heatmap.values.shape == (8, 9)  # of 8 pixels each: the image of 72 x 80 is resized to 64 x 71
            assert entry.heatmap.values.sum() == pytest.approx(1, abs=1e-5)
