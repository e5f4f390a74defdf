"""Predictors: preprocess an image, call the network, turn its outputs into labels or boxes.

The network is any callable over NumPy arrays: an ONNX Runtime session in the service, the torch module in training.
Both are thus evaluated by the same code.
"""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.errors import ParameterError
from vitrine.bundle.images import ReducedImage, pad_and_stack, to_classification_pixels, to_detection_pixels
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing


class Network(Protocol):
    """A serving graph in some runtime: named inputs to outputs, in the order of the manifest."""

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]: ...


_MAX_COMPARED = 1000  # labels, to suggest the closest one

Row = tuple[NDArray[Any], ...]
"""The network's outputs for one image, each without the batch axis."""


@dataclass(frozen=True)
class Prediction:
    """One class with its probability."""

    label: str
    class_id: int
    probability: float


@dataclass(frozen=True)
class Box:
    """A box in pixels of the upright image, with the origin at its top-left corner."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    def xyxy(self) -> tuple[float, float, float, float]:
        """Return the edges: left, top, right, bottom."""
        return self.x_min, self.y_min, self.x_max, self.y_max


@dataclass(frozen=True)
class Detection:
    """One detected object."""

    label: str
    class_id: int
    score: float
    box: Box


@dataclass(frozen=True)
class PreparedImage:
    """A detector's input image, and the original size, to which boxes are scaled."""

    pixels: NDArray[np.uint8]  # [height, width, 3], resized
    width: int  # of the original image, in pixels
    height: int


class Classifier:
    """Image classification with one network."""

    def __init__(self, network: Network, preprocessing: ClassificationPreprocessing, labels: Sequence[str]) -> None:
        self.network = network
        self.preprocessing = preprocessing
        self.labels = tuple(labels)

    def probabilities(self, images: Sequence[Image.Image | ReducedImage]) -> NDArray[np.float32]:
        """Return the class probabilities of RGB images, float32 [batch, classes], computed as one batch."""
        return self.predict([self.prepare(image) for image in images])

    def prepare(self, image: Image.Image | ReducedImage) -> NDArray[np.uint8]:
        """Preprocess an RGB image to uint8 [height, width, 3]."""
        return to_classification_pixels(image, self.preprocessing)

    def inputs(self, pixels: Sequence[NDArray[np.uint8]]) -> dict[str, NDArray[np.generic]]:
        """Stack prepared images to the network's inputs, by name."""
        return {"pixels": pixels[0][np.newaxis] if len(pixels) == 1 else np.stack(pixels)}

    def infer(self, pixels: Sequence[NDArray[np.uint8]]) -> list[Row]:
        """Run the network on prepared images as one batch; return its outputs for each image."""
        return list(zip(*self.network(**self.inputs(pixels)), strict=True))

    def predict(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return the class probabilities of prepared images, float32 [batch, classes]."""
        (probabilities,) = self.network(**self.inputs(pixels))
        return probabilities.astype(np.float32, copy=False)

    def classify(
        self,
        image: Image.Image | ReducedImage,
        *,
        top_k: int = 5,
        labels: Collection[str] | None = None,
    ) -> list[Prediction]:
        """Return the `top_k` most probable classes (or all if there are fewer), most probable first.

        Args:
            labels: return only these classes; probabilities are still those among all classes.

        Raises:
            ParameterError: `top_k` is below 1, or a label does not exist.
        """
        self.check_parameters(top_k=top_k, labels=labels)
        return self.postprocess(self.probabilities([image])[0], top_k=top_k, labels=labels)

    def check_parameters(self, *, top_k: int, labels: Collection[str] | None = None) -> None:
        """Raise the `ParameterError` that `classify` would raise, before an image is decoded."""
        if top_k < 1:
            raise ParameterError("top_k", expected="an integer of at least 1", found=top_k)
        _check_labels(labels, self.labels)

    def postprocess(
        self, probabilities: NDArray[np.float32], *, top_k: int, labels: Collection[str] | None = None
    ) -> list[Prediction]:
        """Return the predictions, as in `classify`, for the probabilities of one image, float32 [classes]."""
        order = np.argsort(-probabilities, kind="stable")
        if labels is None:
            order = order[:top_k]
        wanted = None if labels is None else frozenset(labels)
        selected = [i for i in order.tolist() if wanted is None or self.labels[i] in wanted]
        return [Prediction(self.labels[i], i, float(probabilities[i])) for i in selected[:top_k]]


class Detector:
    """Object detection with one network."""

    def __init__(self, network: Network, preprocessing: DetectionPreprocessing, labels: Sequence[str]) -> None:
        self.network = network
        self.preprocessing = preprocessing
        self.labels = tuple(labels)

    def detect(
        self,
        image: Image.Image | ReducedImage,
        *,
        threshold: float = 0.5,
        max_detections: int = 100,
        labels: Collection[str] | None = None,
    ) -> list[Detection]:
        """Return at most `max_detections` objects that score at least `threshold`, highest score first.

        Args:
            labels: return only objects of these classes.

        Raises:
            ParameterError: `threshold` is outside 0..1, `max_detections` is below 1, or a label does not exist.
        """
        self.check_parameters(threshold=threshold, max_detections=max_detections, labels=labels)
        prepared = [self.prepare(image)]
        return self.predict(prepared, threshold=threshold, max_detections=max_detections, labels=labels)[0]

    def check_parameters(self, *, threshold: float, max_detections: int, labels: Collection[str] | None = None) -> None:
        """Raise the `ParameterError` that `detect` would raise, before an image is decoded."""
        if not 0 <= threshold <= 1:
            raise ParameterError("threshold", expected="a number from 0 to 1", found=threshold)
        if max_detections < 1:
            raise ParameterError("max_detections", expected="an integer of at least 1", found=max_detections)
        _check_labels(labels, self.labels)

    def prepare(self, image: Image.Image | ReducedImage) -> PreparedImage:
        """Preprocess an RGB image."""
        return PreparedImage(to_detection_pixels(image, self.preprocessing), image.width, image.height)

    def inputs(self, images: Sequence[PreparedImage]) -> dict[str, NDArray[np.generic]]:
        """Pad and stack prepared images to the network's inputs, by name."""
        pixels, sizes = pad_and_stack([image.pixels for image in images])
        return {"pixels": pixels, "sizes": sizes}

    def infer(self, images: Sequence[PreparedImage]) -> list[Row]:
        """Run the network on prepared images as one padded batch; return its outputs for each image."""
        return list(zip(*self.network(**self.inputs(images)), strict=True))

    def predict(
        self,
        images: Sequence[PreparedImage],
        *,
        threshold: float,
        max_detections: int,
        labels: Collection[str] | None = None,
    ) -> list[list[Detection]]:
        """Return the objects in each of the prepared images, as in `detect`."""
        return [
            self.postprocess(row, image, threshold=threshold, max_detections=max_detections, labels=labels)
            for image, row in zip(images, self.infer(images), strict=True)
        ]

    def postprocess(
        self,
        row: Row,
        image: PreparedImage,
        *,
        threshold: float,
        max_detections: int,
        labels: Collection[str] | None = None,
    ) -> list[Detection]:
        """Return the objects, as in `detect`, for the network's outputs for one image."""
        scores, class_ids, corners = row
        boxes = corners * np.array([image.width, image.height, image.width, image.height], dtype=np.float32)
        return [
            Detection(self.labels[class_ids[i]], int(class_ids[i]), float(scores[i]), Box(*boxes[i].tolist()))
            for i in self.select(row, threshold=threshold, max_detections=max_detections, labels=labels)
        ]

    def select(
        self, row: Row, *, threshold: float, max_detections: int, labels: Collection[str] | None = None
    ) -> list[int]:
        """Return the indices of the objects that `postprocess` returns, in the network's outputs for one image."""
        scores, class_ids, _ = row
        order = np.argsort(-scores, kind="stable")
        wanted = None if labels is None else frozenset(labels)
        selected = [i for i in order.tolist() if wanted is None or self.labels[class_ids[i]] in wanted]
        return [i for i in selected[:max_detections] if scores[i] >= threshold]


def _check_labels(labels: Collection[str] | None, known: Sequence[str]) -> None:
    if not labels:
        return
    missing = set(labels).difference(known)
    if missing:
        label = next(label for label in labels if label in missing)
        closest = difflib.get_close_matches(label[:100], known[:_MAX_COMPARED], n=1) or known[:1]
        expected = f"some of the model's {len(known)} labels, such as {closest[0]!r}"
        raise ParameterError("labels", expected=expected, found=repr(label[:100]))


Predictor = Classifier | Detector


def make_predictor(
    network: Network,
    preprocessing: ClassificationPreprocessing | DetectionPreprocessing,
    labels: Sequence[str],
) -> Predictor:
    """Return the predictor for a network, by the task of its preprocessing."""
    if isinstance(preprocessing, ClassificationPreprocessing):
        return Classifier(network, preprocessing, labels)
    return Detector(network, preprocessing, labels)
