"""Data sets on disk, in any of the layouts of `classification_layouts` and `detection_layouts`.

The split `val` may also be called `valid`.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from vitrine.bundle.images import SUPPORTED_FORMATS
from vitrine.bundle.manifest import Task
from vitrine.models.training.data import classification_layouts, detection_layouts
from vitrine.models.training.data.classification_layouts import LabelledImages, unknown_label
from vitrine.models.training.data.dataset import ClassificationData, Data, DetectionData, Files, Names, Ragged
from vitrine.models.training.data.detection_layouts import AnnotatedImage, Annotations
from vitrine.models.training.errors import DataError

SPLITS = ("train", "val", "test")

_HELD_OUT = 0.04  # of train
_ALIASES = {"val": ("val", "valid")}
_EXPECTED = {
    Task.CLASSIFICATION: "{0}.npz, {0}.csv, {0}.jsonl or {0}/<label>/*",
    Task.DETECTION: "{0}.json (COCO) beside images/, images/{0} and labels/{0} (YOLO) or ImageSets/Main/{0}.txt (VOC)",
}
_ORIENTATION, _ON_THEIR_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF: rows are columns


def load_split(path: Path, task: Task, split: str) -> Data:
    """Read one split of a data set.

    Crowds, difficult objects and boxes without area are left out.

    Raises:
        DataError: nothing of that kind is there, or it contradicts itself.
    """
    found = read_split(path, task, split)
    if found.problems:
        others = f" (and {len(found.problems) - 1} more: vitrine data check)" if len(found.problems) > 1 else ""
        raise DataError(f"{found.problems[0]}{others}")
    if isinstance(found, LabelledImages):
        if found.listed:
            _require(found.data.names, str(path))
        return found.data
    return _detection_data(found, path, split)


def read_split(path: Path, task: Task, split: str) -> LabelledImages | Annotations:
    """One split as it is on disk, with its problems.

    Raises:
        DataError: nothing of that kind is there, or it is not in the format of its layout at all.
    """
    if task is Task.DETECTION:
        source, train = (_find_detection(path, name) for name in (split, "train"))
        if source is not None:
            return detection_layouts.read(path, source, train if split != "train" else None)
    else:
        file, train_file = (_find_classification(path, name) for name in (split, "train"))
        if file is not None:
            return classification_layouts.read(path, file, split, train_file)
    raise no_split(path, split, task)


def no_split(path: Path, split: str, *tasks: Task) -> DataError:
    """The error that a split is not there, with the layouts for `tasks`, or for all."""
    expected = "; or ".join(_EXPECTED[task].format(split) for task in tasks or Task)
    return DataError(f"{path}: expected {expected}; found {_listing(path)}")


def has_split(path: Path, split: str, task: Task | None = None) -> bool:
    """Whether the data set at `path` has a split of that name, for a task or for any."""
    if task is None:
        return find_task(path, split) is not None
    return (_find_detection if task is Task.DETECTION else _find_classification)(path, split) is not None


def find_task(path: Path, split: str) -> Task | None:
    """What the data set at `path` is for; None where it has no such split."""
    if _find_detection(path, split) is not None:
        return Task.DETECTION
    return None if _find_classification(path, split) is None else Task.CLASSIFICATION


def load_training_splits(
    path: Path, task: Task, *, held_out: float | None, seed: int, fraction: float = 1.0
) -> tuple[Data, Data]:
    """The images to train on, and those to watch progress with.

    Args:
        path: a data set.
        task: what it is for.
        held_out: the part of `train` to watch progress with; None for the split `val`, or 4 % where there is none.
        seed: of the random choice of these parts.
        fraction: the part of the other images to train on, as near as can be the same of every class.

    Raises:
        DataError: the data cannot be read, or no image would be left to train on.
    """
    train = load_split(path, task, "train")
    if held_out is None and has_split(path, "val", task):
        val = load_split(path, task, "val")
        if val.labels != train.labels:
            raise DataError(f"{path}: the labels of train are {train.labels}, those of val {val.labels}")
        return _part(train, fraction, seed), val
    order = np.random.default_rng(seed).permutation(len(train))
    count = max(1, round((held_out or _HELD_OUT) * len(train)))
    if count >= len(train):
        raise DataError(f"{path}: expected more images in train than the {count} held out, found {len(train)}")
    return _part(train.subset(order[count:]), fraction, seed), train.subset(order[:count])


def _part(data: Data, fraction: float, seed: int) -> Data:
    """A random part of the images, one or more of each class."""
    if fraction == 1:
        return data
    order = np.random.default_rng(seed).permutation(len(data))
    classes = data.class_ids[order] if isinstance(data, ClassificationData) else np.zeros(len(data), np.int64)
    of_each = [order[classes == class_id] for class_id in np.unique(classes)]
    chosen = [images[: max(1, round(fraction * len(images)))] for images in of_each]
    return data.subset(np.sort(np.concatenate(chosen)))


def _find_detection(path: Path, split: str) -> detection_layouts.Source | None:
    names = _ALIASES.get(split, (split,))
    return next(filter(None, (detection_layouts.find(path, name) for name in names)), None)


def _find_classification(path: Path, split: str) -> Path | None:
    names = _ALIASES.get(split, (split,))
    return next(filter(None, (classification_layouts.find(path, name) for name in names)), None)


def _detection_data(found: Annotations, path: Path, split: str) -> DetectionData:
    """Raises: DataError where an object has no known label or no finite box, or an image is not there."""
    paths = [str(image.path) for image in found.images]
    folder = os.path.commonpath([os.path.dirname(file) for file in paths]) if paths else str(path)
    _require(paths, folder)
    if not paths:
        raise DataError(f"{path}: expected images in the split {split}, found none")
    sizes = _upright_sizes(found.images) if found.fractions else None
    class_ids: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    lengths = []
    for i, image in enumerate(found.images):
        before = len(boxes)
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
        lengths.append(len(boxes) - before)
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


def _require(paths: Sequence[str], folder: str) -> None:
    missing = [file for file in paths if not os.path.isfile(file)]
    if missing:
        names = [file.removeprefix(os.path.join(folder, "")) for file in missing[:3]]
        raise DataError(f"{folder}: {len(missing)} of {len(paths)} images are not there: {names}")


def _upright_sizes(images: Sequence[AnnotatedImage]) -> list[tuple[int, int]]:
    """Width and height of each image as it is seen, without decoding it."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_upright_size, [image.path for image in images]))


def _upright_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path, formats=SUPPORTED_FORMATS) as image:
            width, height = image.size
            on_its_side = image.getexif().get(_ORIENTATION) in _ON_THEIR_SIDE
    except Exception as error:  # Pillow's readers raise almost any type on broken data
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
    return (height, width) if on_its_side else (width, height)


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder"
