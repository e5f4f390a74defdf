"""Heat maps that explain what a network looks at.

ViT: attention rollout. Convolutional networks: class activation maps. DETR: cross-attention of each detection's query.
All of these are outputs of a bundle's explain graph (`models/explaining.py`). An MLP-Mixer has no such output; it is
explained by occlusion: mask one patch at a time and measure how much the probability drops (Zeiler & Fergus 2014,
"Visualizing and Understanding Convolutional Networks", sec. 4.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitrine.bundle.errors import ParameterError
from vitrine.bundle.manifest import Explanation
from vitrine.bundle.predictors import Classifier, Detection, Detector, Network, Prediction, Predictor

_OCCLUSION_BATCH = 32  # images per call of the network
_OPACITY = 0.6
# Evenly spaced from cold to hot: dark violet, red, orange, light yellow; lightness increases throughout.
_COLORMAP = np.array([(13, 8, 60), (106, 23, 110), (188, 55, 84), (240, 110, 40), (250, 185, 40), (252, 255, 190)])

Heatmap = NDArray[np.float32]


@dataclass(frozen=True)
class ClassExplanation:
    """The evidence for one class."""

    prediction: Prediction
    heatmap: Heatmap  # [h, w], non-negative, over `pixels`
    pixels: NDArray[np.uint8]  # [H, W, 3], the network's input


@dataclass(frozen=True)
class DetectionExplanation:
    """The image regions that one detection's query attended to."""

    detection: Detection
    heatmap: Heatmap  # [h, w], non-negative, over the whole image


class ClassificationExplainer:
    """Explains the predictions of a classifier."""

    def __init__(self, classifier: Classifier, explanation: Explanation, network: Network | None) -> None:
        """Wrap `classifier`; `network` is the explain graph, None for "occlusion"."""
        self._classifier, self._explanation, self._network = classifier, explanation, network

    def explain(self, image: Image.Image, class_id: int | None = None) -> ClassExplanation:
        """Explain one class, by default the most probable one, for an RGB image.

        Attention is the same for every class. A class activation map leaves out evidence against the class; occlusion
        leaves out patches that make the class more probable when hidden.

        Raises:
            ParameterError: the class does not exist.
        """
        labels = self._classifier.labels
        if class_id is not None and not 0 <= class_id < len(labels):
            raise ParameterError("class_id", expected=f"an integer from 0 to {len(labels) - 1}", found=class_id)
        pixels = self._classifier.prepare(image)
        outputs = self._run(pixels)
        probabilities = outputs["probabilities"][0]
        class_id = int(probabilities.argmax()) if class_id is None else class_id
        if "rollout" in outputs:
            heatmap = outputs["rollout"][0]
        elif "activation" in outputs:
            heatmap = outputs["activation"][0, class_id].clip(min=0)
        else:
            heatmap = self._occlusion(pixels, class_id, float(probabilities[class_id]))
        return ClassExplanation(Prediction(labels[class_id], class_id, float(probabilities[class_id])), heatmap, pixels)

    def _run(self, pixels: NDArray[np.uint8]) -> dict[str, Heatmap]:
        if self._network is None:
            return {"probabilities": self._classifier.predict([pixels])}
        names = [spec.name for spec in self._explanation.outputs]
        outputs = self._network(pixels=pixels[None])
        return {name: output.astype(np.float32) for name, output in zip(names, outputs, strict=True)}

    def _occlusion(self, pixels: NDArray[np.uint8], class_id: int, probability: float) -> Heatmap:
        """Return the drop in probability for each patch that is filled with the mean color of the data."""
        assert self._explanation.patch_size is not None
        edge = self._explanation.patch_size
        rows, columns = pixels.shape[0] // edge, pixels.shape[1] // edge
        mean_color = np.round(255 * np.array(self._classifier.preprocessing.mean)).astype(np.uint8)
        drop = np.empty(rows * columns, np.float32)
        for start in range(0, len(drop), _OCCLUSION_BATCH):
            patches = np.arange(start, min(start + _OCCLUSION_BATCH, len(drop)))
            occluded = np.repeat(pixels[None], len(patches), axis=0)
            for image, (row, column) in zip(occluded, zip(*divmod(patches, columns), strict=True), strict=True):
                image[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge] = mean_color
            drop[patches] = probability - self._classifier.predict(list(occluded))[:, class_id]
        return drop.clip(min=0).reshape(rows, columns)


class DetectionExplainer:
    """Explains the detections of a detector."""

    def __init__(self, detector: Detector, explanation: Explanation, network: Network) -> None:
        """Wrap `detector`; `network` is the explain graph."""
        self._detector, self._explanation, self._network = detector, explanation, network

    def explain(
        self, image: Image.Image, *, threshold: float = 0.5, max_detections: int = 100
    ) -> list[DetectionExplanation]:
        """Return the detections of `Detector.detect` in an RGB image, each with its query's attention.

        Raises:
            ParameterError: see `Detector.detect`.
        """
        graph = _RecordingNetwork(self._network, [spec.name for spec in self._explanation.outputs])
        detector = Detector(graph, self._detector.preprocessing, self._detector.labels)
        detections = detector.detect(image, threshold=threshold, max_detections=max_detections)
        order = np.argsort(-graph.outputs["scores"][0], kind="stable")  # the order of `detections`
        attention = graph.outputs["cross_attention"][0].astype(np.float32)
        return [DetectionExplanation(found, attention[query]) for found, query in zip(detections, order, strict=False)]


class _RecordingNetwork:
    """A detector's explain graph, called like the serving graph; keeps all of its outputs."""

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        self._network, self._names = network, names
        self.outputs: dict[str, NDArray[np.generic]] = {}

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        self.outputs = dict(zip(self._names, self._network(**inputs), strict=True))
        return [self.outputs[name] for name in ("scores", "class_ids", "boxes")]


Explainer = ClassificationExplainer | DetectionExplainer


def make_explainer(predictor: Predictor, explanation: Explanation, network: Network | None) -> Explainer:
    """Return the explainer for a bundle; `network` is its explain graph (`bundle.loading.load_explain_network`)."""
    if isinstance(predictor, Classifier):
        return ClassificationExplainer(predictor, explanation, network)
    assert network is not None  # detectors are never explained by occlusion
    return DetectionExplainer(predictor, explanation, network)


def overlay(image: Image.Image, heatmap: Heatmap) -> Image.Image:
    """Blend a heat map, normalised to its maximum, over an RGB image; cold regions stay unchanged."""
    strength = heatmap / heatmap.max() if heatmap.max() > 0 else heatmap
    smooth = Image.fromarray(strength.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    values = np.asarray(smooth).clip(0, 1)[..., None]
    position = values[..., 0] * (len(_COLORMAP) - 1)
    lower = np.minimum(position.astype(int), len(_COLORMAP) - 2)
    weight = (position - lower)[..., None]
    colors = _COLORMAP[lower] * (1 - weight) + _COLORMAP[lower + 1] * weight
    opacity = _OPACITY * np.sqrt(values)
    return Image.fromarray((np.asarray(image) * (1 - opacity) + colors * opacity).round().astype(np.uint8))


def draw_explanation(explainer: Explainer, image: Image.Image, *, min_edge: int = 448) -> tuple[Image.Image, list[str]]:
    """Draw an image beside a copy with its heat map, and describe it in lines of text.

    For a detector, the heat map is the maximum over all detections, and their boxes are drawn.
    """
    if isinstance(explainer, ClassificationExplainer):
        explained = explainer.explain(image)
        original, heatmap = Image.fromarray(explained.pixels), explained.heatmap
        boxes = []
        lines = [f"{explained.prediction.label} {explained.prediction.probability:.1%}"]
    else:
        explanations = explainer.explain(image)
        original, boxes = image, [entry.detection.box for entry in explanations]
        maps = [entry.heatmap / entry.heatmap.max() for entry in explanations] or [np.zeros((1, 1), np.float32)]
        heatmap = np.max(maps, axis=0).astype(np.float32)
        lines = [f"{entry.detection.label} {entry.detection.score:.1%}" for entry in explanations]
    scale = max(1.0, min_edge / min(original.size))
    size = round(original.width * scale), round(original.height * scale)
    resized = original.resize(size, Image.Resampling.BICUBIC)
    explained_image = overlay(resized, heatmap)
    draw = ImageDraw.Draw(explained_image)
    for box in boxes:
        corners = [edge * scale for edge in (box.x_min, box.y_min, box.x_max, box.y_max)]
        draw.rectangle(corners, outline="white", width=2)
    picture = Image.new("RGB", (2 * size[0], size[1]))
    picture.paste(resized, (0, 0))
    picture.paste(explained_image, (size[0], 0))
    return picture, lines
