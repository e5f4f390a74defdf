"""The model card (README.md) of a bundle, written from its manifest alone so that the two cannot disagree."""

import shlex

from bundle.manifest import NOT_STATED, Manifest, Task

_METRIC_NAMES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "AP": "AP (IoU 0.50:0.95)",
    "AP50": "AP50",
    "AP75": "AP75",
    "AP_small": "AP, small objects",
    "AP_medium": "AP, medium objects",
    "AP_large": "AP, large objects",
}


def model_card(manifest: Manifest) -> str:
    """Markdown."""
    metrics, provenance, parity = manifest.metrics, manifest.provenance, manifest.parity
    rows = [f"| {_metric_name(name)} | {value:.2%} |" for name, value in metrics.values.items()]
    settings = ", ".join(f"{key}={value}" for key, value in provenance.architecture_config.items())
    differences = ", ".join(f"{name} {value:.1e}" for name, value in parity.max_abs_diff.items())
    route, question = {
        Task.CLASSIFICATION: ("classify", "which of the labels an image shows"),
        Task.DETECTION: ("detect", "where in an image objects of the labels are"),
    }[manifest.task]
    sections = [
        f"# {manifest.name} {manifest.version}",
        f"{manifest.description} It answers {question}.",
        "",
        f"- Architecture: `{manifest.architecture}` ({settings}), {provenance.parameters:,} parameters",
        f"- Labels: {', '.join(manifest.labels)}",
        f"- Licence of the weights: {manifest.licences.weights}. Terms of the training data: {manifest.licences.data}.",
        "",
        "## Measured",
        "",
        f"On the {metrics.images:,} images of `{metrics.data}`, split `{metrics.split}`, with this ONNX file through "
        f"the predictor that serves it. {metrics.notes}".strip(),
        "",
        "| metric | value |",
        "|---|---|",
        *rows,
        "",
        f"ONNX Runtime against torch on {parity.images} of these images: largest difference {differences}; "
        f"same class in {parity.top1_agreement:.2%}.",
        "",
        "## Limits",
        "",
        f"It knows only its {len(manifest.labels)} labels and was trained on `{metrics.data}` alone, from random "
        "weights. Pictures that look unlike that data get confident, wrong answers. It is a demonstration, not fit for "
        "decisions about people, medicine or safety.",
        "",
        "## Reproduce",
        "",
        f"Recipe `{provenance.recipe}`, {provenance.epochs} epochs in {provenance.training_seconds / 60:.0f} minutes "
        f"of training, seed {provenance.seed}, torch {provenance.torch}, commit `{provenance.git_commit}`:",
        "",
        "```sh",
        f"vitrine train {provenance.recipe} --data DATA/{metrics.data} --out runs/{manifest.name} "
        f"{' '.join(shlex.quote(f'{key}={value}') for key, value in provenance.recipe_settings.items())}".strip(),
        f"vitrine export runs/{manifest.name} --out bundles/{manifest.name}/{manifest.version}{_stated(manifest)}",
        "```",
        "",
        "## Use",
        "",
        "```sh",
        f"curl -F image=@photo.jpg -F model={manifest.name} http://localhost:3000/{route}",
        "```",
        "",
    ]
    return "\n".join(sections)


def _stated(manifest: Manifest) -> str:
    """The options of `vitrine export` that said what only its user could know."""
    options = {
        "--licence": (manifest.licences.weights, NOT_STATED),
        "--data-licence": (manifest.licences.data, NOT_STATED),
        "--data-notes": (manifest.metrics.notes, ""),
    }
    return "".join(
        f" \\\n    {option} {shlex.quote(value)}" for option, (value, default) in options.items() if value != default
    )


def _metric_name(name: str) -> str:
    if name.startswith("AP50_"):
        return f"AP50, {name.removeprefix('AP50_')}"
    return _METRIC_NAMES.get(name, name)
