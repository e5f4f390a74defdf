"""Heat maps highlight the evidence for an answer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.errors import ParameterError
from vitrine.bundle.explaining import (
    ClassificationExplainer,
    DetectionExplainer,
    draw_explanation,
    make_explainer,
    overlay,
)
from vitrine.bundle.loading import load_bundle, load_explain_network, read_manifest
from vitrine.bundle.manifest import ClassificationPreprocessing, Explanation, TensorSpec
from vitrine.bundle.predictors import Classifier
from vitrine.models.training.data.layouts import load_split

PREPROCESSING = ClassificationPreprocessing(input_size=(16, 24), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Corner:
    """A network whose probability of "bright" is the brightness of the patch in row 2, column 3."""

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        bright = inputs["pixels"][:, 8:, 16:].mean(axis=(1, 2, 3)) / 255
        return [np.stack((1 - bright, bright), axis=1).astype(np.float32)]


def test_occlusion_highlights_the_evidence() -> None:
    classifier = Classifier(Corner(), PREPROCESSING, ("dark", "bright"))
    explainer = make_explainer(classifier, Explanation(method="occlusion", patch_size=8), None)
    assert isinstance(explainer, ClassificationExplainer)
    image = Image.new("RGB", (24, 16), "white")
    found = explainer.explain(image)
    assert (found.prediction.label, found.prediction.probability) == ("bright", 1.0)
    np.testing.assert_allclose(found.heatmap, [[0, 0, 0], [0, 0, 0.5]], atol=0.01)
    np.testing.assert_array_equal(found.pixels, np.asarray(image))
    assert explainer.explain(image, class_id=0).heatmap.max() == 0  # hiding it makes "dark" more probable
    with pytest.raises(ParameterError, match="class_id: expected an integer from 0 to 1, found 2"):
        explainer.explain(image, class_id=2)


def test_occlusion_runs_in_batches_of_bounded_size() -> None:
    sizes = []

    def network(**inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        sizes.append(len(inputs["pixels"]))
        return Corner()(**inputs)

    classifier = Classifier(network, PREPROCESSING, ("dark", "bright"))
    explainer = make_explainer(classifier, Explanation(method="occlusion", patch_size=2), None)
    assert isinstance(explainer, ClassificationExplainer)
    heat = explainer.explain(Image.new("RGB", (24, 16), "white")).heatmap
    np.testing.assert_allclose(heat[4:, 8:], np.full((4, 4), 0.5 / 16), atol=0.001)
    assert heat.sum() == pytest.approx(0.5, abs=0.01)
    assert sizes == [1, 32, 32, 32]


def test_class_activation_maps_keep_evidence_for_the_class() -> None:
    activation = np.array([[[[1, -2]], [[-3, 4]]]], np.float32)  # [1, 2 classes, 1, 2]

    def network(**inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        return [np.array([[0.3, 0.7]], np.float32), activation]

    shapes = {"probabilities": ("batch", 2), "activation": ("batch", 2, 1, 2)}
    outputs = tuple(TensorSpec(name=name, datatype="FP32", shape=shape) for name, shape in shapes.items())
    explanation = Explanation(method="class-activation", outputs=outputs)
    explainer = make_explainer(Classifier(network, PREPROCESSING, ("dark", "bright")), explanation, network)
    assert isinstance(explainer, ClassificationExplainer)
    image = Image.new("RGB", (24, 16))
    best, other = explainer.explain(image), explainer.explain(image, class_id=0)
    assert (best.prediction.label, best.heatmap.tolist()) == ("bright", [[0, 4]])
    assert (other.prediction.label, other.heatmap.tolist()) == ("dark", [[1, 0]])


def test_explains_a_classifier(tiny_bundles: Path, colours: Path) -> None:
    path = tiny_bundles / "colours" / "1"
    bundle, manifest = load_bundle(path), read_manifest(path)
    assert manifest.explanation is not None
    explainer = make_explainer(bundle.predictor, manifest.explanation, load_explain_network(path))
    assert isinstance(explainer, ClassificationExplainer)
    image = load_split(colours, manifest.task, "test").image(0)
    found = explainer.explain(image)
    assert isinstance(bundle.predictor, Classifier)
    best = bundle.predictor.classify(image)[0]
    assert found.prediction.label == best.label
    assert found.prediction.probability == pytest.approx(best.probability, abs=1e-5)
    assert found.heatmap.shape == (4, 4)
    assert found.heatmap.sum() == pytest.approx(1, abs=1e-5)
    drawn, lines = draw_explanation(explainer, image)
    assert drawn.size == (896, 448)
    assert lines == [f"{best.label} {best.probability:.1%}"]


def test_explains_a_detector(tiny_bundles: Path, squares: Path) -> None:
    path = tiny_bundles / "squares" / "1"
    bundle, manifest = load_bundle(path), read_manifest(path)
    assert manifest.explanation is not None
    explainer = make_explainer(bundle.predictor, manifest.explanation, load_explain_network(path))
    assert isinstance(explainer, DetectionExplainer)
    image = load_split(squares, manifest.task, "test").image(0)
    found = explainer.explain(image, threshold=0.0, max_detections=5)
    expected = bundle.predictor.detect(image, threshold=0.0, max_detections=5)
    assert [entry.detection for entry in found] == expected
    for entry in found:
        assert entry.heatmap.shape == (8, 9)  # of 8 pixels each: the image of 72 x 80 is resized to 64 x 71
        assert entry.heatmap.sum() == pytest.approx(1, abs=1e-5)
    assert explainer.explain(image, threshold=1.0) == []
    with pytest.raises(ParameterError, match="threshold"):
        explainer.explain(image, threshold=2.0)
    assert draw_explanation(explainer, image)[0].width == 2 * round(80 * 448 / 72)


def test_overlay_leaves_cold_regions_unchanged() -> None:
    image = Image.new("RGB", (40, 40), (0, 128, 255))
    heat = np.zeros((4, 4), np.float32)
    assert overlay(image, heat).tobytes() == image.tobytes()
    heat[0, 0] = 3
    hot = np.asarray(overlay(image, heat)).astype(int)
    assert (hot[-10:, -10:] == np.asarray(image)[-10:, -10:]).all()
    assert hot[0, 0, 0] > 100 > hot[0, 0, 0] - hot[0, 0, 1]
