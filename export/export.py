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
    GENERATED,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    Calibration,
    DetectionPreprocessing,
    File,
    Import,
    Licences,
    Manifest,
    Metrics,
    Name,
    Precision,
    Preprocessing,
    Provenance,
    Start,
    Training,
    Variant,
    Version,
)
from bundle.predictors import Predictor, make_predictor
from bundle.runtime import OnnxNetwork
from export.errors import ExportError
from export.graph import OPSET, export_graph
from export.model_card import model_card
from export.parity import check_parity, generated_images, make_inputs
from models.serving import served
from models.training import checkpoint as checkpoints
from models.training.calibration import calibration_error, with_temperature
from models.training.checkpoint import Checkpoint
from models.training.data import ClassificationData, Data, check_labels
from models.training.evaluation import ClassificationPredictions, measure, predict
from models.training.layouts import has_split, load_split
from models.training.network import TorchNetwork

_FULL_NAMES = {
    "vit": "Vision Transformer",
    "mlp_mixer": "MLP-Mixer",
    "resnetv2": "BiT",
    "resnet": "ResNet",
    "detr": "DETR",
}
_LARGEST_FILE = 2**31 - 2**20  # bytes of weights: protobuf's limit, less the graph
_PARITY_IMAGES = 48
_GENERATED_IMAGES = 12
_GOLDEN_IMAGES = 3
_GOLDEN_EDGES = 240, 320  # of detection, at most: the file stays small and a start quick


def export_run(
    run: Path, out: Path, *, data_path: Path | None = None, licences: Licences | None = None, data_notes: str = ""
) -> Manifest:
    """Write the bundle `out` (`.../<name>/<version>`) from the checkpoint of `run`.

    Accuracy and parity are measured on the split `test` of the data, or `val` where there is no `test`. Without data,
    which only an imported run may be, accuracy is not measured, and parity on generated images.

    Args:
        data_path: the data set; by default where it was when the run was trained.
        licences: terms of the weights and of the data, for manifest and card.
        data_notes: what a reader of the figures must know about the data.

    Raises:
        CheckpointError, DataError: the run or its data cannot be read.
        ExportError: `out` exists or is not named as a bundle is, or the weights are untrained or too large.
        ParityError: the ONNX file does not answer what torch answers.
    """
    if out.exists():
        raise ExportError(f"{out}: already there; a version is never changed, choose the next number")
    _check_name(out)
    checkpoint = checkpoints.load(run)
    if checkpoint.origin is not None and checkpoint.origin.untrained and checkpoint.progress is None:
        untrained = ", ".join(checkpoint.origin.untrained)
        raise ExportError(f"{run}: weights: expected a trained network, found random numbers in {untrained}")
    preprocessing = checkpoint.read_preprocessing()
    data = _evaluation_data(data_path, checkpoint)
    if data is None:
        images = generated_images(_GENERATED_IMAGES, preprocessing)
    else:
        images = [data.image(i) for i in range(min(_PARITY_IMAGES, len(data)))]
    network = checkpoint.build()
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _LARGEST_FILE:
        raise ExportError(f"{run}: weights: expected at most 2 GB, which an ONNX file holds, found {size / 1e9:.1f} GB")
    module = served(network, preprocessing.mean, preprocessing.std, checkpoint.temperature).eval()
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
        source = GENERATED if data is None else data.name
        parity = check_parity(torch_network, onnx_network, module.output_names, images, preprocessing, source)
        _write_golden(bundle / GOLDEN_FILE, onnx_network, module.output_names, images, preprocessing)
        predictor = make_predictor(onnx_network, preprocessing, checkpoint.labels)
        metrics, calibration = _measured(predictor, data, data_notes, checkpoint.temperature)
        manifest = Manifest(
            schema_version=2,
            name=out.parent.name,
            version=out.name,
            description=_description(checkpoint, data),
            architecture=checkpoint.architecture,
            task=preprocessing.task,
            inputs=onnx_network.inputs,
            outputs=onnx_network.outputs,
            preprocessing=preprocessing,
            labels=tuple(checkpoint.labels),
            metrics=metrics,
            parity=parity,
            calibration=calibration,
            variants={Precision.FP32: Variant()},
            default_reason="It is the only variant.",
            licences=licences or Licences(),
            provenance=Provenance(
                training=_training(checkpoint),
                imported=_imported(checkpoint),
                architecture_config={key: _plain(value) for key, value in checkpoint.settings.items()},
                parameters=sum(parameter.numel() for parameter in network.parameters()),
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


def _measured(
    predictor: Predictor, data: Data | None, notes: str, temperature: float
) -> tuple[Metrics | None, Calibration | None]:
    """How good the ONNX file's answers are, and how honest its probabilities, without and with the temperature."""
    if data is None:
        return None, None if temperature == 1 else Calibration(temperature=temperature)
    predictions = predict(predictor, data)
    values = measure(predictions, data)
    metrics = Metrics(data=data.name, split=data.split, images=len(data), values=values, notes=notes)
    if temperature == 1:
        return metrics, None
    assert isinstance(predictions, ClassificationPredictions)  # `served` refuses a detector with a temperature
    assert isinstance(data, ClassificationData)
    before = calibration_error(with_temperature(predictions.probabilities, 1 / temperature), data.class_ids)
    return metrics, Calibration(temperature=temperature, ece_before=before, ece_after=values["ECE"])


def _check_name(out: Path) -> None:
    for what, kind, value in (("name", Name, out.parent.name), ("version", Version, out.name)):
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise ExportError(f"{out}: {what}: {error.errors()[0]['msg']}, found {value!r}") from error


def _description(checkpoint: Checkpoint, data: Data | None) -> str:
    name = _FULL_NAMES[checkpoint.architecture]
    if checkpoint.progress is not None:
        trained_on = "" if data is None else f" on {data.name}"
        return f"{name} trained by Vitrine's recipe {checkpoint.progress.read_recipe().name}{trained_on}."
    assert checkpoint.origin is not None
    return f"{name} with the weights of {checkpoint.origin.file}."


def _training(checkpoint: Checkpoint) -> Training | None:
    progress = checkpoint.progress
    if progress is None:
        return None
    recipe, start = progress.read_recipe(), progress.start
    return Training(
        recipe=recipe.name,
        recipe_settings=dict(change.split("=", 1) for change in progress.changes),
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


def _evaluation_data(path: Path | None, checkpoint: Checkpoint) -> Data | None:
    if path is None:
        if checkpoint.progress is None:
            return None
        path = Path(checkpoint.progress.data_path)
    data = load_split(path, checkpoint.task, "test" if has_split(path, "test") else "val")
    check_labels(data, checkpoint.labels)
    return data


def _write_golden(
    file: Path,
    network: OnnxNetwork,
    output_names: Sequence[str],
    images: Sequence[Image.Image],
    preprocessing: Preprocessing,
) -> None:
    if isinstance(preprocessing, DetectionPreprocessing):
        shortest, longest = _GOLDEN_EDGES
        edges = {
            "shortest_edge": min(shortest, preprocessing.shortest_edge),
            "longest_edge": min(longest, preprocessing.longest_edge),
        }
        preprocessing = preprocessing.model_copy(update=edges)
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
