"""Provenance of a bundle for its manifest: the origin of its weights and the software that wrote its files."""

import json
import subprocess
from pathlib import Path

import onnx
import torch

from vitrine.bundle.manifest import Import, Provenance, Start, Training
from vitrine.export.graph import OPSET
from vitrine.models.training.checkpoint import Checkpoint, checkpoint_sha256

_FULL_NAMES = {
    "vit": "Vision Transformer",
    "mlp_mixer": "MLP-Mixer",
    "resnetv2": "BiT",
    "efficientnet": "EfficientNet-Lite",
    "resnet": "ResNet",
    "detr": "DETR",
}


def describe(checkpoint: Checkpoint, data: str | None) -> str:
    """Describe the network in one sentence; `data` is the name of the data it was measured on."""
    name = _FULL_NAMES[checkpoint.architecture]
    if checkpoint.progress is not None:
        trained_on = "" if data is None else f" on {data}"
        return f"{name} trained by Vitrine's recipe {checkpoint.progress.read_recipe().name}{trained_on}."
    assert checkpoint.origin is not None
    return f"{name} with the weights of {checkpoint.origin.file}."


def provenance(run: Path, checkpoint: Checkpoint, parameters: int) -> Provenance:
    """Return the provenance of a bundle that is being exported."""
    return Provenance(
        training=_training(checkpoint),
        imported=_imported(checkpoint),
        architecture_config={key: _plain(value) for key, value in checkpoint.settings.items()},
        parameters=parameters,
        git_commit=_git_commit(),
        torch=torch.__version__,
        onnx=onnx.__version__,
        opset=OPSET,
        checkpoint_sha256=checkpoint_sha256(run),
    )


def _training(checkpoint: Checkpoint) -> Training | None:
    progress = checkpoint.progress
    if progress is None:
        return None
    recipe, start = progress.read_recipe(), progress.start
    settings = dict(change.split("=", 1) for change in progress.changes)
    settings.pop("features", None)  # a folder of the machine that trained
    return Training(
        recipe=recipe.name,
        recipe_settings=settings,
        epochs=progress.epoch,
        seed=recipe.seed,
        seconds=round(progress.seconds, 1),
        start=None if start is None else Start(run=start.run, checkpoint_sha256=start.sha256),
    )


def _imported(checkpoint: Checkpoint) -> Import | None:
    origin = checkpoint.origin
    if origin is None:
        return None
    return Import(file=origin.file, sha256=origin.sha256, layout=origin.layout, arguments=tuple(origin.arguments))


def _plain(value: object) -> str | int | float | bool | None:
    """Format lists as compact JSON, which `vitrine train` accepts."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, separators=(",", ":"))


def _git_commit() -> str:
    """Return the commit of the exporting code, "unknown" outside a checkout of it."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():  # an installed wheel, perhaps inside of somebody's repository
        return "unknown"
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
