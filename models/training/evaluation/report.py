"""`vitrine report`: training curves, metrics and mistakes of a run in one self-contained HTML file.

Metrics are computed with the serving predictor. Pictures are embedded as small JPEGs, charts as SVG.
"""

import base64
import io
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.manifest import Task
from vitrine.models.training.checkpoint import METRICS_FILE, Checkpoint, checkpoint_sha256, load_checkpoint
from vitrine.models.training.data.dataset import ClassificationData, Data, DetectionData
from vitrine.models.training.data.layouts import HELD_OUT, has_split, load_split, load_training_splits
from vitrine.models.training.errors import DataError
from vitrine.models.training.evaluation import calibration, charts
from vitrine.models.training.evaluation.calibration import (
    apply_temperature,
    bin_reliability,
    fit_temperature,
    reliability,
)
from vitrine.models.training.evaluation.charts import Chart, line_chart, reliability_chart
from vitrine.models.training.evaluation.metrics import (
    ClassificationPredictions,
    Confusion,
    DetectionPredictions,
    average_precision,
    confusion_matrix,
    is_metric,
    measure,
    most_confused,
    predict,
)
from vitrine.models.training.evaluation.mistakes import (
    DetectionMistakes,
    Misclassification,
    WrongImage,
    detection_mistakes,
    misclassifications,
)
from vitrine.models.training.evaluation.scores import right_detections
from vitrine.models.training.network import checkpoint_predictor, default_device, device_name
from vitrine.models.training.recipe import flatten

REPORT_FILE = "report.html"
_TEMPLATE = "report.html.jinja"
_MAX_CLASSES = 30  # of a confusion matrix that is shown
_MAX_CURVES = 7
_MAX_ROWS = 12  # of weakest classes and of confusions
_MAX_WRONG, _MAX_IMAGES = 24, 12  # of mistakes
_WRONG_EDGE, _IMAGE_EDGE = 160, 520  # of their pictures, in pixels
_NOT_LOSSES = {"epoch", "step", "seconds", "images_per_second", "lr", "grad_norm", "temperature"}
_TILES = ("top1", "top5", "ECE", "NLL", "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")

Line = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A thumbnail of an image, embedded in the page."""

    uri: str  # data:image/jpeg
    width: int  # of the original image, in pixels
    height: int
    name: str


@dataclass(frozen=True)
class ClassResult:
    """Recall and precision of one label."""

    label: str
    count: int  # of images
    recall: float  # fraction of them with this prediction
    precision: float | None  # fraction of correct predictions; None without predictions


@dataclass(frozen=True)
class ClassificationResult:
    """The page's content for a classifier."""

    matrix: list[list[int]] | None  # rows true, columns predicted; None with too many classes
    precision: list[float | None]  # per column
    weakest: list[ClassResult]
    confused: list[Confusion]
    calibration: list[Chart]
    calibration_notes: list[str]
    worst: list[tuple[Misclassification, Picture]]


@dataclass(frozen=True)
class LabelPrecision:
    """Average precision of one label; None without objects."""

    label: str
    count: int  # of objects
    ap: float | None
    ap50: float | None


@dataclass(frozen=True)
class DetectionResult:
    """The page's content for a detector."""

    classes: list[LabelPrecision]  # best first
    curves: Chart
    reliability: Chart
    mistakes: DetectionMistakes
    worst: list[tuple[WrongImage, Picture]]


def write_report(run: Path, out: Path | None = None, *, data_path: Path | None = None, split: str = "val") -> Path:
    """Write the report of a run and return its file, by default `report.html` in the run's folder.

    Args:
        data_path: the data set; by default its path at training.
        split: the split to evaluate; `val` is the data held out in training if the data set has no such split.

    Raises:
        CheckpointError, DataError: the run or its data cannot be read.
    """
    checkpoint = load_checkpoint(run)
    data, part = _load(checkpoint, run, data_path, split)
    device = default_device()
    predictor, _ = checkpoint_predictor(checkpoint, device)
    predictions = predict(predictor, data)
    metrics = measure(predictions, data)
    lines = read_metrics(run / METRICS_FILE)
    classified = detected = None
    if isinstance(predictions, ClassificationPredictions) and isinstance(data, ClassificationData):
        classified = _classification(predictions, data, checkpoint.temperature)
    elif isinstance(predictions, DetectionPredictions) and isinstance(data, DetectionData):
        detected = _detection(predictions, data)
    speed = f"{len(predictions.indices) / predictions.seconds:,.0f} images/s on {device_name(device)}"
    settings = flatten(checkpoint.progress.recipe if checkpoint.progress else checkpoint.settings)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(_TEMPLATE)
    page = template.render(
        name=run.resolve().name,
        checkpoint=checkpoint,
        data=data,
        part=part,
        tiles={name: metrics[name] for name in _TILES if name in metrics},
        facts=_facts(checkpoint, run, lines, speed),
        settings={key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()},
        curves=learning_curves(lines),
        classified=classified,
        detected=detected,
        charts=charts,
        bins=calibration.BINS,
    )
    file = out or run / REPORT_FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: the report could not be written: {error}") from error
    return file


def read_metrics(file: Path) -> list[Line]:
    """Read metrics.jsonl, empty if there is none; a line truncated by a crash is skipped."""
    if not file.is_file():
        return []
    lines: dict[int, Line] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("epoch"), int):
            lines[line["epoch"]] = line  # an epoch repeated after a crash replaces the first
    return [lines[epoch] for epoch in sorted(lines)]


def learning_curves(lines: list[Line]) -> list[Chart]:
    """Chart the loss, its parts, the validation metrics and the learning rate over the epochs."""
    values: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float) and np.isfinite(value):
                values.setdefault(name, []).append((line["epoch"], float(value)))
    parts = {name: points for name, points in values.items() if name not in _NOT_LOSSES and not is_metric(name)}
    drawn = []
    if "loss" in parts:
        drawn.append(line_chart("Training loss", {"loss": parts.pop("loss")}, x_label="epoch"))
    if parts:
        drawn.append(line_chart("Parts of the loss", parts, x_label="epoch"))
    for title, names in (
        ("Validation accuracy", ("top1", "top5")),
        ("Validation average precision", ("AP", "AP50", "AP75")),
    ):
        shown = {name: values[name] for name in names if name in values}
        if shown:
            drawn.append(line_chart(title, shown, x_label="epoch", y_range=(0, 1), percent=True))
    if "lr" in values:
        drawn.append(line_chart("Learning rate", {"lr": values["lr"]}, x_label="epoch"))
    return drawn


def _load(checkpoint: Checkpoint, run: Path, path: Path | None, split: str) -> tuple[Data, str]:
    progress = checkpoint.progress
    if path is None:
        if progress is None:
            raise DataError(f"{run}: it was imported and has no data set; pass --data")
        path = Path(progress.data_path)
    recipe = None if progress is None else progress.read_recipe()
    if split == "val" and recipe is not None and (recipe.held_out is not None or not has_split(path, "val")):
        _, held_out = load_training_splits(path, checkpoint.task, held_out=recipe.held_out, seed=recipe.seed)
        return held_out, HELD_OUT
    return load_split(path, checkpoint.task, split), split


def _facts(checkpoint: Checkpoint, run: Path, lines: list[Line], speed: str) -> dict[str, str]:
    progress, origin = checkpoint.progress, checkpoint.origin
    facts = {"Architecture": checkpoint.architecture}
    facts["Parameters"] = f"{sum(tensor.numel() for tensor in checkpoint.build().parameters()):,}"
    if progress is not None:
        facts["Recipe"] = str(progress.recipe["name"])
        facts["Trained on"] = Path(progress.data_path).name
        if progress.start is not None:
            facts["Started from"] = progress.start.run
        facts["Epochs"] = f"{progress.epoch} of {progress.recipe['epochs']}"
        facts["Training time"] = _duration(progress.seconds)
        if progress.epoch:
            facts["Time per epoch"] = _duration(progress.seconds / progress.epoch)
        if rates := [line["images_per_second"] for line in lines if "images_per_second" in line]:
            facts["Training speed"] = f"{statistics.median(rates):,.0f} images/s"
    if origin is not None:
        facts["Imported from"] = origin.file
        if origin.untrained and progress is None:
            facts["Not trained yet"] = ", ".join(origin.untrained)
    facts["Evaluation speed"] = speed
    if checkpoint.task is Task.CLASSIFICATION:
        facts["Temperature"] = f"{checkpoint.temperature:.3g}" if checkpoint.temperature != 1 else "1 (not calibrated)"
    facts["Checkpoint's SHA-256"] = f"{checkpoint_sha256(run)[:12]}…"
    return facts


def _classification(
    predictions: ClassificationPredictions, data: ClassificationData, temperature: float
) -> ClassificationResult:
    matrix = confusion_matrix(predictions, data)
    right, true, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    precision = [float(right[i] / count) if count else None for i, count in enumerate(predicted.tolist())]
    classes = [
        ClassResult(label, int(true[i]), float(right[i] / true[i]), precision[i])
        for i, label in enumerate(data.labels)
        if true[i]
    ]
    diagrams, notes = _calibration(predictions.probabilities, data.class_ids[predictions.indices], temperature)
    return ClassificationResult(
        matrix.tolist() if len(data.labels) <= _MAX_CLASSES else None,
        precision,
        sorted(classes, key=lambda result: result.recall)[:_MAX_ROWS],
        most_confused(matrix, data.labels, _MAX_ROWS),
        diagrams,
        notes,
        [
            (wrong, _picture(data, wrong.index, _WRONG_EDGE))
            for wrong in misclassifications(predictions, data, _MAX_WRONG)
        ],
    )


def _calibration(
    probabilities: NDArray[np.float32], class_ids: NDArray[np.int64], temperature: float
) -> tuple[list[Chart], list[str]]:
    """Chart reliability without and with the run's temperature, or one fitted here if the run has none."""
    if temperature != 1:
        before, after = apply_temperature(probabilities, 1 / temperature), probabilities.astype(np.float64)
        title = f"With temperature {temperature:.3g}, as served"
        note = "The temperature was fitted on the images that training held out; on those this error is optimistic."
    else:
        before, after = probabilities.astype(np.float64), probabilities.astype(np.float64)
        halves = np.arange(len(class_ids)) % 2 == 0, np.arange(len(class_ids)) % 2 == 1
        fitted = []
        for fit, use in (halves, halves[::-1]):
            fitted.append(fit_temperature(before[fit], class_ids[fit]))
            after[use] = apply_temperature(before[use], fitted[-1])
        title = f"With temperature {np.mean(fitted):.3g}, as it could be"
        note = (
            "The run has no temperature. The one shown was fitted here: on every second image for the others, "
            "so that no image is measured with a temperature that it was fitted with."
        )
    results = {"Without temperature": reliability(before, class_ids), title: reliability(after, class_ids)}
    return [reliability_chart(f"{title}: ECE {result.error:.2%}", result) for title, result in results.items()], [note]


def _detection(predictions: DetectionPredictions, data: DetectionData) -> DetectionResult:
    precision = average_precision(predictions, data)
    counts = np.bincount(
        np.concatenate([data.class_ids[i] for i in predictions.indices.tolist()]), minlength=len(data.labels)
    )
    classes = [
        LabelPrecision(label, int(count), *((float(ap), float(ap50)) if count else (None, None)))
        for label, count, ap, ap50 in zip(data.labels, counts, precision.by_class, precision.by_class_50, strict=True)
    ]
    mistakes = detection_mistakes(predictions, data, _MAX_IMAGES)
    largest = [int(i) for i in np.argsort(-counts, kind="stable")[:_MAX_CURVES] if counts[i]]
    recalls = np.linspace(0, 1, len(precision.precision_50)).tolist()
    curves = {data.labels[i]: list(zip(recalls, precision.precision_50[:, i].tolist(), strict=True)) for i in largest}
    if len(largest) > 1:
        mean = precision.precision_50[:, counts > 0].mean(axis=1).tolist()
        curves = {"all labels": list(zip(recalls, mean, strict=True)), **curves}
    return DetectionResult(
        sorted(classes, key=lambda result: -1 if result.ap is None else result.ap, reverse=True),
        line_chart(
            "Precision over recall at IoU 0.5",
            curves,
            x_label="recall",
            y_label="precision",
            x_range=(0, 1),
            y_range=(0, 1),
            percent=True,
        ),
        reliability_chart(
            "Reliability of the scores",
            bin_reliability(predictions.scores.astype(np.float64), right_detections(predictions, data)),
        ),
        mistakes,
        [(wrong, _picture(data, wrong.index, _IMAGE_EDGE)) for wrong in mistakes.worst],
    )


def _picture(data: Data, index: int, edge: int) -> Picture:
    image = data.image(index)
    thumbnail = image.copy()
    thumbnail.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    thumbnail.save(stream, "JPEG", quality=85, subsampling=0 if max(thumbnail.size) <= 64 else -1)
    uri = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return Picture(uri, image.width, image.height, Path(data.names[index]).name)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
