"""Images and network inputs that an export is verified, measured and calibrated with."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.images import pad_and_stack, to_classification_pixels, to_detection_pixels
from vitrine.bundle.manifest import ClassificationPreprocessing, Precision, Preprocessing
from vitrine.export.errors import ExportError
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.data.dataset import Data, check_labels
from vitrine.models.training.data.layouts import HELD_OUT, has_split, load_split, load_training_splits

_PARITY_IMAGES = 48
_GENERATED_IMAGES = 12
_CALIBRATION_IMAGES = 96  # of the training images, for int8
_CALIBRATION_BATCH = 8

Inputs = dict[str, NDArray[np.generic]]


def trace_size(preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the height and width to trace and time with: a classifier's input size, a detector's largest landscape."""
    if isinstance(preprocessing, ClassificationPreprocessing):
        return preprocessing.input_size
    return preprocessing.shortest_edge, preprocessing.longest_edge


def make_inputs(images: Sequence[Image.Image], preprocessing: Preprocessing) -> Inputs:
    """Return the graph's inputs for a batch of RGB images."""
    if isinstance(preprocessing, ClassificationPreprocessing):
        return {"pixels": np.stack([to_classification_pixels(image, preprocessing) for image in images])}
    pixels, sizes = pad_and_stack([to_detection_pixels(image, preprocessing) for image in images])
    return {"pixels": pixels, "sizes": sizes}


def evaluation_data(path: Path | None, checkpoint: Checkpoint) -> Data | None:
    """Load the split `test`, or `val` without it, or what training held out; None for an imported run without data.

    Args:
        path: the data set; by default where it was when the run was trained.
    """
    path = _data_path(path, checkpoint)
    if path is None:
        return None
    data = _load_evaluation_split(path, checkpoint)
    check_labels(data, checkpoint.labels)
    return data


def _load_evaluation_split(path: Path, checkpoint: Checkpoint) -> Data:
    split = next((name for name in ("test", "val") if has_split(path, name, checkpoint.task)), None)
    if split is None and checkpoint.progress is not None:
        recipe = checkpoint.progress.read_recipe()
        _, held_out = load_training_splits(path, checkpoint.task, held_out=recipe.held_out, seed=recipe.seed)
        return replace(held_out, split=HELD_OUT)
    return load_split(path, checkpoint.task, split or "val")


def chosen_by(data: Data, checkpoint: Checkpoint) -> str:
    """Return what training chose by its validation images, if these are the data; else an empty text."""
    progress = checkpoint.progress
    if progress is None:
        return ""
    recipe = progress.read_recipe()
    is_validation = data.split == HELD_OUT or (data.split == "val" and recipe.held_out is None)
    if not is_validation or data.name != Path(progress.data_path).name:
        return ""
    choices = ["the best epoch"] if recipe.keep == "best" else []
    calibrated = (checkpoint.temperature, checkpoint.offset) != (1, 0)
    return " and ".join([*choices, "the calibration of its scores"] if calibrated else choices)


def parity_images(data: Data | None, preprocessing: Preprocessing) -> list[Image.Image]:
    """Return the first images of the data, or generated ones."""
    if data is None:
        return generated_images(_GENERATED_IMAGES, preprocessing)
    return [data.image(i) for i in range(min(_PARITY_IMAGES, len(data)))]


def generated_images(count: int, preprocessing: Preprocessing) -> list[Image.Image]:
    """Return images of coloured noise with structure at every scale, always the same."""
    height, width = trace_size(preprocessing)
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


def calibration_inputs(path: Path | None, checkpoint: Checkpoint, variants: Sequence[Precision]) -> list[Inputs]:
    """Return batches of training images, evenly spread over the split; empty if no 8-bit variant is requested.

    Args:
        path: as of `evaluation_data`.

    Raises:
        ExportError: variants are requested without data to measure them on.
    """
    path = _data_path(path, checkpoint)
    if path is None and variants:
        names = ", ".join(variants)
        raise ExportError(f"{names}: expected --data, on which to measure what the variants lose, found none")
    if path is None or not {Precision.INT8_DYNAMIC, Precision.INT8_STATIC} & set(variants):
        return []
    data = load_split(path, checkpoint.task, "train")
    indices = np.linspace(0, len(data) - 1, min(_CALIBRATION_IMAGES, len(data))).astype(int).tolist()
    preprocessing = checkpoint.read_preprocessing()
    batches = [indices[i : i + _CALIBRATION_BATCH] for i in range(0, len(indices), _CALIBRATION_BATCH)]
    return [make_inputs([data.image(i) for i in batch], preprocessing) for batch in batches]


def _data_path(path: Path | None, checkpoint: Checkpoint) -> Path | None:
    """Return the data's path: as given, or where it was when the run was trained; None for an imported run."""
    if path is None and checkpoint.progress is not None:
        return Path(checkpoint.progress.data_path)
    return path
