"""The model card (README.md) of a bundle, written from its manifest alone, so that the two agree."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitrine.bundle.manifest import (
    BASELINES,
    CARD_FILE,
    GATE_METRIC,
    GENERATED,
    MANIFEST_FILE,
    NOT_STATED,
    ClassificationPreprocessing,
    Faithfulness,
    Manifest,
    Metrics,
    Precision,
    Task,
)
from vitrine.bundle.tolerances import MAX_DROP
from vitrine.export.pictures import RELIABILITY_FILE, SAMPLES_FILE
from vitrine.models.training.evaluation.metrics import label_metric, most_confused

BOX = "box"  # a map that marks the box of a detection
_MAX_LABELS = 100  # that a card lists
_MAX_COLUMNS = 12  # of a confusion matrix that a card shows
_PAIRS_WITH_MATRIX, _PAIRS = 3, 10  # most confused labels that are listed, with the matrix and without it

_METRIC_NAMES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "ECE": "expected calibration error (ECE)",
    "NLL": "negative log-likelihood (nats)",
    "AP": "AP (IoU 0.50:0.95)",
    "AP50": "AP50",
    "AP75": "AP75",
    "AP_small": "AP, small objects",
    "AP_medium": "AP, medium objects",
    "AP_large": "AP, large objects",
}


def model_card(manifest: Manifest) -> str:
    """Format the card as Markdown."""
    provenance = manifest.provenance
    settings = ", ".join(f"{key}={value}" for key, value in provenance.architecture_config.items())
    route, query = {
        Task.CLASSIFICATION: ("classify", "which of the labels an image shows"),
        Task.DETECTION: ("detect", "where in an image objects of the labels are"),
    }[manifest.task]
    sections = [
        f"# {manifest.name} {manifest.version}",
        f"{manifest.description} It predicts {query}.",
        "",
        f"- Architecture: `{manifest.architecture}` ({settings}), {provenance.parameters:,} parameters",
        f"- Labels: {_labels(manifest)}",
        f"- Licence of the weights: {manifest.licences.weights}. Terms of the training data: {manifest.licences.data}. "
        "Whether the terms of images extend to weights trained on them is legally unsettled: if in doubt, ask the "
        "owners of the data, or train the recipe on other images.",
        "",
        "## Measured",
        "",
        *_measured(manifest),
        *_samples(manifest),
        *_confusion(manifest),
        *_calibrated(manifest),
        "## ONNX against torch",
        "",
        _parity(manifest),
        "",
        *_variants(manifest),
        *_speed(manifest),
        *_explained(manifest),
        "## Limits",
        "",
        _limits(manifest),
        "",
        "## Reproduce",
        "",
        *_reproduce(manifest),
        "",
        "## Use",
        "",
        "```sh",
        f"curl -F image=@photo.jpg -F model={manifest.name} http://localhost:3000/{route}",
        "```",
        "",
        "Or with ONNX Runtime, NumPy and Pillow only, and no file of this folder but `model.onnx`:",
        "",
        "```python",
        *_snippet(manifest),
        "```",
        "",
    ]
    return "\n".join(sections)


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle, and its card; each replaces the file of before in one step."""
    for name, text in ((MANIFEST_FILE, _as_json(manifest)), (CARD_FILE, model_card(manifest))):
        hidden = bundle / f".{name}"
        hidden.write_text(text)
        hidden.replace(bundle / name)


def _as_json(manifest: Manifest) -> str:
    """Format as indented JSON, with lists of scalars on one line."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    plain = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s+\]")
    return plain.sub(lambda match: "[" + re.sub(r",\n *", ", ", match[1]) + "]", text) + "\n"


def _labels(manifest: Manifest) -> str:
    if len(manifest.labels) <= _MAX_LABELS:
        return ", ".join(manifest.labels)
    return f"{len(manifest.labels):,}, in the manifest"


def _measured(manifest: Manifest) -> list[str]:
    metrics = manifest.metrics
    if metrics is None:
        return ["Its accuracy was not measured here: the exporter had no labelled data.", ""]
    by_label = _by_label(manifest.labels, metrics)
    label_metrics = {name for names in by_label.values() for name in names}
    rows = [
        (_METRIC_NAMES.get(name, name), *_with_interval(name, metrics))
        for name in metrics.values
        if name not in label_metrics
    ]
    chosen = f"Training chose {metrics.chosen} by these images: on others, expect less. " if metrics.chosen else ""
    lines = [
        f"On the {metrics.images:,} images of `{metrics.data}`, split `{metrics.split}`, with `model.onnx` through "
        f"the predictor that serves it. {chosen}{metrics.notes}".strip(),
        "",
        *_table(("metric", "value", "95 % interval"), rows),
    ]
    if by_label and len(by_label) <= _MAX_LABELS:
        head = "label", "AP", "95 % interval", "AP50", "95 % interval"
        labels = [
            (label, *(cell for name in names for cell in _with_interval(name, metrics)))
            for label, names in by_label.items()
        ]
        lines += _table(head, labels)
    if metrics.intervals:
        lines += [
            "The intervals show the variation over other images of the same kind (bootstrap over the images), not over "
            "training runs.",
            "",
        ]
    return lines


def _by_label(labels: Sequence[str], metrics: Metrics) -> dict[str, tuple[str, str]]:
    """Return the names of AP and AP50 of each label that has them."""
    names = {label: (label_metric(label), f"AP50_{label}") for label in labels}
    return {label: pair for label, pair in names.items() if pair[1] in metrics.values}


def _with_interval(name: str, metrics: Metrics) -> tuple[str, str]:
    interval = metrics.intervals.get(name, ())
    return _metric_value(name, metrics.values[name]), " to ".join(_metric_value(name, bound) for bound in interval)


def _samples(manifest: Manifest) -> list[str]:
    if SAMPLES_FILE not in manifest.files:
        return []
    classified = manifest.task is Task.CLASSIFICATION
    drawn = "wrong predictions in red" if classified else "with detections that score at least 50 %"
    sentence = f"Evenly spaced images of that split, not selected by their predictions, {drawn}:"
    return [sentence, "", f"![predictions]({SAMPLES_FILE})", ""]


def _confusion(manifest: Manifest) -> list[str]:
    confusion = None if manifest.metrics is None else manifest.metrics.confusion
    if confusion is None:
        return []
    with_matrix = len(manifest.labels) <= _MAX_COLUMNS
    pairs = most_confused(np.array(confusion), manifest.labels, _PAIRS_WITH_MATRIX if with_matrix else _PAIRS)
    sentence = "No image is misclassified."
    if pairs:
        listed = (f"{pair.true} for {pair.predicted} ({pair.count:,}, {pair.share:.1%} of them)" for pair in pairs)
        sentence = f"Most often confused: {'; '.join(listed)}."
    if not with_matrix:
        return [sentence, ""]
    rows = [(label, *map(str, row)) for label, row in zip(manifest.labels, confusion, strict=True)]
    return [
        "Images by true label (rows) and predicted label (columns):",
        "",
        *_table(("", *manifest.labels), rows),
        sentence,
        "",
    ]


def _calibrated(manifest: Manifest) -> list[str]:
    calibration, lines = manifest.calibration, []
    if RELIABILITY_FILE in manifest.files:
        shown = "Accuracy by predicted probability" if manifest.task is Task.CLASSIFICATION else "Precision by score"
        lines += [f"{shown} (orange: overconfident, green: underconfident):", ""]
        lines += [f"![reliability]({RELIABILITY_FILE})", ""]
    lines += _thresholds(manifest)
    if calibration is None:
        return lines
    sentence = (
        f"The graph divides its logits by the temperature {calibration.temperature:.3g}, fitted on held-out images: "
        "the same predictions, with better calibrated probabilities."
    )
    if manifest.task is Task.DETECTION:
        sentence = (
            f"The graph divides the logits of its scores by {calibration.temperature:.3g} and adds "
            f"{calibration.offset:.3g}, fitted on held-out images: the same boxes in the same order, with scores that "
            "say how many are right."
        )
    if calibration.ece_before is not None and calibration.ece_after is not None:
        sentence += (
            f" The expected calibration error is {calibration.ece_after:.2%}, without "
            f"{'the temperature' if manifest.task is Task.CLASSIFICATION else 'this'} {calibration.ece_before:.2%}."
        )
    return [*lines, sentence, ""]


def _thresholds(manifest: Manifest) -> list[str]:
    points = None if manifest.metrics is None else manifest.metrics.thresholds
    if points is None:
        return []
    rows = [
        (f"{point.score:.2f}{' (best F1)' if point.best_f1 else ''}", f"{point.precision:.1%}", f"{point.recall:.1%}")
        for point in points
    ]
    best = next(point for point in points if point.best_f1)
    return [
        "What a `threshold` leaves: the share of answers that are right (label, and an IoU of at least 0.5) and the "
        "share of objects that are found. Raise it where a false alarm is expensive, lower it where a miss is; "
        f"`threshold={best.score:.2f}` balances both.",
        "",
        *_table(("threshold", "precision", "recall"), rows),
    ]


def _parity(manifest: Manifest) -> str:
    parity = manifest.parity
    images = f"{parity.images} {'generated images' if parity.data == GENERATED else f'images of `{parity.data}`'}"
    differences = ", ".join(
        f"{name} {value:.1e} (relative {parity.max_rel_diff[name]:.1e})" for name, value in parity.max_abs_diff.items()
    )
    sentence = (
        f"`model.onnx` in ONNX Runtime against the torch network, on {images} in batches of 1, 3 and 8: largest "
        f"difference {differences}; same class in {parity.top1_agreement:.2%}."
    )
    if parity.torch_metrics is None or manifest.metrics is None:
        return sentence
    name = GATE_METRIC[manifest.task]
    in_torch, in_onnx = (
        _metric_value(name, values[name]) for values in (parity.torch_metrics, manifest.metrics.values)
    )
    metric = f"{_METRIC_NAMES[name]} is {in_onnx}, in torch {in_torch}"
    return f"{sentence} On all {manifest.metrics.images:,} images, {metric}."


def _variants(manifest: Manifest) -> list[str]:
    if len(manifest.variants) == 1:
        return []
    name = GATE_METRIC[manifest.task]
    rows = []
    for precision, variant in manifest.variants.items():
        values = variant.metrics or ({} if manifest.metrics is None else manifest.metrics.values)
        rows.append(
            (
                f"`{precision.value}`",
                f"`{precision.file}`",
                _size(manifest.files[precision.file].size),
                _metric_value(name, values[name]) if name in values else "",
                "" if variant.drop is None else f"{0 - round(variant.drop, 2):+.2f}",
                "" if variant.agreement is None else f"{variant.agreement:.2%}",
                ", ".join(f"`{layer}`" for layer in variant.float_layers)
                or ("none" if precision in (Precision.INT8_DYNAMIC, Precision.INT8_STATIC) else ""),
            )
        )
    head = ("variant", "file", "size", _METRIC_NAMES[name], "points", "agreement with fp32", "layers left in float32")
    default = f"Default variant: `{manifest.default_variant.value}`. {manifest.default_reason}"
    return ["## Variants", "", *_table(head, rows), default, ""]


def _speed(manifest: Manifest) -> list[str]:
    latency = manifest.latency
    if latency is None:
        return []
    settings = [f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}" for batch, threads in latency.settings]
    rows = [
        (row.name, "" if row.size is None else _size(row.size), *map(_milliseconds, row.milliseconds))
        for row in latency.rows
    ]
    height, width = latency.input_size
    return [
        "## Speed",
        "",
        f"Milliseconds per call on {height} x {width} pixels, medians of interleaved calls, on {latency.machine}:",
        "",
        *_table(("", "file", *settings), rows),
    ]


def _explained(manifest: Manifest) -> list[str]:
    explanation = manifest.explanation
    if explanation is None:
        return []
    outputs = {
        ("attention", Task.CLASSIFICATION): "the attention of each layer, its rollout over the patches, "
        "and what the state after each block would be classified as",
        ("attention", Task.DETECTION): "the cross-attention of each query in the last decoder layer, and the "
        "self-attention of the encoder",
        ("class-activation", Task.CLASSIFICATION): "the class activation map of each label, whose sum plus the head's "
        "bias is the logit",
    }.get((explanation.method, manifest.task))
    sentences = (
        f"Patches of {explanation.patch_size} pixels are occluded one at a time, to see which the prediction needs."
        if outputs is None
        else f"`explain.onnx` returns {outputs}. It reads its weights from `model.onnx`."
    )
    command = f"vitrine explain bundles/{manifest.name}/{manifest.version} photo.jpg --out seen.png"
    return ["## Explanations", "", sentences, "", "```sh", command, "```", "", *_faithful(explanation.faithfulness)]


def _faithful(measured: Faithfulness | None) -> list[str]:
    if measured is None:
        return []
    rows = [
        (entry.name, *(f"{value:.3f}" for value in (entry.deletion, entry.insertion, entry.gain)))
        for entry in measured.maps
    ]
    known = (*BASELINES, BOX)
    methods = [entry.name for entry in measured.maps if entry.name not in known]
    behind = [name for name in measured.unfaithful if name in methods]
    verdict = "Every method is better than the baselines."
    if behind == methods:
        verdict = "No method is better than the baselines: the maps show what the network computes, not what it needs."
    elif behind:
        verdict = f"No better than a baseline, and therefore not the default: {', '.join(behind)}."
    return [
        f"Does the answer depend on what a map marks? On {measured.images} images of `{measured.data}`, split "
        f"`{measured.split}`: the mean area under the score of the answer while the hottest fifth, two fifths, ... of "
        "the pixels are hidden (deletion, low is good) or shown on a blurred copy (insertion, high is good; Petsiuk et "
        f"al. 2018). {', '.join(name for name in known if name in {entry.name for entry in measured.maps})} have not "
        f"seen the network. {verdict}",
        "",
        *_table(("map", "deletion", "insertion", "insertion - deletion"), rows),
    ]


def _snippet(manifest: Manifest) -> list[str]:
    preprocessing = manifest.preprocessing
    resampling = f"Image.Resampling.{preprocessing.interpolation.upper()}"
    start = [
        "import json, numpy as np, onnxruntime",
        "from PIL import Image, ImageOps",
        'session = onnxruntime.InferenceSession("model.onnx")',
        'about = json.loads(session.get_modelmeta().custom_metadata_map["vitrine"])',
        'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
    ]
    if isinstance(preprocessing, ClassificationPreprocessing):
        resized = f"image.resize((width, height), {resampling})"
        if preprocessing.crop_mode == "center":
            bleed = f", bleed={(1 - preprocessing.crop_pct) / 2:.6g}" if preprocessing.crop_pct < 1 else ""
            resized = f"ImageOps.fit(image, (width, height), {resampling}{bleed})"
        return [
            *start,
            'height, width = about["preprocessing"]["input_size"]',
            f"pixels = np.asarray({resized})[None]",
            '(probabilities,) = session.run(None, {"pixels": pixels})',
            "for i in (-probabilities[0]).argsort()[:5]:",
            '    print(about["labels"][i], probabilities[0, i])',
        ]
    edges = '("shortest_edge", "longest_edge")'
    return [
        *start,
        f'scale = min(about["preprocessing"][name] / edge for name, edge in zip({edges}, sorted(image.size)))',
        f"pixels = np.asarray(image.resize([round(scale * edge) for edge in image.size], {resampling}))[None]",
        'scores, class_ids, boxes = session.run(None, {"pixels": pixels, "sizes": np.array([pixels.shape[1:3]])})',
        "for i in np.flatnonzero(scores[0] >= 0.5):",
        '    print(about["labels"][class_ids[0, i]], scores[0, i], boxes[0, i] * (image.size * 2))',
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return [*(f"| {' | '.join(line)} |" for line in cells), ""]


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _limits(manifest: Manifest) -> str:
    labels = f"It knows only its {len(manifest.labels):,} labels"
    training = manifest.provenance.training
    if training is None:
        return (
            f"{labels}. Its publisher states what it was trained on and may be used for; images unlike that data get "
            "confident, wrong predictions."
        )
    trained = "" if manifest.metrics is None else f" and was trained on `{manifest.metrics.data}`"
    if manifest.provenance.imported is not None:
        start, alone = "from imported weights", ""
    elif training.start is not None:
        start, alone = f"from the weights of the run `{training.start.run}`", ""
    else:
        start, alone = "from random weights", " alone"
    return (
        f"{labels}{trained}{alone}, {start}. Images unlike that data get confident, wrong predictions. It is a "
        "demonstration, not fit for decisions about people, medicine or safety."
    )


def _reproduce(manifest: Manifest) -> list[str]:
    provenance, training, imported = manifest.provenance, manifest.provenance.training, manifest.provenance.imported
    run = f"runs/{manifest.name}"
    data = "" if manifest.metrics is None else f" --data DATA/{manifest.metrics.data}"
    software = f"torch {provenance.torch}, commit `{provenance.git_commit}`"
    export = f"vitrine export {run} --out bundles/{manifest.name}/{manifest.version}"
    start = None if training is None else training.start
    sentences, commands = [], []
    if imported is not None:
        into = run if start is None else f"runs/{start.run}"
        sentences.append(f"Imported from `{imported.file}` ({imported.layout}, SHA-256 `{imported.sha256}`)")
        commands.append(f"vitrine import {shlex.join((imported.file, *imported.arguments))} --out {shlex.quote(into)}")
    origin = ""
    if start is not None:
        sentences.append(f"Started from the run `{start.run}` (checkpoint's SHA-256 `{start.checkpoint_sha256}`)")
        origin = f" --from {shlex.quote(f'runs/{start.run}')}"
    if training is None:
        export += data
    else:
        minutes = f"{training.seconds / 60:.0f} minutes of training"
        sentences.append(f"Recipe `{training.recipe}`, {training.epochs} epochs in {minutes}, seed {training.seed}")
        settings = "".join(f" {shlex.quote(f'{key}={value}')}" for key, value in training.recipe_settings.items())
        commands.append(f"vitrine train {training.recipe}{data} --out {run}{origin}{settings}")
    export += _export_options(manifest)
    return [f"{'. '.join(sentences)}, {software}:", "", "```sh", *commands, export, "```"]


def _export_options(manifest: Manifest) -> str:
    """Return the options of `vitrine export` that differ from their defaults."""
    options = {
        "--licence": (manifest.licences.weights, NOT_STATED),
        "--data-licence": (manifest.licences.data, NOT_STATED),
        "--notes": ("" if manifest.metrics is None else manifest.metrics.notes, ""),
    }
    changed = [(option, value) for option, (value, default) in options.items() if value != default]
    changed += [("--variant", variant.value) for variant in manifest.variants if variant is not Precision.FP32]
    drop = max((variant.drop or 0.0 for variant in manifest.variants.values()), default=0.0)
    if drop > MAX_DROP:
        changed.append(("--max-drop", str(math.ceil(drop * 10) / 10)))
    if manifest.default_variant is not Precision.FP32:
        changed.append(("--default", manifest.default_variant.value))
    return "".join(f" \\\n    {option} {shlex.quote(value)}" for option, value in changed)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _metric_value(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "NLL" else f"{value:.2%}"
