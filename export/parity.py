"""Do torch and ONNX Runtime answer the same? Measured on odd batches and on odd sizes, on real images if there are."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from vitrine.bundle.images import pad_and_stack, to_classification_pixels, to_detection_pixels
from vitrine.bundle.manifest import ClassificationPreprocessing, Parity, Preprocessing
from vitrine.bundle.runtime import CPU, OnnxNetwork
from vitrine.bundle.tolerances import CONFIDENT_SCORE, DIVERGENCE, MIN_AGREEMENT, PARITY, SMALLEST_RELATIVE
from vitrine.export.errors import ParityError
from vitrine.models.serving import ServedClassifier, ServedDetector
from vitrine.models.training.network import TorchNetwork

_BATCHES = (1, 3, 8)
_MAX_PIXELS = 8 * 480 * 640  # of a batch: a dilated DETR's attention on eight large pictures takes 16 GB

Inputs = dict[str, NDArray[np.generic]]


def generated_images(count: int, preprocessing: Preprocessing) -> list[Image.Image]:
    """Coloured clouds with the structure of pictures at every scale, the same ones each time."""
    if isinstance(preprocessing, ClassificationPreprocessing):
        height, width = preprocessing.input_size
    else:
        height, width = preprocessing.shortest_edge, preprocessing.longest_edge
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        cloud = np.zeros((height, width, 3))
        for octave in range(1, 8):
            noise = random.normal(0, 1, (2**octave, 2**octave, 3))
            channels = [Image.fromarray(noise[..., c].astype(np.float32)) for c in range(3)]
            resized = [np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels]
            cloud += np.stack(resized, axis=-1) / octave
        images.append(Image.fromarray((128 + 48 * cloud).clip(0, 255).astype(np.uint8)))
    return images


def make_inputs(images: Sequence[Image.Image], preprocessing: Preprocessing) -> Inputs:
    """The graph's inputs for a batch of RGB images."""
    if isinstance(preprocessing, ClassificationPreprocessing):
        return {"pixels": np.stack([to_classification_pixels(image, preprocessing) for image in images])}
    pixels, sizes = pad_and_stack([to_detection_pixels(image, preprocessing) for image in images])
    return {"pixels": pixels, "sizes": sizes}


def check_parity(
    module: ServedClassifier | ServedDetector,
    file: Path,
    images: Sequence[Image.Image],
    preprocessing: Preprocessing,
    data: str,
    providers: Sequence[str] = CPU,
) -> Parity:
    """Compare both runtimes on the images (of `data`) in batches of 1, 3 and 8, fewer of large ones.

    Every second image is cut to another shape.

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
            wanted = expected[name].astype(np.float64)
            differences = np.abs(wanted - found[name].astype(np.float64))
            counted = wanted >= SMALLEST_RELATIVE
            largest[name] = max(largest[name], float(differences.max()))
            relative[name] = max(relative[name], float((differences[counted] / wanted[counted]).max(initial=0)))
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


def first_divergence(module: ServedClassifier | ServedDetector, file: Path, inputs: Inputs) -> str:
    """Where in the network the difference begins, as half a sentence.

    The values of the graph that bear the name of a torch module (`export.graph`) are compared with what that module
    answers, in the order of the graph.
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
        def hook(_: nn.Module, __: object, answer: object) -> None:
            if isinstance(answer, torch.Tensor):
                expected[name] = answer

        return hook

    hooks = [parts[name].register_forward_hook(keep(name)) for name in names]
    TorchNetwork(module, torch.device("cpu"))(**inputs)
    for hook in hooks:
        hook.remove()
    for name in (name for name in names if name in expected):
        wanted = expected[name].numpy()
        if wanted.shape != found[name].shape:
            return f"it begins in {name}, which answers {wanted.shape} in torch and {found[name].shape} in ONNX"
        difference = np.abs(wanted - found[name]).max() / max(np.abs(wanted).max(), 1e-6)
        if not difference <= DIVERGENCE:
            kind = type(parts[name]).__name__
            return f"it begins in {name} ({kind}), which differs by {difference:.2%} of its largest value"
    return f"all of {len(names)} inner values agree to {DIVERGENCE:.1%}: it begins behind them"


def _batches(images: Sequence[Image.Image], preprocessing: Preprocessing) -> Iterator[Inputs]:
    shaped = [image if i % 2 else _cut(image) for i, image in enumerate(images)]
    if isinstance(preprocessing, ClassificationPreprocessing):
        height, width = preprocessing.input_size
    else:
        height, width = preprocessing.shortest_edge, preprocessing.longest_edge
    most = max(2, _MAX_PIXELS // (height * width))
    start = 0
    while start < len(shaped):
        for size in (min(size, most) for size in _BATCHES):
            if batch := shaped[start : start + size]:
                yield make_inputs(batch, preprocessing)
            start += size


def _cut(image: Image.Image) -> Image.Image:
    """The left two thirds: another aspect ratio, and a size that was not traced."""
    return image.crop((0, 0, max(1, image.width * 2 // 3), image.height))
