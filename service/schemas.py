"""The JSON bodies of HTTP answers."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from bundle.loading import Bundle
from bundle.manifest import Metrics, Task
from bundle.predictors import Detection, Prediction


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)


class Model(_Schema):
    """Which bundle answered."""

    name: str
    version: str


class Image(_Schema):
    """The upright image as it was understood, in pixels."""

    width: int
    height: int


class ClassProbability(_Schema):
    """One class."""

    label: str
    class_id: int
    probability: float = Field(ge=0, le=1)


class Classification(_Schema):
    """Answer of `POST /classify`: classes by falling probability."""

    model: Model
    image: Image
    predictions: list[ClassProbability]

    @classmethod
    def of(cls, bundle: Bundle, size: tuple[int, int], predictions: list[Prediction]) -> Self:
        return cls.model_validate(
            {"model": _model(bundle), "image": _image(size), "predictions": predictions}, from_attributes=True
        )


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


class Detections(_Schema):
    """Answer of `POST /detect`: objects by falling score."""

    model: Model
    image: Image
    detections: list[DetectedObject]

    @classmethod
    def of(cls, bundle: Bundle, size: tuple[int, int], detections: list[Detection]) -> Self:
        return cls.model_validate(
            {"model": _model(bundle), "image": _image(size), "detections": detections}, from_attributes=True
        )


class ModelDescription(_Schema):
    """A served bundle."""

    name: str
    version: str
    task: Task
    architecture: str
    description: str
    labels: list[str]
    metrics: Metrics | None  # None if its exporter had no labelled data


class ModelList(_Schema):
    """Answer of `GET /models`."""

    models: list[ModelDescription]


class Error(_Schema):
    """What went wrong."""

    code: str  # stable and machine-readable
    message: str  # for people: what, where, expected, found


class ErrorAnswer(_Schema):
    """The body of every answer with a status of 400 or above."""

    error: Error


def _model(bundle: Bundle) -> Model:
    return Model(name=bundle.manifest.name, version=bundle.manifest.version)


def _image(size: tuple[int, int]) -> Image:
    return Image(width=size[0], height=size[1])
