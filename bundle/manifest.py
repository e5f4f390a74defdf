"""The schema of `manifest.json`, and the names that bundles may have.

The manifest is the contract between export and service. It is strict (`extra="forbid"`, frozen), so that a bundle with
another schema is rejected instead of being read in part.
"""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
EXPLAIN_FILE = "explain.onnx"
GOLDEN_FILE = "golden.npz"
CARD_FILE = "README.md"

MAX_FILE_BYTES = 2**31 - 1  # an ONNX file's limit, set by protobuf

METADATA_KEY = "vitrine"  # key in an ONNX file's metadata; the value is `Identity` as JSON

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
    """The task of a bundle, by Hugging Face's names."""

    CLASSIFICATION = "image-classification"
    DETECTION = "object-detection"


MAIN_METRIC = {Task.CLASSIFICATION: "top1", Task.DETECTION: "AP50"}  # reported by every measured bundle
GATE_METRIC = {Task.CLASSIFICATION: "top1", Task.DETECTION: "AP"}  # limits what a variant may lose


class Precision(StrEnum):
    """The variants of a graph, by the precision of its weights and of its arithmetic."""

    FP32 = "fp32"
    FP16_WEIGHTS = "fp16-weights"  # half the file size; computes in float32
    FP16 = "fp16"  # for GPUs: computes in float16
    INT8_DYNAMIC = "int8-dynamic"  # 8-bit weights; activations quantised by their range in each call
    INT8_STATIC = "int8-static"  # 8-bit weights; activations quantised by their range on training images

    @property
    def file(self) -> str:
        """File name in a bundle."""
        return MODEL_FILE if self is Precision.FP32 else f"model.{self.value}.onnx"


class Interpolation(StrEnum):
    """Resampling filter for resizing (Pillow, with antialiasing)."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class ClassificationPreprocessing(_Strict):
    """How an image becomes `pixels`, in timm's terms; mean/std (of RGB in 0..1) are applied inside the graph."""

    task: Literal[Task.CLASSIFICATION] = Task.CLASSIFICATION
    input_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]  # height, width
    crop_mode: Literal["center", "squash"] = "center"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    interpolation: Interpolation = Interpolation.BILINEAR
    mean: Channels
    std: Deviations


class DetectionPreprocessing(_Strict):
    """How an image becomes `pixels`: DETR's resize, edges in pixels; mean/std are applied inside the graph."""

    task: Literal[Task.DETECTION] = Task.DETECTION
    shortest_edge: Annotated[int, Field(ge=1)]
    longest_edge: Annotated[int, Field(ge=1)]
    interpolation: Interpolation = Interpolation.BILINEAR
    mean: Channels
    std: Deviations

    @model_validator(mode="after")
    def _check_edges(self) -> Self:
        if self.longest_edge < self.shortest_edge:
            raise ValueError(f"longest_edge {self.longest_edge} is below shortest_edge {self.shortest_edge}")
        return self


Preprocessing = Annotated[ClassificationPreprocessing | DetectionPreprocessing, Field(discriminator="task")]


class TensorSpec(_Strict):
    """An input or output of the ONNX graph; each axis is a fixed length or the name of a dynamic axis."""

    name: str
    datatype: Literal["UINT8", "INT64", "FP32"]  # KServe's names
    shape: tuple[int | str, ...]


class ReliabilityBin(_Strict):
    """One bin of a reliability diagram: equal-width bins over 0..1, empty ones included (Guo et al. 2017)."""

    answers: Annotated[int, Field(ge=0)]
    confidence: float  # mean probability; 0 for an empty bin
    accuracy: float  # share of correct answers


class ScoreThreshold(_Strict):
    """A detector's answers from a score on; they are right if the label is right and the IoU at least 0.5."""

    score: float
    precision: float  # share of the answers that is right
    recall: float  # share of the objects that is found
    best_f1: bool = False  # highest harmonic mean of both


class Metrics(_Strict):
    """Metrics of this bundle's ONNX file, measured with the serving predictor."""

    data: str
    split: str
    images: Annotated[int, Field(ge=1)]
    values: dict[str, float]  # "top1", "top5", "ECE" or "AP", "AP50", ...: fractions, 0 to 1; and "NLL" in nats
    intervals: dict[str, tuple[float, float]] = {}  # 95 % bootstrap intervals over the images
    confusion: tuple[tuple[int, ...], ...] | None = None  # images by true label (row) and prediction; None if too large
    reliability: tuple[ReliabilityBin, ...] | None = None
    thresholds: tuple[ScoreThreshold, ...] | None = None  # detectors only, by ascending score
    chosen: str = ""  # what training chose by these images, so that the values are optimistic; empty: nothing
    notes: str = ""  # caveats about the data


GENERATED = "generated"  # images drawn by Vitrine, if there was no data at export


class Parity(_Strict):
    """Differences between the ONNX file's outputs and torch's."""

    data: str  # name of the data set, or GENERATED
    images: Annotated[int, Field(ge=1)]
    max_abs_diff: dict[str, float]  # by output name
    max_rel_diff: dict[str, float]  # over values of at least 0.01
    top1_agreement: float
    torch_metrics: dict[str, float] | None = None  # as `Metrics.values`, for the torch network; None without data


class Variant(_Strict):
    """One ONNX file of the network."""

    metrics: dict[str, float] | None = None  # as `Metrics.values`, measured on this file; None without data
    drop: float | None = None  # points of `GATE_METRIC` lost against fp32; negative if better
    agreement: float | None = None  # share of images (detections) with the same answer as fp32
    float_layers: tuple[str, ...] = ()  # kept in float32, as most sensitive to quantisation


class LatencyRow(_Strict):
    """Latency of one way to run the network."""

    name: str
    size: int | None  # bytes of its file; None without a file
    milliseconds: tuple[Positive, ...]  # median per call, for each of `Latency.settings`


class Latency(_Strict):
    """Latencies of several ways to run the network, measured interleaved in one run."""

    machine: str
    input_size: tuple[int, int]  # height and width in pixels
    settings: tuple[tuple[int, int], ...]  # batch size and threads of each column
    rows: tuple[LatencyRow, ...]


BASELINES = ("random", "centre")  # maps that have not seen the network


class FaithfulMap(_Strict):
    """How much the answers depend on what maps of one kind mark: mean areas under curves of the answer's score."""

    name: str  # of a method, or of a baseline
    deletion: float  # while the hottest parts are hidden; a faithful map has a small one
    insertion: float  # while they are shown; a faithful map has a large one

    @property
    def gain(self) -> float:
        """The larger, the more faithful."""
        return self.insertion - self.deletion


class Faithfulness(_Strict):
    """Deletion and insertion curves (Petsiuk et al. 2018) of a bundle's methods and of baselines."""

    data: str
    split: str
    images: Annotated[int, Field(ge=1)]
    maps: tuple[FaithfulMap, ...]

    @property
    def unfaithful(self) -> tuple[str, ...]:
        """The methods that are no better than one of `BASELINES`."""
        best = max((entry.gain for entry in self.maps if entry.name in BASELINES), default=-1.0)
        return tuple(entry.name for entry in self.maps if entry.gain <= best)


class Explanation(_Strict):
    """How the bundle explains its answers."""

    method: Literal["attention", "class-activation", "occlusion"]
    patch_size: Annotated[int, Field(ge=1)] | None = None  # for "occlusion", in pixels
    outputs: tuple[TensorSpec, ...] = ()  # of `EXPLAIN_FILE`, the serving graph's first; empty for "occlusion"
    faithfulness: Faithfulness | None = None  # None if not measured

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if (self.method == "occlusion") != (self.patch_size is not None) or (self.method == "occlusion") == bool(
            self.outputs
        ):
            raise ValueError("expected patch_size and no outputs for occlusion, outputs and no patch_size otherwise")
        return self


class Calibration(_Strict):
    """What the graph divides its logits by, and the expected calibration error (ECE) before and after.

    Of a classifier's softmax, or of a detector's sigmoid scores, to which an offset is added.
    """

    temperature: Positive  # fitted to held-out images after training
    offset: float = 0.0
    ece_before: Annotated[float, Field(ge=0, le=1)] | None = None  # on the images of `metrics`; None without data
    ece_after: Annotated[float, Field(ge=0, le=1)] | None = None


class Licences(_Strict):
    """Licences of the bundle's weights and data."""

    weights: str = NOT_STATED
    data: str = NOT_STATED


class Start(_Strict):
    """The run whose weights training started from."""

    run: str  # name of its folder
    checkpoint_sha256: Sha256


class Training(_Strict):
    """How the weights were trained: all that is needed to repeat it."""

    recipe: str
    recipe_settings: dict[str, str | int | float | bool | None]
    epochs: int
    seed: int
    seconds: float
    start: Start | None = None  # None for random weights


class Import(_Strict):
    """The published file that the weights were read from."""

    file: str
    sha256: Sha256
    layout: str
    arguments: tuple[str, ...]  # further arguments of `vitrine import`


class Provenance(_Strict):
    """Origin of the weights, and the versions that made the ONNX file."""

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
    def _check_source(self) -> Self:
        if self.training is None and self.imported is None:
            raise ValueError("neither training nor imported is given")
        return self


class File(_Strict):
    """Expected hash and size of a file of the bundle."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]


class Identity(_Strict):
    """All that serving a network needs.

    Every ONNX file of a bundle carries it under `METADATA_KEY`, so that a single file can be served.
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
    metrics: Metrics | None = None  # None without labelled data, and inside ONNX files

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
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
    calibration: Calibration | None = None  # None if the softmax has no temperature
    variants: dict[Precision, Variant]
    default_variant: Precision = Precision.FP32
    default_reason: str
    latency: Latency | None = None  # None if not measured
    explanation: Explanation | None = None
    files: dict[str, File]

    @property
    def has_explain_graph(self) -> bool:
        """Whether there is a graph that explains the answers."""
        return self.explanation is not None and bool(self.explanation.outputs)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file, by name."""
        return {name: file.sha256 for name, file in self.files.items()}

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        for missing in {Precision.FP32, self.default_variant} - set(self.variants):
            raise ValueError(f"variants: {missing.value} is not listed")
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
