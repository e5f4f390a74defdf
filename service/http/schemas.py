"""The JSON bodies of HTTP answers.

What each request is answered with are plain dataclasses, which `orjson` writes as they are; pydantic describes them in
the OpenAPI document.
"""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import Identity, Manifest, Metrics, Precision, Task
from vitrine.bundle.predictors import Detection, Prediction
from vitrine.service.errors import ErrorAnswer

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Model:
    """Which bundle answered, and with which of its graphs."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    version: str
    variant: Precision | None  # None: one ONNX file alone, which does not say

    @classmethod
    def of(cls, bundle: Bundle) -> "Model":
        return cls(name=bundle.manifest.name, version=bundle.manifest.version, variant=bundle.variant)


@dataclass(frozen=True, slots=True)
class Image:
    """The upright image as it was understood, in pixels."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImageClassification:
    """Of one of several images: its classes by falling probability."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    image: Image
    predictions: list[Prediction]


@dataclass(frozen=True, slots=True)
class Classification:
    """Answer of `POST /classify` for one image: classes by falling probability."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: Model
    image: Image
    predictions: list[Prediction]


@dataclass(frozen=True, slots=True)
class Classifications:
    """Answer of `POST /classify` for several images, in their order; an image that is no good has an error."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: Model
    results: list[ImageClassification | ErrorAnswer]


@dataclass(frozen=True, slots=True)
class ImageDetections:
    """Of one of several images: its objects by falling score, boxes in pixels of the upright image."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    image: Image
    detections: list[Detection]


@dataclass(frozen=True, slots=True)
class Detections:
    """Answer of `POST /detect` for one image: objects by falling score, boxes in pixels of the upright image."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: Model
    image: Image
    detections: list[Detection]


@dataclass(frozen=True, slots=True)
class DetectionsOfSeveral:
    """Answer of `POST /detect` for several images, in their order; an image that is no good has an error."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: Model
    results: list[ImageDetections | ErrorAnswer]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelDescription(_Schema):
    """A served model: its highest version."""

    name: str
    version: str
    versions: list[str]  # all that are served, ascending
    variants: list[Precision]
    default_variant: Precision | None
    task: Task
    architecture: str
    description: str
    labels: list[str]
    metrics: Metrics | None  # None if its exporter had no labelled data

    @classmethod
    def of(cls, versions: list[Bundle]) -> "ModelDescription":
        """Of all served versions of a model, the highest last."""
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
    """Answer of `GET /models`."""

    models: list[ModelDescription]


class ModelDetail(_Schema):
    """Answer of `GET /models/{name}`: everything known of one version."""

    versions: list[str]  # all that are served, ascending
    manifest: Manifest | Identity  # an Identity where one ONNX file alone is served
