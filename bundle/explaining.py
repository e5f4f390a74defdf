"""Heat maps that explain what a network looks at.

What a method needs is in the outputs of a bundle's explain graph (`models/explaining.py`):

    attention-rollout   ViT: what each patch contributes to the classified state through all layers (Abnar & Zuidema
                        2020, "Quantifying Attention Flow in Transformers", sec. 3); the same for all classes
    class-attention     ViT: where the class token of the last layer looks; the mean over the heads, and each of them
    class-activation    networks that average a feature map and classify it linearly: the part of the logit that is from
                        each cell (Zhou et al. 2016, "Learning Deep Features for Discriminative Localization", eq. 2)
    cross-attention     DETR: where the query of a detection looks, in the last decoder layer
    encoder-attention   DETR: where the encoder looks from a point of the image, in its last layer

Any bundle can be explained by `occlusion`: parts of the image are hidden, one at a time, and the answer's score is
compared (Zeiler & Fergus 2014, "Visualizing and Understanding Convolutional Networks", sec. 4.2). For a detection, the
score is that of the detection most like it: score times IoU, of the same class (Petsiuk et al. 2021, "Black-box
Explanation of Object Detectors via Saliency Maps", eq. 2, without the similarity of the classes).

Shapes: K classes, L layers, Q detections, h x w cells.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.errors import ParameterError
from vitrine.bundle.images import ReducedImage, classification_box
from vitrine.bundle.manifest import ClassificationPreprocessing, Identity, Manifest, Task
from vitrine.bundle.predictors import (
    Box,
    Classifier,
    Detection,
    Detector,
    Network,
    Prediction,
    Predictor,
    PreparedImage,
    Row,
    make_predictor,
)

DEFAULT_GRID, MAX_GRID = 8, 16  # hidden parts along the longer edge
DEFAULT_TARGETS, MAX_TARGETS = 8, 32  # detections
_LAYERS, _TOP_K = "layers", 5
_OCCLUSION_BATCH = 32  # images per call of the network

Values = NDArray[np.float32]


class Method(StrEnum):
    """How an answer is explained; see the module."""

    ATTENTION_ROLLOUT = "attention-rollout"
    CLASS_ATTENTION = "class-attention"
    CLASS_ACTIVATION = "class-activation"
    CROSS_ATTENTION = "cross-attention"
    ENCODER_ATTENTION = "encoder-attention"
    OCCLUSION = "occlusion"


_NEEDED = {  # output of the explain graph
    Method.ATTENTION_ROLLOUT: "rollout",
    Method.CLASS_ATTENTION: "attention",
    Method.CLASS_ACTIVATION: "activation",
    Method.CROSS_ATTENTION: "cross_attention",
    Method.ENCODER_ATTENTION: "encoder_attention",
}


def explain_outputs(identity: Identity) -> tuple[str, ...]:
    """Return the names of the outputs of a bundle's explain graph; none if it has no such graph."""
    explanation = identity.explanation if isinstance(identity, Manifest) else None
    return tuple(spec.name for spec in explanation.outputs) if explanation else ()


def methods_of(identity: Identity) -> tuple[Method, ...]:
    """Return the methods by which a bundle can be explained, the default first.

    Those that were measured to be no better than a baseline are behind those that are, and `ENCODER_ATTENTION`, which
    explains no answer, is the last.
    """
    outputs = explain_outputs(identity)
    available = [method for method in Method if method is Method.OCCLUSION or _NEEDED[method] in outputs]
    explanation = identity.explanation if isinstance(identity, Manifest) else None
    measured = explanation.faithfulness if explanation else None
    unfaithful = measured.unfaithful if measured else ()
    return tuple(sorted(available, key=lambda method: (method is Method.ENCODER_ATTENTION, method in unfaithful)))


@dataclass(frozen=True)
class HeatMap:
    """Values of the cells of a grid, and its place in the upright image.

    The cells at the right and bottom edges may reach beyond the image.
    """

    values: Values  # [rows, columns]
    box: Box


@dataclass(frozen=True)
class Point:
    """A place in the upright image, in pixels."""

    x: float
    y: float


Target = Prediction | Detection | Point


@dataclass(frozen=True)
class Explained:
    """What the network looked at for an answer, or from a point."""

    target: Target
    heatmap: HeatMap
    heads: Values | None = None  # [heads, rows, columns], of which `heatmap` is the mean
    layers: list[list[Prediction]] | None = None  # the best classes if the state after each block were classified


@dataclass(frozen=True)
class Question:
    """What is to be explained.

    `target` is the id of a class or the index of a detection; None: the best class, or all detections up to
    `max_targets`. `threshold`, `labels` and `max_detections` are those of `Detector.detect`.
    """

    method: Method
    target: int | None = None
    max_targets: int = 1
    point: Point | None = None  # for "encoder-attention"
    heads: bool = False  # for "class-attention"
    layers: bool = False  # of a ViT
    grid: int = DEFAULT_GRID  # for "occlusion"
    threshold: float = 0.5
    labels: Collection[str] | None = None
    max_detections: int = 100

    def targets(self, predictor: Predictor, prepared: Any, row: Row) -> Sequence[tuple[int, Prediction | Detection]]:
        """Return the answers to explain, each with its index in the network's outputs.

        Raises:
            ParameterError: there is no such detection.
        """
        if isinstance(predictor, Classifier):
            class_id = int(row[0].argmax()) if self.target is None else self.target
            return [(class_id, Prediction(predictor.labels[class_id], class_id, float(row[0][class_id])))]
        options: dict[str, Any] = {"threshold": self.threshold, "max_detections": self.max_detections}
        options["labels"] = self.labels
        indices = predictor.select(row[:3], **options)
        found = list(zip(indices, predictor.postprocess(row[:3], prepared, **options), strict=True))
        if self.target is None:
            return found[: self.max_targets]
        if self.target >= len(found):
            expected = f"an index below the number of detections, {len(found)} at threshold={self.threshold:g}"
            raise ParameterError("target", expected=expected, found=self.target)
        return [found[self.target]]


def check_question(question: Question, predictor: Predictor, identity: Identity) -> None:
    """Check a question about a bundle before an image is decoded.

    Raises:
        ParameterError: the bundle does not have the method, or a value is out of range.
    """
    methods = methods_of(identity)
    if question.method not in methods:
        raise ParameterError("method", expected=f"one of {', '.join(methods)}", found=question.method)
    count = len(predictor.labels) if isinstance(predictor, Classifier) else None
    if question.target is not None and not 0 <= question.target < (count or question.target + 1):
        expected = "an index from 0" if count is None else f"a label, or a class id from 0 to {count - 1}"
        raise ParameterError("target", expected=expected, found=question.target)
    if not 1 <= question.max_targets <= MAX_TARGETS:
        raise ParameterError("max_targets", expected=f"an integer from 1 to {MAX_TARGETS}", found=question.max_targets)
    if not 2 <= question.grid <= MAX_GRID:
        raise ParameterError("grid", expected=f"an integer from 2 to {MAX_GRID}", found=question.grid)
    if (question.point is None) == (question.method is Method.ENCODER_ATTENTION):
        expected = f"both for method={Method.ENCODER_ATTENTION}, none for others"
        raise ParameterError("x, y", expected=expected, found="none" if question.point is None else question.method)
    if question.heads and question.method is not Method.CLASS_ATTENTION:
        raise ParameterError("heads", expected=f"method={Method.CLASS_ATTENTION}", found=question.method)
    if question.layers and _LAYERS not in explain_outputs(identity):
        raise ParameterError("layers", expected="a ViT whose explain graph has them", found=f"none in {identity.name}")
    if question.layers and question.method is Method.OCCLUSION:
        raise ParameterError("layers", expected=f"another method than {Method.OCCLUSION}", found=question.method)
    if isinstance(predictor, Detector):
        predictor.check_parameters(
            threshold=question.threshold, max_detections=question.max_detections, labels=question.labels
        )


def read_explanation(
    question: Question, predictor: Predictor, names: Sequence[str], prepared: Any, size: tuple[int, int], row: Row
) -> list[Explained]:
    """Return the explanations in the outputs of an explain graph for one image.

    Args:
        names: of the outputs.
        prepared: the network's input, from `predictor.prepare`.
        size: width and height of the upright image.
        row: the outputs, each without the batch axis.

    Raises:
        ParameterError: the point is outside the image, or there is no such detection.
    """
    outputs = dict(zip(names, row, strict=True))
    values = outputs[_NEEDED[question.method]].astype(np.float32)
    if isinstance(predictor, Classifier):
        box = Box(*classification_box(*size, predictor.preprocessing))
        ((class_id, target),) = question.targets(predictor, prepared, row)
        heads = values[-1] if question.method is Method.CLASS_ATTENTION else None
        if heads is not None:
            values = heads.mean(axis=0)
        elif question.method is Method.CLASS_ACTIVATION:
            values = values[class_id]
        layers = None
        if question.layers:
            layers = [predictor.postprocess(probabilities, top_k=_TOP_K) for probabilities in outputs[_LAYERS]]
        return [Explained(target, HeatMap(values, box), heads if question.heads else None, layers)]
    if question.point is not None:
        return [_from_point(question.point, values, prepared)]
    return [
        Explained(target, _over_image(values[index], prepared))
        for index, target in question.targets(predictor, prepared, row)
    ]


def _from_point(point: Point, attention: Values, image: PreparedImage) -> Explained:
    """Return what the encoder attends to from the cell of a point, given its attention [h, w, h, w]."""
    if not (0 <= point.x < image.width and 0 <= point.y < image.height):
        expected = f"a pixel of the image of {image.width} x {image.height}"
        raise ParameterError("x, y", expected=expected, found=f"{point.x:g}, {point.y:g}")
    stride = _stride(attention.shape[:2], image)
    height, width = image.pixels.shape[:2]
    row, column = int(point.y / image.height * height / stride), int(point.x / image.width * width / stride)
    return Explained(point, _over_image(attention[row, column], image))


def _over_image(values: Values, image: PreparedImage) -> HeatMap:
    """Place a map [h, w] over an image, without the cells that hold padding only."""
    stride = _stride(values.shape, image)
    height, width = image.pixels.shape[:2]
    rows, columns = -(-height // stride), -(-width // stride)
    box = Box(0.0, 0.0, columns * stride / width * image.width, rows * stride / height * image.height)
    return HeatMap(values[:rows, :columns], box)


def _stride(cells: Sequence[int], image: PreparedImage) -> int:
    """Return the pixels of a network's input per cell: the power of two by which its longer edge has so many cells."""
    edge, count = max((int(edge), count) for edge, count in zip(image.pixels.shape[:2], cells, strict=True))
    return int(2 ** math.ceil(math.log2(edge / count)))


class Occlusion:
    """Copies of a network's input, each with another part of a grid hidden under the mean colour of the data."""

    def __init__(self, predictor: Predictor, prepared: Any, size: tuple[int, int], grid: int) -> None:
        """Args: the input of `predictor.prepare`, width and height of the image, and parts along the longer edge."""
        self._predictor, self._prepared, self._size = predictor, prepared, size
        self._pixels: NDArray[np.uint8] = prepared.pixels if isinstance(prepared, PreparedImage) else prepared
        height, width = self._pixels.shape[:2]
        longer = max(height, width)
        self.rows, self.columns = (max(1, min(edge, round(grid * edge / longer))) for edge in (height, width))
        self._color = np.round(255 * np.array(predictor.preprocessing.mean)).astype(np.uint8)

    def __len__(self) -> int:
        return int(self.rows * self.columns)

    def hide(self, part: int) -> Any:
        """Return the input with a part hidden, from 0 at the top left, row by row."""
        row, column = divmod(part, self.columns)
        height, width = self._pixels.shape[:2]
        hidden = self._pixels.copy()
        hidden[
            row * height // self.rows : (row + 1) * height // self.rows,
            column * width // self.columns : (column + 1) * width // self.columns,
        ] = self._color
        if isinstance(self._prepared, PreparedImage):
            return PreparedImage(hidden, self._prepared.width, self._prepared.height)
        return hidden

    def read(self, question: Question, row: Row, hidden_rows: Sequence[Row]) -> list[Explained]:
        """Return how much the score of each target drops where a part is hidden; negative where it grows.

        Args:
            row: the network's outputs for the whole image.
            hidden_rows: those for each part.
        """
        width, height = self._size
        if isinstance(self._predictor, Classifier):
            box = Box(*classification_box(width, height, self._predictor.preprocessing))
        else:
            box = Box(0.0, 0.0, float(width), float(height))
        explained = []
        for index, target in question.targets(self._predictor, self._prepared, row):
            if isinstance(target, Prediction):
                before, after = row[0][index], np.array([outputs[0][index] for outputs in hidden_rows])
            else:
                corners = row[2][index]
                before = row[0][index]
                after = np.array([likeness(outputs, target.class_id, corners) for outputs in hidden_rows])
            values = (before - after).astype(np.float32).reshape(self.rows, self.columns)
            explained.append(Explained(target, HeatMap(values, box)))
        return explained


def likeness(row: Row, class_id: int, corners: NDArray[np.float32]) -> float:
    """Return the largest score times IoU of the detections of a class with a box, xyxy."""
    scores, class_ids, boxes = row[:3]
    low, high = np.maximum(boxes[:, :2], corners[:2]), np.minimum(boxes[:, 2:], corners[2:])
    common = (high - low).clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (corners[2:] - corners[:2]).prod() - common
    likeness = np.where(class_ids == class_id, scores * common / areas.clip(min=1e-9), 0.0)
    return float(likeness.max(initial=0.0))


class Explainer:
    """Explains the answers of a bundle on this thread."""

    def __init__(self, identity: Identity, predictor: Predictor, network: Network | None) -> None:
        """Args: the bundle's manifest and predictor, and its explain graph (`bundle.loading.load_explain_network`)."""
        self.predictor = predictor
        self._identity = identity
        self._names = explain_outputs(identity)
        preprocessing, labels = identity.preprocessing, identity.labels
        self._explaining = None if network is None else make_predictor(network, preprocessing, labels)

    def explain(self, image: Image.Image | ReducedImage, question: Question) -> list[Explained]:
        """Explain answers for an RGB image.

        Raises:
            ParameterError: see `check_question` and `read_explanation`.
        """
        check_question(question, self.predictor, self._identity)
        prepared: Any = self.predictor.prepare(image)
        size = image.width, image.height
        if question.method is not Method.OCCLUSION:
            assert self._explaining is not None
            (row,) = self._explaining.infer([prepared])
            return read_explanation(question, self.predictor, self._names, prepared, size, row)
        (row,) = self.predictor.infer([prepared])
        occlusion = Occlusion(self.predictor, prepared, size, question.grid)
        rows: list[Row] = []
        for start in range(0, len(occlusion), _OCCLUSION_BATCH):
            parts = range(start, min(start + _OCCLUSION_BATCH, len(occlusion)))
            rows += self.predictor.infer([occlusion.hide(part) for part in parts])
        return occlusion.read(question, row, rows)


def default_question(identity: Identity, **changes: Any) -> Question:
    """Return the question for a bundle's best class, or its first detections, by its default method.

    Args:
        changes: fields of the question.
    """
    defaults: dict[str, Any] = {"method": methods_of(identity)[0], "grid": _default_grid(identity)}
    if identity.task is Task.DETECTION:
        defaults["max_targets"] = DEFAULT_TARGETS
    return Question(**{**defaults, **changes})


def _default_grid(identity: Identity) -> int:
    """Return the parts to hide along the longer edge: a network's patches, if it is made of them and they are few."""
    explanation = identity.explanation if isinstance(identity, Manifest) else None
    if explanation is None or explanation.patch_size is None:
        return DEFAULT_GRID
    assert isinstance(identity.preprocessing, ClassificationPreprocessing)
    return min(MAX_GRID, max(2, max(identity.preprocessing.input_size) // explanation.patch_size))
