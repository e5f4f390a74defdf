"""From an image to labels or boxes: preprocessing, one call of the network, and what the answer means.

The network is any callable over NumPy arrays: an ONNX Runtime session when serving, the torch module while training,
so that both are evaluated by the same code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bundle.errors import ParameterError
from bundle.images import pad_and_stack, to_classification_pixels, to_detection_pixels
from bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing


class Network(Protocol):
    """The serving graph, run by some runtime: named inputs to outputs, in the order of the manifest."""

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]: ...


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

    def probabilities(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """RGB images to class probabilities, float32 [batch, classes], as one batch."""
        return self.answer([self.prepare(image) for image in images])

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """An RGB image to the network's pixels, uint8 [height, width, 3]."""
        return to_classification_pixels(image, self.preprocessing)

    def answer(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Prepared images to class probabilities, float32 [batch, classes]."""
        (probabilities,) = self.network(pixels=np.stack(pixels))
        return probabilities.astype(np.float32, copy=False)

    def classify(self, image: Image.Image, *, top_k: int = 5) -> list[Prediction]:
        """The `top_k` most probable classes (all of them if there are fewer), most probable first.

        Raises:
            ParameterError: `top_k` is below 1.
        """
        if top_k < 1:
            raise ParameterError("top_k", expected="an integer of at least 1", found=top_k)
        probabilities = self.probabilities([image])[0]
        best = np.argsort(-probabilities, kind="stable")[:top_k]
        return [Prediction(self.labels[i], int(i), float(probabilities[i])) for i in best]


class Detector:
    """Object detection with one network."""

    def __init__(self, network: Network, preprocessing: DetectionPreprocessing, labels: Sequence[str]) -> None:
        self.network = network
        self.preprocessing = preprocessing
        self.labels = tuple(labels)

    def detect(self, image: Image.Image, *, threshold: float = 0.5, max_detections: int = 100) -> list[Detection]:
        """Objects that score at least `threshold`, best first, at most `max_detections`.

        Raises:
            ParameterError: `threshold` is outside 0..1 or `max_detections` is below 1.
        """
        if not 0 <= threshold <= 1:
            raise ParameterError("threshold", expected="a number from 0 to 1", found=threshold)
        if max_detections < 1:
            raise ParameterError("max_detections", expected="an integer of at least 1", found=max_detections)
        return self.answer([self.prepare(image)], threshold=threshold, max_detections=max_detections)[0]

    def prepare(self, image: Image.Image) -> PreparedImage:
        """An RGB image to the network's pixels."""
        return PreparedImage(to_detection_pixels(image, self.preprocessing), image.width, image.height)

    def answer(
        self, images: Sequence[PreparedImage], *, threshold: float, max_detections: int
    ) -> list[list[Detection]]:
        """The objects in each of the prepared images, as `detect` gives them."""
        pixels, sizes = pad_and_stack([image.pixels for image in images])
        outputs = self.network(pixels=pixels, sizes=sizes)
        found = []
        for image, scores, class_ids, corners in zip(images, *outputs, strict=True):
            boxes = corners * np.array([image.width, image.height, image.width, image.height], dtype=np.float32)
            best = np.argsort(-scores, kind="stable")[:max_detections]
            found.append(
                [
                    Detection(
                        self.labels[class_ids[i]], int(class_ids[i]), float(scores[i]), Box(*map(float, boxes[i]))
                    )
                    for i in best
                    if scores[i] >= threshold
                ]
            )
        return found


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
