"""Do torch and ONNX Runtime answer the same? Measured on odd batches and on odd sizes, on real images if there are."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bundle.images import pad_and_stack, to_classification_pixels, to_detection_pixels
from bundle.loading import CONFIDENT_SCORE
from bundle.manifest import ClassificationPreprocessing, Parity, Preprocessing
from bundle.predictors import Network
from export.errors import ParityError

# Probabilities, scores and box corners all lie in 0..1. Float32 sums taken in another order move them by some 1e-7;
# a wrong constant, layout or mask moves them by more than 1e-2.
TOLERANCE = 1e-4
SMALLEST_RELATIVE = 0.01  # relative differences of smaller values say nothing
MIN_AGREEMENT = 0.999  # of the chosen classes: a tie between two may fall either way
_BATCHES = (1, 3, 8)
_MOST_PIXELS = 8 * 480 * 640  # of a batch: a dilated DETR's attention on eight large pictures takes 16 GB

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
    torch_network: Network,
    onnx_network: Network,
    output_names: Sequence[str],
    images: Sequence[Image.Image],
    preprocessing: Preprocessing,
    data: str,
) -> Parity:
    """Compare both runtimes on the images (of `data`) in batches of 1, 3 and 8, fewer of large ones.

    Every second image is cut to another shape.

    Raises:
        ParityError: an output differs by more than `TOLERANCE`, or the classes do.
    """
    largest = dict.fromkeys((name for name in output_names if name != "class_ids"), 0.0)
    relative = dict(largest)
    same, compared = 0, 0
    for inputs in _batches(images, preprocessing):
        expected = dict(zip(output_names, torch_network(**inputs), strict=True))
        found = dict(zip(output_names, onnx_network(**inputs), strict=True))
        for name in largest:
            if expected[name].shape != found[name].shape:
                shapes = {"expected": expected[name].shape, "found": found[name].shape}
                raise ParityError(name, quantity="shape", **shapes)
            wanted = expected[name].astype(np.float64)
            differences = np.abs(wanted - found[name].astype(np.float64))
            difference = differences.max()
            largest[name] = max(largest[name], float(difference))
            counted = wanted >= SMALLEST_RELATIVE
            relative[name] = max(relative[name], float((differences[counted] / wanted[counted]).max(initial=0)))
            if not difference <= TOLERANCE:
                raise ParityError(name, quantity="largest difference", expected=f"<= {TOLERANCE}", found=difference)
        if "class_ids" in expected:
            agree = (expected["class_ids"] == found["class_ids"])[np.greater_equal(expected["scores"], CONFIDENT_SCORE)]
        else:
            agree = expected["probabilities"].argmax(axis=-1) == found["probabilities"].argmax(axis=-1)
        same, compared = same + int(agree.sum()), compared + agree.size
    agreement = same / compared if compared else 1.0
    if agreement < MIN_AGREEMENT:
        raise ParityError("classes", quantity="agreement", expected=f">= {MIN_AGREEMENT}", found=agreement)
    return Parity(
        data=data, images=len(images), max_abs_diff=largest, max_rel_diff=relative, top1_agreement=agreement
    )


def _batches(images: Sequence[Image.Image], preprocessing: Preprocessing) -> Iterator[Inputs]:
    shaped = [image if i % 2 else _cut(image) for i, image in enumerate(images)]
    if isinstance(preprocessing, ClassificationPreprocessing):
        height, width = preprocessing.input_size
    else:
        height, width = preprocessing.shortest_edge, preprocessing.longest_edge
    most = max(2, _MOST_PIXELS // (height * width))
    start = 0
    while start < len(shaped):
        for size in (min(size, most) for size in _BATCHES):
            if batch := shaped[start : start + size]:
                yield make_inputs(batch, preprocessing)
            start += size


def _cut(image: Image.Image) -> Image.Image:
    """The left two thirds: another aspect ratio, and a size that was not traced."""
    return image.crop((0, 0, max(1, image.width * 2 // 3), image.height))
