"""The manifest of a bundle: the schema of `manifest.json`, and the names that bundles may have.

The manifest is the contract between export and service. It is strict (`extra="forbid"`, frozen) so that a bundle
written for another schema is refused instead of half understood.
"""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
EXPLAIN_FILE = "explain.onnx"
GOLDEN_FILE = "golden.npz"
CARD_FILE = "README.md"

METADATA_KEY = "vitrine"  # of an ONNX file's metadata: `Identity` as JSON

NOT_STATED = "not stated"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Channels = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]
Deviations = tuple[Positive, Positive, Positive]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Task(StrEnum):
    """What a bundle answers, in Hugging Face's task names."""

    CLASSIFICATION = "image-classification"
    DETECTION = "object-detection"


MAIN_METRIC = {Task.CLASSIFICATION: "top1", Task.DETECTION: "AP50"}  # every measured bundle states this one
GATE_METRIC = {Task.CLASSIFICATION: "top1", Task.DETECTION: "AP"}  # what a variant may lose of


class Precision(StrEnum):
    """The variants of a graph, by what its weights are stored and its sums are computed in."""

    FP32 = "fp32"
    FP16_WEIGHTS = "fp16-weights"  # half the file; computes in float32
    FP16 = "fp16"  # for GPUs: computes in float16
    INT8_DYNAMIC = "int8-dynamic"  # 8-bit weights, activations rounded to 8 bits by their range in each call
    INT8_STATIC = "int8-static"  # by their range on training images

    @property
    def file(self) -> str:
        """Its name in a bundle."""
        return MODEL_FILE if self is Precision.FP32 else f"model.{self.value}.onnx"


class Interpolation(StrEnum):
    """How pixels are resampled when an image is resized (Pillow, with antialiasing)."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class ClassificationPreprocessing(_Strict):
    """How an image becomes `pixels` (in timm's terms), and the mean/std (of 0..1 RGB) applied inside the graph."""

    task: Literal[Task.CLASSIFICATION] = Task.CLASSIFICATION
    input_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]  # height, width
    crop_mode: Literal["center", "squash"] = "center"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    interpolation: Interpolation = Interpolation.BILINEAR
    mean: Channels
    std: Deviations


class DetectionPreprocessing(_Strict):
    """How an image becomes `pixels`: aspect ratio kept, edges in pixels (DETR's rule), mean/std inside the graph."""

    task: Literal[Task.DETECTION] = Task.DETECTION
    shortest_edge: Annotated[int, Field(ge=1)]
    longest_edge: Annotated[int, Field(ge=1)]
    interpolation: Interpolation = Interpolation.BILINEAR
    mean: Channels
    std: Deviations

    @model_validator(mode="after")
    def _edges_in_order(self) -> Self:
        if self.longest_edge < self.shortest_edge:
            raise ValueError(f"longest_edge {self.longest_edge} is below shortest_edge {self.shortest_edge}")
        return self


Preprocessing = Annotated[ClassificationPreprocessing | DetectionPreprocessing, Field(discriminator="task")]


class TensorSpec(_Strict):
    """One input or output of the ONNX graph; an axis is a fixed length or the name of a dynamic one."""

    name: str
    datatype: Literal["UINT8", "INT64", "FP32"]  # KServe's names
    shape: tuple[int | str, ...]


class ReliabilityBin(_Strict):
    """Answers whose probability lies in one of equal parts of 0..1, the empty ones included (Guo et al. 2017)."""

    answers: Annotated[int, Field(ge=0)]
    confidence: float  # their mean probability, 0 where there are none
    accuracy: float  # share of them that is right


class Metrics(_Strict):
    """Measured on this bundle's ONNX file through `bundle`'s predictor."""

    data: str
    split: str
    images: Annotated[int, Field(ge=1)]
    values: dict[str, float]  # "top1", "top5", "ECE" or "AP", "AP50", ...: fractions, 0 to 1; and "NLL" in nats
    intervals: dict[str, tuple[float, float]] = {}  # 95 % of bootstrap samples of the images lie within
    confusion: tuple[tuple[int, ...], ...] | None = None  # images by true (rows) and answered label; None with many
    reliability: tuple[ReliabilityBin, ...] | None = None  # of a classifier
    notes: str = ""  # what a reader of these numbers must know about the data


GENERATED = "generated"  # parity images drawn by Vitrine itself, where the exporter had no data


class Parity(_Strict):
    """How far the ONNX file's answers are from torch's."""

    data: str  # the data set of the images, or GENERATED
    images: Annotated[int, Field(ge=1)]
    max_abs_diff: dict[str, float]  # by output name
    max_rel_diff: dict[str, float]  # of the values of at least 0.01
    top1_agreement: float
    torch_metrics: dict[str, float] | None = None  # as `Metrics.values`, of the torch network; None without data


class Variant(_Strict):
    """One ONNX file of the network."""

    metrics: dict[str, float] | None = None  # as `Metrics.values`, measured on this file; None without data
    drop: float | None = None  # points of `GATE_METRIC` below fp32; below 0 it is better
    agreement: float | None = None  # share of the images (of the objects found) that get fp32's answer
    float_layers: tuple[str, ...] = ()  # left in float32, because the answers suffer most from their rounding


class LatencyRow(_Strict):
    """How long one way to run the network takes."""

    name: str
    size: int | None  # bytes of its file; None where there is none
    milliseconds: tuple[Positive, ...]  # median of a call, for each of `Latency.settings`


class Latency(_Strict):
    """Ways to run the network beside each other, measured in turns in one run."""

    machine: str
    input_size: tuple[int, int]  # height and width in pixels
    settings: tuple[tuple[int, int], ...]  # batch and threads of each column
    rows: tuple[LatencyRow, ...]


class Explanation(_Strict):
    """How the bundle shows where its network looks."""

    method: Literal["attention", "class-activation", "occlusion"]
    patch_size: Annotated[int, Field(ge=1)] | None = None  # of "occlusion", in pixels
    outputs: tuple[TensorSpec, ...] = ()  # of `EXPLAIN_FILE`, those of the serving graph first; none of "occlusion"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.method == "occlusion") != (self.patch_size is not None) or (self.method == "occlusion") == bool(
            self.outputs
        ):
            raise ValueError("expected patch_size and no outputs for occlusion, outputs and no patch_size otherwise")
        return self


class Calibration(_Strict):
    """The temperature inside the graph's softmax, and the expected calibration error (ECE) without and with it."""

    temperature: Positive  # fitted on held-out images after training
    ece_before: Annotated[float, Field(ge=0, le=1)] | None = None  # on the images of `metrics`, None without them
    ece_after: Annotated[float, Field(ge=0, le=1)] | None = None


class Licences(_Strict):
    """Terms of what the bundle is made of."""

    weights: str = NOT_STATED
    data: str = NOT_STATED


class Start(_Strict):
    """The run whose weights a training started from."""

    run: str  # the name of its folder
    checkpoint_sha256: Sha256


class Training(_Strict):
    """How the weights were trained, enough to train them again."""

    recipe: str
    recipe_settings: dict[str, str | int | float | bool | None]
    epochs: int
    seed: int
    seconds: float
    start: Start | None = None  # None where it started from random weights


class Import(_Strict):
    """The published file that the weights were read from."""

    file: str
    sha256: Sha256
    layout: str
    arguments: tuple[str, ...]  # that `vitrine import` was given beside it


class Provenance(_Strict):
    """Where the weights come from, and what made the ONNX file of them."""

    training: Training | None = None
    imported: Import | None = None
    architecture_config: dict[str, str | int | float | bool | None]
    parameters: int
    git_commit: str
    torch: str
    onnx: str
    opset: int
    checkpoint_sha256: Sha256

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.training is None and self.imported is None:
            raise ValueError("neither training nor imported is given")
        return self


class File(_Strict):
    """What a file beside the manifest must be."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0)]  # bytes


class Identity(_Strict):
    """What a network is and how it is asked: all that serving it needs.

    Every ONNX file of a bundle carries it under `METADATA_KEY`, so that the file alone can be served.
    """

    schema_version: Literal[2]
    name: Name
    version: Version
    description: str
    architecture: str
    task: Task
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing
    labels: Annotated[tuple[str, ...], Field(min_length=1)]
    licences: Licences
    provenance: Provenance
    metrics: Metrics | None = None  # None where the exporter had no labelled data, and in the ONNX files

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.preprocessing.task is not self.task:
            raise ValueError(f"preprocessing is for {self.preprocessing.task}, the bundle for {self.task}")
        if self.metrics is not None and MAIN_METRIC[self.task] not in self.metrics.values:
            raise ValueError(f"metrics: {MAIN_METRIC[self.task]} is not among {', '.join(self.metrics.values)}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels are not unique")
        return self


class Manifest(Identity):
    """`manifest.json` of one bundle version."""

    parity: Parity
    calibration: Calibration | None = None  # None where the softmax is that of training
    variants: dict[Precision, Variant]
    default_variant: Precision = Precision.FP32
    default_reason: str
    latency: Latency | None = None  # None where it was not measured
    explanation: Explanation | None = None
    files: dict[str, File]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for known in {Precision.FP32, self.default_variant} - set(self.variants):
            raise ValueError(f"variants: {known.value} is not listed")
        required_files = [GOLDEN_FILE, *(variant.file for variant in self.variants)]
        if self.explanation is not None and self.explanation.outputs:
            required_files.append(EXPLAIN_FILE)
        for required in required_files:
            if required not in self.files:
                raise ValueError(f"files: {required} is not listed")
        for listed in self.files:
            if "/" in listed or listed in ("", ".", "..", MANIFEST_FILE):
                raise ValueError(f"files: {listed!r} is not the name of a file beside the manifest")
        return self
