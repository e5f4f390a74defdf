"""From an image to labels or boxes: preprocessing, one call of the network, and what the answer means.

The network is any callable over NumPy arrays: an ONNX Runtime session when serving, the torch module while training,
so that both are evaluated by the same code.
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
    """The serving graph, run by some runtime: named inputs to outputs, in the order of the manifest."""

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]: ...


Row = tuple[NDArray[Any], ...]
"""What the network says of one image: each of its outputs, without the batch axis."""


@dataclass(frozen=True)
class Prediction:
    """One class of a classification."""

    label: str
    class_id: int
    probability: float


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the upright image, from its top-left corner."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True)
class Detection:
    """One object found."""

    label: str
    class_id: int
    score: float
    box: Box


@dataclass(frozen=True)
class PreparedImage:
    """An image as a detector's network takes it, and the size that its boxes are scaled to."""

    pixels: NDArray[np.uint8]  # [height, width, 3], resized
    width: int  # of the image, in pixels
    height: int


class Classifier:
    """Image classification with one network."""

    def __init__(self, network: Network, preprocessing: ClassificationPreprocessing, labels: Sequence[str]) -> None:
        self.network = network
        self.preprocessing = preprocessing
        self.labels = tuple(labels)

    def probabilities(self, images: Sequence[Image.Image | ReducedImage]) -> NDArray[np.float32]:
        """RGB images to class probabilities, float32 [batch, classes], as one batch."""
        return self.answer([self.prepare(image) for image in images])

    def prepare(self, image: Image.Image | ReducedImage) -> NDArray[np.uint8]:
        """An RGB image to the network's pixels, uint8 [height, width, 3]."""
        return to_classification_pixels(image, self.preprocessing)

    def inputs(self, pixels: Sequence[NDArray[np.uint8]]) -> dict[str, NDArray[np.generic]]:
        """Prepared images as one batch of the network's inputs, by name."""
        return {"pixels": pixels[0][np.newaxis] if len(pixels) == 1 else np.stack(pixels)}

    def rows(self, pixels: Sequence[NDArray[np.uint8]]) -> list[Row]:
        """What the network says of each of the prepared images, computed as one batch."""
        return list(zip(*self.network(**self.inputs(pixels)), strict=True))

    def answer(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Prepared images to class probabilities, float32 [batch, classes]."""
        (probabilities,) = self.network(**self.inputs(pixels))
        return probabilities.astype(np.float32, copy=False)

    def classify(
        self,
        image: Image.Image | ReducedImage,
        *,
        top_k: int = 5,
        labels: Collection[str] | None = None,
    ) -> list[Prediction]:
        """The `top_k` most probable classes (all of them if there are fewer), most probable first.

        Args:
            labels: answer these classes only; their probabilities stay those among all classes.

        Raises:
            ParameterError: `top_k` is below 1, or there is no such label.
        """
        self.check(top_k=top_k, labels=labels)
        return self.best(self.probabilities([image])[0], top_k=top_k, labels=labels)

    def check(self, *, top_k: int, labels: Collection[str] | None = None) -> None:
        """Refuse what `classify` refuses, before an image is decoded for it."""
        if top_k < 1:
            raise ParameterError("top_k", expected="an integer of at least 1", found=top_k)
        _check_labels(labels, self.labels)

    def best(
        self, probabilities: NDArray[np.float32], *, top_k: int, labels: Collection[str] | None = None
    ) -> list[Prediction]:
        """The predictions in the probabilities of one image, float32 [classes], as `classify` gives them."""
        order = np.argsort(-probabilities, kind="stable")
        if labels is None:
            order = order[:top_k]
        wanted = [i for i in order.tolist() if labels is None or self.labels[i] in labels]
        return [Prediction(self.labels[i], i, float(probabilities[i])) for i in wanted[:top_k]]


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
        """Objects that score at least `threshold`, best first, at most `max_detections`.

        Args:
            labels: answer objects of these classes only.

        Raises:
            ParameterError: `threshold` is outside 0..1, `max_detections` is below 1, or there is no such label.
        """
        self.check(threshold=threshold, max_detections=max_detections, labels=labels)
        prepared = [self.prepare(image)]
        return self.answer(prepared, threshold=threshold, max_detections=max_detections, labels=labels)[0]

    def check(self, *, threshold: float, max_detections: int, labels: Collection[str] | None = None) -> None:
        """Refuse what `detect` refuses, before an image is decoded for it."""
        if not 0 <= threshold <= 1:
            raise ParameterError("threshold", expected="a number from 0 to 1", found=threshold)
        if max_detections < 1:
            raise ParameterError("max_detections", expected="an integer of at least 1", found=max_detections)
        _check_labels(labels, self.labels)

    def prepare(self, image: Image.Image | ReducedImage) -> PreparedImage:
        """An RGB image to the network's pixels."""
        return PreparedImage(to_detection_pixels(image, self.preprocessing), image.width, image.height)

    def inputs(self, images: Sequence[PreparedImage]) -> dict[str, NDArray[np.generic]]:
        """Prepared images as one padded batch of the network's inputs, by name."""
        pixels, sizes = pad_and_stack([image.pixels for image in images])
        return {"pixels": pixels, "sizes": sizes}

    def rows(self, images: Sequence[PreparedImage]) -> list[Row]:
        """What the network says of each of the prepared images, computed as one padded batch."""
        return list(zip(*self.network(**self.inputs(images)), strict=True))

    def answer(
        self,
        images: Sequence[PreparedImage],
        *,
        threshold: float,
        max_detections: int,
        labels: Collection[str] | None = None,
    ) -> list[list[Detection]]:
        """The objects in each of the prepared images, as `detect` gives them."""
        return [
            self.objects(row, image, threshold=threshold, max_detections=max_detections, labels=labels)
            for image, row in zip(images, self.rows(images), strict=True)
        ]

    def objects(
        self,
        row: Row,
        image: PreparedImage,
        *,
        threshold: float,
        max_detections: int,
        labels: Collection[str] | None = None,
    ) -> list[Detection]:
        """The objects in what the network says of one image, as `detect` gives them."""
        scores, class_ids, corners = row
        boxes = corners * np.array([image.width, image.height, image.width, image.height], dtype=np.float32)
        order = np.argsort(-scores, kind="stable")
        wanted = [i for i in order if labels is None or self.labels[class_ids[i]] in labels]
        return [
            Detection(self.labels[class_ids[i]], int(class_ids[i]), float(scores[i]), Box(*boxes[i].tolist()))
            for i in wanted[:max_detections]
            if scores[i] >= threshold
        ]


def _check_labels(wanted: Collection[str] | None, known: Sequence[str]) -> None:
    for label in wanted or ():
        if label not in known:
            near = difflib.get_close_matches(label[:100], known, n=1) or known[:1]
            expected = f"some of the model's {len(known)} labels, such as {near[0]!r}"
            raise ParameterError("labels", expected=expected, found=repr(label[:100]))


Predictor = Classifier | Detector


def make_predictor(
    network: Network,
    preprocessing: ClassificationPreprocessing | DetectionPreprocessing,
    labels: Sequence[str],
) -> Predictor:
    """The predictor of a network, by the task of its preprocessing."""
    if isinstance(preprocessing, ClassificationPreprocessing):
        return Classifier(network, preprocessing, labels)
    return Detector(network, preprocessing, labels)
