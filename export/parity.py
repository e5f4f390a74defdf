"""Compare the outputs of torch and ONNX Runtime, on several batch and image sizes."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from torch import nn

from vitrine.bundle.loading import load_bundle
from vitrine.bundle.manifest import GATE_METRIC, GENERATED, MODEL_FILE, Metrics, Parity, Precision, Preprocessing
from vitrine.bundle.runtime import CPU, OnnxNetwork
from vitrine.bundle.tolerances import CONFIDENT_SCORE, DIVERGENCE, METRIC, MIN_AGREEMENT, PARITY, SMALLEST_RELATIVE
from vitrine.export.errors import ExportError, ParityError
from vitrine.export.graph import served_module
from vitrine.export.inputs import Inputs, evaluation_data, make_inputs, parity_images, trace_size
from vitrine.models.serving import ServedClassifier, ServedDetector
from vitrine.models.training.checkpoint import Checkpoint, load_checkpoint
from vitrine.models.training.data.dataset import Data
from vitrine.models.training.evaluation.metrics import measure, predict
from vitrine.models.training.network import TorchNetwork, checkpoint_predictor

_BATCHES = (1, 3, 8)
_MAX_PIXELS = 8 * 480 * 640  # per batch: a dilated DETR's attention on eight large images takes 16 GB


def verify_run(run: Path, bundle: Path, *, data_path: Path | None = None, providers: Sequence[str] = CPU) -> Parity:
    """Compare a bundle's float32 graph with the torch network of a run again.

    Args:
        data_path: as of `export.export.export_run`.

    Raises:
        BundleError, CheckpointError, DataError: one of them cannot be read.
        ExportError: the bundle is not of this run.
        ParityError: the graph's outputs differ from torch's; the message names where in the network this begins.
    """
    manifest = load_bundle(bundle, variant=Precision.FP32, providers=providers).manifest
    checkpoint = load_checkpoint(run)
    for what, expected, found in (
        ("architecture", checkpoint.architecture, manifest.architecture),
        ("labels", tuple(checkpoint.labels), manifest.labels),
        ("preprocessing", checkpoint.read_preprocessing(), manifest.preprocessing),
    ):
        if expected != found:
            raise ExportError(f"{bundle}: {what}: expected that of {run}, {expected}, found {found}")
    data = evaluation_data(data_path, checkpoint)
    source = GENERATED if data is None else data.name
    images = parity_images(data, manifest.preprocessing)
    module = served_module(run, checkpoint)
    return check_parity(module, bundle / MODEL_FILE, images, manifest.preprocessing, source, providers)


def check_parity(
    module: ServedClassifier | ServedDetector,
    file: Path,
    images: Sequence[Image.Image],
    preprocessing: Preprocessing,
    data: str,
    providers: Sequence[str] = CPU,
) -> Parity:
    """Compare both runtimes on images of `data` in batches of 1, 3 and 8, smaller for large images.

    Every second image is cropped to another aspect ratio.

    Raises:
        ParityError: an output differs by more than `bundle.tolerances.PARITY`, or the classes do.
    """
    in_torch, in_onnx = TorchNetwork(module, torch.device("cpu")), OnnxNetwork(file, providers=providers)
    largest = dict.fromkeys((name for name in module.output_names if name != "class_ids"), 0.0)
    relative = dict(largest)
    same, compared = 0, 0
    for inputs in _batches(images, preprocessing):
        expected = dict(zip(module.output_names, in_torch(**inputs), strict=True))
        found = dict(zip(module.output_names, in_onnx(**inputs), strict=True))
        for name in largest:
            if expected[name].shape != found[name].shape:
                raise ParityError(name, quantity="shape", expected=expected[name].shape, found=found[name].shape)
            reference = expected[name].astype(np.float64)
            differences = np.abs(reference - found[name].astype(np.float64))
            counted = reference >= SMALLEST_RELATIVE
            largest[name] = max(largest[name], float(differences.max()))
            relative[name] = max(relative[name], float((differences[counted] / reference[counted]).max(initial=0)))
            if not differences.max() <= PARITY:
                limits = {"expected": f"<= {PARITY}", "found": f"{differences.max():.3g}"}
                begins = first_divergence(module, file, inputs)
                raise ParityError(name, quantity="largest difference", **limits, begins=begins)
        if "class_ids" in expected:
            agree = (expected["class_ids"] == found["class_ids"])[np.greater_equal(expected["scores"], CONFIDENT_SCORE)]
        else:
            agree = expected["probabilities"].argmax(axis=-1) == found["probabilities"].argmax(axis=-1)
        same, compared = same + int(agree.sum()), compared + agree.size
    agreement = same / compared if compared else 1.0
    if agreement < MIN_AGREEMENT:
        raise ParityError("classes", quantity="agreement", expected=f">= {MIN_AGREEMENT}", found=agreement)
    return Parity(data=data, images=len(images), max_abs_diff=largest, max_rel_diff=relative, top1_agreement=agreement)


def check_metrics(parity: Parity, checkpoint: Checkpoint, data: Data, metrics: Metrics) -> Parity:
    """Compare the graph's metrics with those of the torch network, and add the latter to `parity`.

    Raises:
        ParityError: top-1 accuracy or AP differs by more than `bundle.tolerances.METRIC`.
    """
    predictor, _ = checkpoint_predictor(checkpoint, torch.device("cpu"))
    in_torch = measure(predict(predictor, data), data)
    name = GATE_METRIC[checkpoint.task]
    if not abs(in_torch[name] - metrics.values[name]) <= METRIC:
        limits = {"expected": f"{in_torch[name]:.4f} to within {METRIC}", "found": f"{metrics.values[name]:.4f}"}
        raise ParityError(data.name, quantity=name, **limits)
    return parity.model_copy(update={"torch_metrics": in_torch})


def first_divergence(module: ServedClassifier | ServedDetector, file: Path, inputs: Inputs) -> str:
    """Describe where in the network the outputs begin to differ.

    Values of the graph with the name of a torch module (`export.graph`) are compared with that module's output, in the
    order of the graph.
    """
    model = onnx.load(file)
    parts = dict(module.named_modules())
    names = [name for node in model.graph.node for name in node.output if name in parts]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / file.name)
        session = onnxruntime.InferenceSession(Path(folder) / file.name, providers=list(CPU))
        found = dict(zip(names, session.run(names, inputs), strict=True))
    expected: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                expected[name] = output

        return hook

    hooks = [parts[name].register_forward_hook(keep(name)) for name in names]
    TorchNetwork(module, torch.device("cpu"))(**inputs)
    for hook in hooks:
        hook.remove()
    for name in (name for name in names if name in expected):
        reference = expected[name].numpy()
        if reference.shape != found[name].shape:
            return f"it begins in {name}, whose output is {reference.shape} in torch and {found[name].shape} in ONNX"
        difference = np.abs(reference - found[name]).max() / max(np.abs(reference).max(), 1e-6)
        if not difference <= DIVERGENCE:
            kind = type(parts[name]).__name__
            return f"it begins in {name} ({kind}), which differs by {difference:.2%} of its largest value"
    return f"all {len(names)} intermediate values agree to {DIVERGENCE:.1%}: it begins after them"


def _batches(images: Sequence[Image.Image], preprocessing: Preprocessing) -> Iterator[Inputs]:
    cropped = [image if i % 2 else _crop(image) for i, image in enumerate(images)]
    height, width = trace_size(preprocessing)
    limit = max(2, _MAX_PIXELS // (height * width))
    start = 0
    while start < len(cropped):
        for size in (min(size, limit) for size in _BATCHES):
            if batch := cropped[start : start + size]:
                yield make_inputs(batch, preprocessing)
            start += size


def _crop(image: Image.Image) -> Image.Image:
    """Return the left two thirds: another aspect ratio, and a size that was not traced."""
    return image.crop((0, 0, max(1, image.width * 2 // 3), image.height))
