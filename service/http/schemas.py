"""The JSON bodies of HTTP responses.

The bodies of the hot routes are plain dataclasses, which `orjson` serializes directly; pydantic only describes them in
the OpenAPI document.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vitrine.bundle import explaining
from vitrine.bundle.explaining import Method, Point, methods_of
from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import Identity, Manifest, Metrics, Precision, Task
from vitrine.bundle.predictors import Box, Detection, Prediction
from vitrine.service.errors import ErrorAnswer, StrictSchema


@dataclass(frozen=True, slots=True)
class Model(StrictSchema):
    """The bundle that made the predictions, and which of its graphs."""

    name: str
    version: str
    variant: Precision | None  # None: a single ONNX file is served, which does not name its variant

    @classmethod
    def of(cls, bundle: Bundle) -> "Model":
        return cls(name=bundle.manifest.name, version=bundle.manifest.version, variant=bundle.variant)


@dataclass(frozen=True, slots=True)
class Image(StrictSchema):
    """Size of the upright image as decoded, in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImageClassification(StrictSchema):
    """Classes of one of several images, by descending probability."""

    image: Image
    predictions: list[Prediction]


@dataclass(frozen=True, slots=True)
class Classification(StrictSchema):
    """Response of `POST /classify` for one image: classes by descending probability."""

    model: Model
    image: Image
    predictions: list[Prediction]


@dataclass(frozen=True, slots=True)
class Classifications(StrictSchema):
    """Response of `POST /classify` for several images, in their order; an invalid image has an error."""

    model: Model
    results: list[ImageClassification | ErrorAnswer]


@dataclass(frozen=True, slots=True)
class ImageDetections(StrictSchema):
    """Objects in one of several images, by descending score; boxes in pixels of the upright image."""

    image: Image
    detections: list[Detection]


@dataclass(frozen=True, slots=True)
class Detections(StrictSchema):
    """Response of `POST /detect` for one image: objects by descending score; boxes in pixels of the upright image."""

    model: Model
    image: Image
    detections: list[Detection]


@dataclass(frozen=True, slots=True)
class DetectionsOfSeveral(StrictSchema):
    """Response of `POST /detect` for several images, in their order; an invalid image has an error."""

    model: Model
    results: list[ImageDetections | ErrorAnswer]


@dataclass(frozen=True, slots=True)
class HeatMap(StrictSchema):
    """Values of a grid of cells, and its place in the upright image, in pixels.

    The cells at the right and bottom edges may reach beyond the image. Attention is not negative and adds up to one;
    the cells of a class activation map, with the bias of the head, add up to the logit; occlusion is the drop of the
    score where a cell is hidden.
    """

    rows: int
    columns: int
    box: Box
    values: list[list[float]]

    @classmethod
    def of(cls, heatmap: explaining.HeatMap) -> "HeatMap":
        rows, columns = heatmap.values.shape
        return cls(rows, columns, heatmap.box, rounded(heatmap.values))


@dataclass(frozen=True, slots=True)
class ExplainedTarget(StrictSchema):
    """What the network looked at for an answer, or from a point."""

    target: Detection | Prediction | Point
    heatmap: HeatMap
    heads: list[list[list[float]]] | None = None  # the map of each head, if asked for
    layers: list[list[Prediction]] | None = None  # the best classes if the state after each block were classified

    @classmethod
    def of(cls, explained: explaining.Explained) -> "ExplainedTarget":
        heads = None if explained.heads is None else rounded(explained.heads)
        return cls(explained.target, HeatMap.of(explained.heatmap), heads, explained.layers)


@dataclass(frozen=True, slots=True)
class ImageExplanations(StrictSchema):
    """The explanations for one of several images."""

    image: Image
    explanations: list[ExplainedTarget]
    images_computed: int  # what the network was run on: the image, and for occlusion a copy for each hidden part


@dataclass(frozen=True, slots=True)
class ExplainedImage(StrictSchema):
    """Response of `POST /explain` for one image."""

    model: Model
    method: Method
    methods: list[Method]  # by which the model can be explained, the default first
    image: Image
    explanations: list[ExplainedTarget]
    images_computed: int
    milliseconds: float  # from the request's body to the maps, waiting included


@dataclass(frozen=True, slots=True)
class ExplainedImages(StrictSchema):
    """Response of `POST /explain` for several images, in their order; an invalid image has an error."""

    model: Model
    method: Method
    methods: list[Method]
    results: list[ImageExplanations | ErrorAnswer]
    milliseconds: float


def rounded(values: NDArray[np.float32]) -> list[Any]:
    """Return numbers with seven decimals, which are all that float32 has of a fraction."""
    numbers: list[Any] = np.round(values.astype(np.float64), 7).tolist()
    return numbers


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelDescription(_Schema):
    """A served model: its highest version."""

    name: str
    version: str
    versions: list[str]  # all served versions, ascending
    variants: list[Precision]
    default_variant: Precision | None
    task: Task
    architecture: str
    description: str
    labels: list[str]
    metrics: Metrics | None  # None: exported without labelled data
    is_default: bool  # answers requests of its task that name no model
    explanations: list[Method]  # of `POST /explain`, the default first
    samples: int  # images at `/models/{name}/samples/{number}`, from 0

    @classmethod
    def of(cls, versions: list[Bundle], *, is_default: bool) -> "ModelDescription":
        """Describe a model, given all its served versions, ascending."""
        manifest = versions[-1].manifest
        return cls(
            **{name: getattr(manifest, name) for name in ("name", "version", "task", "architecture", "description")},
            versions=[bundle.manifest.version for bundle in versions],
            variants=list(manifest.variants) if isinstance(manifest, Manifest) else [],
            default_variant=manifest.default_variant if isinstance(manifest, Manifest) else None,
            labels=list(manifest.labels),
            metrics=manifest.metrics,
            is_default=is_default,
            explanations=list(methods_of(manifest)),
            samples=versions[-1].samples,
        )


class ModelList(_Schema):
    """Response of `GET /models`."""

    models: list[ModelDescription]


class ModelDetail(_Schema):
    """Response of `GET /models/{name}`: the manifest of one version."""

    versions: list[str]  # all served versions, ascending
    manifest: Manifest | Identity  # Identity: a single ONNX file is served
