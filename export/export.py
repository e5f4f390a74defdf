"""`vitrine export`: from a run to a verified bundle, or to an error that leaves nothing behind."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from bundle.loading import hash_file, load_bundle
from bundle.manifest import (
    CARD_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    ClassificationPreprocessing,
    DetectionPreprocessing,
    File,
    Licences,
    Manifest,
    Metrics,
    Name,
    Provenance,
    Version,
)
from bundle.predictors import make_predictor
from bundle.runtime import OnnxNetwork
from export.errors import ExportError
from export.graph import OPSET, export_graph
from export.model_card import model_card
from export.parity import check_parity, make_inputs
from models.serving import served
from models.training import checkpoint as checkpoints
from models.training.data import Data, has_split, load_split
from models.training.evaluation import evaluate
from models.training.network import TorchNetwork

_FULL_NAMES = {"vit": "Vision Transformer", "mlp_mixer": "MLP-Mixer", "detr": "DETR"}
_PARITY_IMAGES = 48
_GOLDEN_IMAGES = 3


def export_run(
    run: Path, out: Path, *, data_path: Path | None = None, licences: Licences | None = None, data_notes: str = ""
) -> Manifest:
    """Write the bundle `out` (`.../<name>/<version>`) from the checkpoint of `run`.

    Accuracy and parity are measured on the split `test` of the data, or `val` where there is no `test`.

    Args:
        data_path: the data set; by default where it was when the run was trained.
        licences: terms of the weights and of the data, for manifest and card.
        data_notes: what a reader of the figures must know about the data.

    Raises:
        CheckpointError, DataError: the run or its data cannot be read.
        ExportError: `out` exists or is not named as a bundle is.
        ParityError: the ONNX file does not answer what torch answers.
    """
    if out.exists():
        raise ExportError(f"{out}: already there; a version is never changed, choose the next number")
    _check_name(out)
    checkpoint = checkpoints.load(run)
    recipe = checkpoint.read_recipe()
    preprocessing = recipe.preprocessing
    data = _evaluation_data(data_path or Path(checkpoint.data_path), checkpoint)
    images = [data.image(i) for i in range(min(_PARITY_IMAGES, len(data)))]
    network = checkpoint.build()
    module = served(network, preprocessing.mean, preprocessing.std).eval()
    if isinstance(preprocessing, DetectionPreprocessing):
        input_size = preprocessing.shortest_edge, preprocessing.longest_edge
    else:
        input_size = preprocessing.input_size

    out.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent.parent) as partial:
        # load_bundle holds a manifest against its folder's name
        bundle = Path(partial) / out.parent.name / out.name
        bundle.mkdir(parents=True)
        export_graph(module, input_size, bundle / MODEL_FILE)
        onnx_network = OnnxNetwork(bundle / MODEL_FILE)
        torch_network = TorchNetwork(module, torch.device("cpu"))
        parity = check_parity(torch_network, onnx_network, module.output_names, images, preprocessing)
        _write_golden(bundle / GOLDEN_FILE, onnx_network, module.output_names, images, preprocessing)
        metrics = evaluate(make_predictor(onnx_network, preprocessing, checkpoint.labels), data)
        manifest = Manifest(
            schema_version=1,
            name=out.parent.name,
            version=out.name,
            description=f"{_FULL_NAMES[recipe.architecture]} trained by Vitrine's recipe {recipe.name} on {data.name}.",
            architecture=recipe.architecture,
            task=recipe.task,
            inputs=onnx_network.inputs,
            outputs=onnx_network.outputs,
            preprocessing=preprocessing,
            labels=tuple(checkpoint.labels),
            metrics=Metrics(data=data.name, split=data.split, images=len(data), values=metrics, notes=data_notes),
            parity=parity,
            licences=licences or Licences(),
            provenance=Provenance(
                recipe=recipe.name,
                recipe_settings={key: _plain(value) for key, value in recipe.changed_settings().items()},
                architecture_config={key: _plain(value) for key, value in recipe.model.items()},
                epochs=checkpoint.epoch,
                seed=recipe.seed,
                parameters=sum(parameter.numel() for parameter in network.parameters()),
                training_seconds=round(checkpoint.seconds, 1),
                git_commit=_git_commit(),
                torch=torch.__version__,
                onnx=onnx.__version__,
                opset=OPSET,
                checkpoint_sha256=checkpoints.sha256(run),
            ),
            files={
                name: File(sha256=hash_file(bundle / name), size=(bundle / name).stat().st_size)
                for name in (MODEL_FILE, GOLDEN_FILE)
            },
        )
        (bundle / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
        (bundle / CARD_FILE).write_text(model_card(manifest))
        load_bundle(bundle)
        out.parent.mkdir(exist_ok=True)
        bundle.rename(out)
    return manifest


def _check_name(out: Path) -> None:
    for what, kind, value in (("name", Name, out.parent.name), ("version", Version, out.name)):
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise ExportError(f"{out}: {what}: {error.errors()[0]['msg']}, found {value!r}") from error


def _evaluation_data(path: Path, checkpoint: checkpoints.Checkpoint) -> Data:
    task = checkpoint.read_recipe().task
    data = load_split(path, task, "test" if has_split(path, "test") else "val")
    if list(data.labels) != checkpoint.labels:
        raise ExportError(f"{path}: labels: expected {checkpoint.labels}, found {list(data.labels)}")
    return data


def _write_golden(
    file: Path,
    network: OnnxNetwork,
    output_names: Sequence[str],
    images: Sequence[Image.Image],
    preprocessing: ClassificationPreprocessing | DetectionPreprocessing,
) -> None:
    inputs = make_inputs(images[:_GOLDEN_IMAGES], preprocessing)
    outputs = dict(zip(output_names, network(**inputs), strict=True))
    np.savez_compressed(file, allow_pickle=False, **inputs, **outputs)


def _plain(value: object) -> str | int | float | bool | None:
    """Lists as compact JSON, which `vitrine train` reads back."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, separators=(",", ":"))


def _git_commit() -> str:
    """The commit of the code that exports, "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
