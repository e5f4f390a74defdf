"""The model card (README.md) of a bundle, written from its manifest alone so that the two cannot disagree."""

import shlex

from bundle.manifest import GENERATED, NOT_STATED, Manifest, Task

_MOST_LABELS = 100  # that a card lists

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
    """Markdown."""
    provenance = manifest.provenance
    settings = ", ".join(f"{key}={value}" for key, value in provenance.architecture_config.items())
    route, question = {
        Task.CLASSIFICATION: ("classify", "which of the labels an image shows"),
        Task.DETECTION: ("detect", "where in an image objects of the labels are"),
    }[manifest.task]
    sections = [
        f"# {manifest.name} {manifest.version}",
        f"{manifest.description} It answers {question}.",
        "",
        f"- Architecture: `{manifest.architecture}` ({settings}), {provenance.parameters:,} parameters",
        f"- Labels: {_labels(manifest)}",
        f"- Licence of the weights: {manifest.licences.weights}. Terms of the training data: {manifest.licences.data}.",
        "",
        "## Measured",
        "",
        *_measured(manifest),
        "",
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
    ]
    return "\n".join(sections)


def _labels(manifest: Manifest) -> str:
    if len(manifest.labels) <= _MOST_LABELS:
        return ", ".join(manifest.labels)
    return f"{len(manifest.labels):,}, in the manifest"


def _measured(manifest: Manifest) -> list[str]:
    metrics, parity = manifest.metrics, manifest.parity
    images = f"{parity.images} {'generated images' if parity.data == GENERATED else f'images of `{parity.data}`'}"
    differences = ", ".join(f"{name} {value:.1e}" for name, value in parity.max_abs_diff.items())
    agreement = (
        f"ONNX Runtime against torch on {images}: largest difference {differences}; "
        f"same class in {parity.top1_agreement:.2%}."
    )
    calibrated = _calibrated(manifest)
    if metrics is None:
        return ["Its accuracy was not measured here: the exporter had no labelled data.", "", *calibrated, agreement]
    return [
        f"On the {metrics.images:,} images of `{metrics.data}`, split `{metrics.split}`, with this ONNX file through "
        f"the predictor that serves it. {metrics.notes}".strip(),
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {_metric_name(name)} | {_metric_value(name, value)} |" for name, value in metrics.values.items()),
        "",
        *calibrated,
        agreement,
    ]


def _calibrated(manifest: Manifest) -> list[str]:
    calibration = manifest.calibration
    if calibration is None:
        return []
    said = (
        f"The graph divides its logits by the temperature {calibration.temperature:.3g}, fitted on held-out images: "
        "the same answers, with more honest probabilities."
    )
    if calibration.ece_before is not None and calibration.ece_after is not None:
        said += (
            f" The expected calibration error is {calibration.ece_after:.2%}, without the temperature "
            f"{calibration.ece_before:.2%}."
        )
    return [said, ""]


def _limits(manifest: Manifest) -> str:
    known = f"It knows only its {len(manifest.labels):,} labels"
    training = manifest.provenance.training
    if training is None:
        return (
            f"{known}. What it was trained on, and what it may be used for, its publisher says; pictures that look "
            "unlike that data get confident, wrong answers."
        )
    trained = "" if manifest.metrics is None else f" and was trained on `{manifest.metrics.data}`"
    if manifest.provenance.imported is not None:
        start, alone = "from imported weights", ""
    elif training.start is not None:
        start, alone = f"from the weights of the run `{training.start.run}`", ""
    else:
        start, alone = "from random weights", " alone"
    return (
        f"{known}{trained}{alone}, {start}. Pictures that look unlike that data get confident, wrong answers. It is a "
        "demonstration, not fit for decisions about people, medicine or safety."
    )


def _reproduce(manifest: Manifest) -> list[str]:
    provenance, training, imported = manifest.provenance, manifest.provenance.training, manifest.provenance.imported
    run = f"runs/{manifest.name}"
    data = "" if manifest.metrics is None else f" --data DATA/{manifest.metrics.data}"
    made_by = f"torch {provenance.torch}, commit `{provenance.git_commit}`"
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
    return [f"{'. '.join(sentences)}, {made_by}:", "", "```sh", *commands, f"{export}{_stated(manifest)}", "```"]


def _stated(manifest: Manifest) -> str:
    """The options of `vitrine export` that said what only its user could know."""
    options = {
        "--licence": (manifest.licences.weights, NOT_STATED),
        "--data-licence": (manifest.licences.data, NOT_STATED),
        "--data-notes": ("" if manifest.metrics is None else manifest.metrics.notes, ""),
    }
    return "".join(
        f" \\\n    {option} {shlex.quote(value)}" for option, (value, default) in options.items() if value != default
    )


def _metric_name(name: str) -> str:
    if name in _METRIC_NAMES:
        return _METRIC_NAMES[name]
    if name.startswith("AP50_"):
        return f"AP50, {name.removeprefix('AP50_')}"
    if name.startswith("AP_"):
        return f"AP, {name.removeprefix('AP_')}"
    return name


def _metric_value(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "NLL" else f"{value:.2%}"
