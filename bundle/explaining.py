"""Where a network looks, as heat maps over the image.

A ViT shows its attention rollout, a convolutional network its class activation map, a DETR the cross-attention of each
detection's query: all of them answers of a bundle's explain graph (`models/explaining.py`). An MLP-Mixer has no such
answer; patch after patch is hidden from it, to see how much of its answer goes with each (Zeiler & Fergus 2014,
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

_HIDDEN_AT_ONCE = 32  # images in one call of the network
_OPACITY = 0.6
# From cold to hot, evenly spaced: dark violet, red, orange, light yellow; lightness rises all the way.
_COLOURS = np.array([(13, 8, 60), (106, 23, 110), (188, 55, 84), (240, 110, 40), (250, 185, 40), (252, 255, 190)])

Heat = NDArray[np.float32]


@dataclass(frozen=True)
class ClassHeat:
    """What spoke for one class."""

    prediction: Prediction
    heat: Heat  # [h, w] at least 0, over the pixels
    pixels: NDArray[np.uint8]  # [H, W, 3], what the network saw of the image


@dataclass(frozen=True)
class DetectionHeat:
    """Where one detection was looked up."""

    detection: Detection
    heat: Heat  # [h, w] at least 0, over the whole image


class ClassificationExplainer:
    """Heat maps of a classifier."""

    def __init__(self, classifier: Classifier, explanation: Explanation, network: Network | None) -> None:
        """Explain what `classifier` answers; `network` is the explain graph, None for "occlusion"."""
        self._classifier, self._explanation, self._network = classifier, explanation, network

    def explain(self, image: Image.Image, class_id: int | None = None) -> ClassHeat:
        """The heat map of one class, by default the most probable one, for an RGB image.

        Attention is the same for every class. Of a class activation map, what speaks against the class is left out,
        of occlusion what makes it more probable when hidden.

        Raises:
            ParameterError: there is no such class.
        """
        labels = self._classifier.labels
        if class_id is not None and not 0 <= class_id < len(labels):
            raise ParameterError("class_id", expected=f"an integer from 0 to {len(labels) - 1}", found=class_id)
        pixels = self._classifier.prepare(image)
        outputs = self._answer(pixels)
        probabilities = outputs["probabilities"][0]
        chosen = int(probabilities.argmax()) if class_id is None else class_id
        if "rollout" in outputs:
            heat = outputs["rollout"][0]
        elif "activation" in outputs:
            heat = outputs["activation"][0, chosen].clip(min=0)
        else:
            heat = self._occlusion(pixels, chosen, float(probabilities[chosen]))
        return ClassHeat(Prediction(labels[chosen], chosen, float(probabilities[chosen])), heat, pixels)

    def _answer(self, pixels: NDArray[np.uint8]) -> dict[str, Heat]:
        if self._network is None:
            return {"probabilities": self._classifier.answer([pixels])}
        names = [spec.name for spec in self._explanation.outputs]
        outputs = self._network(pixels=pixels[None])
        return {name: output.astype(np.float32) for name, output in zip(names, outputs, strict=True)}

    def _occlusion(self, pixels: NDArray[np.uint8], class_id: int, probability: float) -> Heat:
        """How much of the probability is lost where one patch has the data's mean colour."""
        assert self._explanation.patch_size is not None
        edge = self._explanation.patch_size
        rows, columns = pixels.shape[0] // edge, pixels.shape[1] // edge
        grey = np.round(255 * np.array(self._classifier.preprocessing.mean)).astype(np.uint8)
        lost = np.empty(rows * columns, np.float32)
        for start in range(0, len(lost), _HIDDEN_AT_ONCE):
            patches = np.arange(start, min(start + _HIDDEN_AT_ONCE, len(lost)))
            hidden = np.repeat(pixels[None], len(patches), axis=0)
            for copy, (row, column) in zip(hidden, zip(*divmod(patches, columns), strict=True), strict=True):
                copy[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge] = grey
            lost[patches] = probability - self._classifier.answer(list(hidden))[:, class_id]
        return lost.clip(min=0).reshape(rows, columns)


class DetectionExplainer:
    """Heat maps of a detector."""

    def __init__(self, detector: Detector, explanation: Explanation, network: Network) -> None:
        """Explain what `detector` finds; `network` is the explain graph."""
        self._detector, self._explanation, self._network = detector, explanation, network

    def explain(self, image: Image.Image, *, threshold: float = 0.5, max_detections: int = 100) -> list[DetectionHeat]:
        """Each object that `Detector.detect` finds in an RGB image, with the cells that its query attended to.

        Raises:
            ParameterError: as of `Detector.detect`.
        """
        graph = _Recorded(self._network, [spec.name for spec in self._explanation.outputs])
        detector = Detector(graph, self._detector.preprocessing, self._detector.labels)
        found = detector.detect(image, threshold=threshold, max_detections=max_detections)
        order = np.argsort(-graph.outputs["scores"][0], kind="stable")  # that of `found`
        attention = graph.outputs["cross_attention"][0].astype(np.float32)
        return [DetectionHeat(detection, attention[query]) for detection, query in zip(found, order, strict=False)]


class _Recorded:
    """A detector's explain graph, which answers as the serving graph does and keeps what else it answered."""

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        self._network, self._names = network, names
        self.outputs: dict[str, NDArray[np.generic]] = {}

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        self.outputs = dict(zip(self._names, self._network(**inputs), strict=True))
        return [self.outputs[name] for name in ("scores", "class_ids", "boxes")]


Explainer = ClassificationExplainer | DetectionExplainer


def make_explainer(predictor: Predictor, explanation: Explanation, network: Network | None) -> Explainer:
    """The explainer of a bundle; `network` is its explain graph (`bundle.loading.load_explain_network`)."""
    if isinstance(predictor, Classifier):
        return ClassificationExplainer(predictor, explanation, network)
    assert network is not None  # detectors are never explained by occlusion
    return DetectionExplainer(predictor, explanation, network)


def overlay(image: Image.Image, heat: Heat) -> Image.Image:
    """An RGB image with its heat map over it, scaled to the hottest cell; cold places stay as they are."""
    strength = heat / heat.max() if heat.max() > 0 else heat
    smooth = Image.fromarray(strength.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    values = np.asarray(smooth).clip(0, 1)[..., None]
    place = values[..., 0] * (len(_COLOURS) - 1)
    below = np.minimum(place.astype(int), len(_COLOURS) - 2)
    part = (place - below)[..., None]
    colours = _COLOURS[below] * (1 - part) + _COLOURS[below + 1] * part
    opacity = _OPACITY * np.sqrt(values)
    return Image.fromarray((np.asarray(image) * (1 - opacity) + colours * opacity).round().astype(np.uint8))


def picture(explainer: Explainer, image: Image.Image, *, least_edge: int = 448) -> tuple[Image.Image, list[str]]:
    """A picture to look at, and what it shows in words: the image and, right of it, the same with its heat map.

    Of a detector, the map is the hottest of all detections, whose boxes are drawn.
    """
    if isinstance(explainer, ClassificationExplainer):
        explained = explainer.explain(image)
        seen, heat = Image.fromarray(explained.pixels), explained.heat
        boxes = []
        words = [f"{explained.prediction.label} {explained.prediction.probability:.1%}"]
    else:
        found = explainer.explain(image)
        seen, boxes = image, [entry.detection.box for entry in found]
        maps = [entry.heat / entry.heat.max() for entry in found] or [np.zeros((1, 1), np.float32)]
        heat = np.max(maps, axis=0).astype(np.float32)
        words = [f"{entry.detection.label} {entry.detection.score:.1%}" for entry in found]
    scale = max(1.0, least_edge / min(seen.size))
    size = round(seen.width * scale), round(seen.height * scale)
    large = seen.resize(size, Image.Resampling.BICUBIC)
    hot = overlay(large, heat)
    draw = ImageDraw.Draw(hot)
    for box in boxes:
        corners = [edge * scale for edge in (box.x_min, box.y_min, box.x_max, box.y_max)]
        draw.rectangle(corners, outline="white", width=2)
    both = Image.new("RGB", (2 * size[0], size[1]))
    both.paste(large, (0, 0))
    both.paste(hot, (size[0], 0))
    return both, words
