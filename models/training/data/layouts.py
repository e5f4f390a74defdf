"""Data sets on disk, in any layout of `classification_layouts` and `detection_layouts`.

The split `val` may also be named `valid`.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vitrine.bundle.images import SUPPORTED_FORMATS
from vitrine.bundle.manifest import Task
from vitrine.models.training.data import classification_layouts, detection_layouts
from vitrine.models.training.data.classification_layouts import LabelledImages, unknown_label
from vitrine.models.training.data.dataset import ClassificationData, Data, DetectionData, Files, Names, Ragged
from vitrine.models.training.data.detection_layouts import AnnotatedImage, Annotations
from vitrine.models.training.errors import DataError

HELD_OUT = "held out of train"  # name of this part as a split
T = TypeVar("T")

_HELD_OUT = 0.04  # of train, but at least a fifth of it or so many images:
_MIN_HELD_OUT = 300
_ALIASES = {"val": ("val", "valid")}
_EXPECTED = {
    Task.CLASSIFICATION: "{0}.npz, {0}.csv, {0}.jsonl or {0}/<label>/* (without splits: <label>/*)",
    Task.DETECTION: "{0}.json (COCO) beside images/, images/{0} and labels/{0} (YOLO) or ImageSets/Main/{0}.txt (VOC)",
}
_FINDERS: dict[Task, Callable[[Path, str], object]] = {
    Task.CLASSIFICATION: classification_layouts.find,
    Task.DETECTION: detection_layouts.find,
}
_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)  # EXIF orientations that swap width and height


def load_split(path: Path, task: Task, split: str) -> Data:
    """Read one split of a data set.

    Crowds, difficult objects and boxes without area are ignored.

    Raises:
        DataError: there is no such split, or it is inconsistent.
    """
    found = read_split(path, task, split)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more: vitrine data check)" if len(found.problems) > 1 else ""
        raise DataError(f"{found.problems[0]}{more}")
    if isinstance(found, LabelledImages):
        if found.listed:
            _require_files(found.data.names, str(path))
        return found.data
    return _detection_data(found, path, split)


def read_split(path: Path, task: Task, split: str) -> LabelledImages | Annotations:
    """Read one split as it is on disk, with its problems.

    Raises:
        DataError: there is no such split, or it is not in the format of its layout.
    """
    if task is Task.DETECTION:
        source, train = (_find(detection_layouts.find, path, name) for name in (split, "train"))
        if source is not None:
            return detection_layouts.read(path, source, train if split != "train" else None)
    else:
        file, train_file = (_find(classification_layouts.find, path, name) for name in (split, "train"))
        if file is not None:
            return classification_layouts.read(path, file, split, train_file)
    raise missing_split(path, split, task)


def missing_split(path: Path, split: str, *tasks: Task) -> DataError:
    """Return the error for a missing split, with the layouts for `tasks`, by default for all."""
    expected = "; or ".join(_EXPECTED[task].format(split) for task in tasks or Task)
    return DataError(f"{path}: expected {expected}; found {_listing(path)}")


def has_split(path: Path, split: str, task: Task | None = None) -> bool:
    """Return whether the data set at `path` has a split for a task, by default for any."""
    tasks = Task if task is None else (task,)
    return any(_find(_FINDERS[task], path, split) is not None for task in tasks)


def find_task(path: Path, split: str) -> Task | None:
    """Return the task of a split of the data set at `path`; None if there is no such split."""
    return next((task for task in (Task.DETECTION, Task.CLASSIFICATION) if has_split(path, split, task)), None)


def load_training_splits(
    path: Path, task: Task, *, held_out: float | None, seed: int, fraction: float = 1.0
) -> tuple[Data, Data]:
    """Return the training and the validation images.

    Args:
        path: a data set.
        task: its task.
        held_out: fraction of `train` to validate on; None for the split `val`, or if there is none, 4 %, but at least
            300 images or a fifth.
        seed: of the random split.
        fraction: fraction of the remaining images to train on, stratified by class.

    Raises:
        DataError: the data cannot be read, or no image is left to train on.
    """
    train = load_split(path, task, "train")
    if held_out is None and has_split(path, "val", task):
        val = load_split(path, task, "val")
        if val.labels != train.labels:
            raise DataError(f"{path}: the labels of train are {train.labels}, those of val {val.labels}")
        return _fraction(train, fraction, seed), val
    order = np.random.default_rng(seed).permutation(len(train))
    least = min(round(len(train) / 5), _MIN_HELD_OUT)
    count = max(1, round(_HELD_OUT * len(train)), least) if held_out is None else max(1, round(held_out * len(train)))
    if count >= len(train):
        raise DataError(f"{path}: expected more images in train than the {count} held out, found {len(train)}")
    return _fraction(train.subset(order[count:]), fraction, seed), train.subset(order[:count])


def _fraction(data: Data, fraction: float, seed: int) -> Data:
    """Return a random fraction of the images, at least one of each class."""
    if fraction == 1:
        return data
    order = np.random.default_rng(seed).permutation(len(data))
    classes = data.class_ids[order] if isinstance(data, ClassificationData) else np.zeros(len(data), np.int64)
    by_class = [order[classes == class_id] for class_id in np.unique(classes)]
    chosen = [images[: max(1, round(fraction * len(images)))] for images in by_class]
    return data.subset(np.sort(np.concatenate(chosen)))


def _find(layout: Callable[[Path, str], T | None], path: Path, split: str) -> T | None:
    return next(filter(None, (layout(path, name) for name in _ALIASES.get(split, (split,)))), None)


def _detection_data(found: Annotations, path: Path, split: str) -> DetectionData:
    """Raise `DataError` if an object has an unknown label or a box that is not finite, or an image is missing."""
    paths = [str(image.path) for image in found.images]
    folder = os.path.commonpath([os.path.dirname(file) for file in paths]) if paths else str(path)
    _require_files(paths, folder)
    if not paths:
        raise DataError(f"{path}: expected images in the split {split}, found none")
    sizes = _upright_sizes(found.images) if found.fractions else None
    class_ids: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    lengths = []
    for i, image in enumerate(found.images):
        start = len(boxes)
        width, height = (1, 1) if sizes is None else sizes[i]
        for item in image.objects:
            left, top, right, bottom = item.box
            if not all(map(math.isfinite, item.box)):
                raise DataError(f"{image.file}: {item.where}: expected a box of finite numbers, found {item.box}")
            if item.left_out or left >= right or top >= bottom:
                continue
            if item.class_id is None:
                raise DataError(f"{image.file}: {item.where}: {unknown_label(item.label, found.labels)}")
            class_ids.append(item.class_id)
            boxes.append((left * width, top * height, right * width, bottom * height))
        lengths.append(len(boxes) - start)
    prefix = os.path.join(folder, "")
    names = Names(prefix, (file.removeprefix(prefix) for file in paths))
    return DetectionData(
        path.name,
        split,
        found.labels,
        names,
        Files(names),
        Ragged.of(np.array(class_ids, dtype=np.int64), lengths),
        Ragged.of(np.array(boxes, dtype=np.float32).reshape(-1, 4), lengths),
    )


def _require_files(paths: Sequence[str], folder: str) -> None:
    missing = [file for file in paths if not os.path.isfile(file)]
    if missing:
        names = [file.removeprefix(os.path.join(folder, "")) for file in missing[:3]]
        raise DataError(f"{folder}: {len(missing)} of {len(paths)} images are not there: {names}")


def _upright_sizes(images: Sequence[AnnotatedImage]) -> list[tuple[int, int]]:
    """Return the width and height of each image after its EXIF rotation, without decoding it."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_upright_size, [image.path for image in images]))


def _upright_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path, formats=SUPPORTED_FORMATS) as image:
            width, height = image.size
            transposed = image.getexif().get(_ORIENTATION) in _TRANSPOSED
    except Exception as error:  # Pillow raises almost any type on broken data
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
    return (height, width) if transposed else (width, height)


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder"
