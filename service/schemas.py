"""The JSON bodies of HTTP answers."""

from pydantic import BaseModel, ConfigDict, Field

from bundle.loading import Bundle
from bundle.manifest import Identity, Manifest, Metrics, Precision, Task
from bundle.predictors import Detection, Prediction


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)


class Model(_Schema):
    """Which bundle answered, and with which of its graphs."""

    name: str
    version: str
    variant: Precision | None  # None: one ONNX file alone, which does not say

    @classmethod
    def of(cls, bundle: Bundle) -> "Model":
        return cls(name=bundle.manifest.name, version=bundle.manifest.version, variant=bundle.variant)


class Image(_Schema):
    """The upright image as it was understood, in pixels."""

    width: int
    height: int


class ClassProbability(_Schema):
    """One class."""

    label: str
    class_id: int
    probability: float = Field(ge=0, le=1)


class Box(_Schema):
    """A rectangle in pixels of the upright image, from its top-left corner."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


class DetectedObject(_Schema):
    """One object."""

    label: str
    class_id: int
    score: float = Field(ge=0, le=1)
    box: Box


class Error(_Schema):
    """What went wrong."""

    code: str  # stable and machine-readable
    message: str  # for people: what, where, expected, found


class ErrorAnswer(_Schema):
    """The body of every answer with a status of 400 or above, outside /v2."""

    error: Error


class ProtocolErrorAnswer(_Schema):
    """The body of every answer with a status of 400 or above under /v2."""

    error: str


class ImageClassification(_Schema):
    """Of one of several images: its classes by falling probability."""

    image: Image
    predictions: list[ClassProbability]


class Classification(_Schema):
    """Answer of `POST /classify` for one image: classes by falling probability."""

    model: Model
    image: Image
    predictions: list[ClassProbability]


class Classifications(_Schema):
    """Answer of `POST /classify` for several images, in their order; an image that is no good has an error."""

    model: Model
    results: list[ImageClassification | ErrorAnswer]


class ImageDetections(_Schema):
    """Of one of several images: its objects by falling score."""

    image: Image
    detections: list[DetectedObject]


class Detections(_Schema):
    """Answer of `POST /detect` for one image: objects by falling score."""

    model: Model
    image: Image
    detections: list[DetectedObject]


class DetectionsOfSeveral(_Schema):
    """Answer of `POST /detect` for several images, in their order; an image that is no good has an error."""

    model: Model
    results: list[ImageDetections | ErrorAnswer]


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


def image_size(size: tuple[int, int]) -> Image:
    """Of Pillow's (width, height)."""
    return Image(width=size[0], height=size[1])


def class_probabilities(predictions: list[Prediction]) -> list[ClassProbability]:
    """Of what a classifier answers."""
    return [ClassProbability.model_validate(prediction) for prediction in predictions]


def detected_objects(detections: list[Detection]) -> list[DetectedObject]:
    """Of what a detector answers."""
    return [DetectedObject.model_validate(detection) for detection in detections]
