"""The JSON bodies of HTTP responses.

The bodies of the hot routes are plain dataclasses, which `orjson` serializes directly; pydantic only describes them in
the OpenAPI document.
"""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import Identity, Manifest, Metrics, Precision, Task
from vitrine.bundle.predictors import Detection, Prediction
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

    @classmethod
    def of(cls, versions: list[Bundle]) -> "ModelDescription":
        """Describe a model, given all its served versions, ascending."""
        manifest = versions[-1].manifest
        return cls(
            **{name: getattr(manifest, name) for name in ("name", "version", "task", "architecture", "description")},
            versions=[bundle.manifest.version for bundle in versions],
            variants=list(manifest.variants) if isinstance(manifest, Manifest) else [],
            default_variant=manifest.default_variant if isinstance(manifest, Manifest) else None,
            labels=list(manifest.labels),
            metrics=manifest.metrics,
        )


class ModelList(_Schema):
    """Response of `GET /models`."""

    models: list[ModelDescription]


class ModelDetail(_Schema):
    """Response of `GET /models/{name}`: the manifest of one version."""

    versions: list[str]  # all served versions, ascending
    manifest: Manifest | Identity  # Identity: a single ONNX file is served
