"""Labelled images on disk: packed archives and folders for classification, COCO JSON for detection.

Images stay encoded here; `bundle.images` is the only decoder. Nothing in this module needs torch.
"""

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bundle.errors import ImageError
from bundle.images import SUPPORTED_FORMATS, decode
from bundle.manifest import Task
from models.published.labels import named_labels
from models.training.errors import DataError

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class _Packed(Sequence[bytes]):
    """Files laid end to end in one array, with the offset of each."""

    def __init__(self, files: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.files, self.offsets = files, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.files[self.offsets[index] : self.offsets[index + 1]].tobytes()


class _Files(Sequence[bytes]):
    """Image files, read when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [path.read_bytes() for path in self.paths[index]]
        return self.paths[index].read_bytes()


@dataclass(frozen=True)
class _Images:
    name: str  # of the data set
    split: str
    labels: tuple[str, ...]
    names: Sequence[str]  # of the images, for messages
    encoded: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.encoded)

    def image(self, index: int) -> Image.Image:
        """One image, decoded as the service decodes it.

        Raises:
            DataError: naming the image that is broken.
        """
        try:
            return decode(self.encoded[index])
        except ImageError as error:
            raise DataError(f"{self.names[index]}: {error}") from error


@dataclass(frozen=True)
class ClassificationData(_Images):
    """One split: encoded images, each with one class."""

    class_ids: NDArray[np.int64]  # [n], indices into labels

    def subset(self, indices: NDArray[np.int64]) -> "ClassificationData":
        """The images at `indices`, read into memory."""
        names, encoded = [self.names[i] for i in indices], [self.encoded[int(i)] for i in indices]
        return ClassificationData(self.name, self.split, self.labels, names, encoded, self.class_ids[indices])


@dataclass(frozen=True)
class DetectionData(_Images):
    """One split: encoded images, each with any number of boxes."""

    class_ids: list[NDArray[np.int64]]  # [n_i] each, indices into labels
    boxes: list[NDArray[np.float32]]  # [n_i, 4] each, xyxy in pixels of the upright image

    def subset(self, indices: NDArray[np.int64]) -> "DetectionData":
        """The images at `indices`, read into memory."""
        chosen = [int(i) for i in indices]
        return DetectionData(
            self.name,
            self.split,
            self.labels,
            [self.names[i] for i in chosen],
            [self.encoded[i] for i in chosen],
            [self.class_ids[i] for i in chosen],
            [self.boxes[i] for i in chosen],
        )


Data = ClassificationData | DetectionData


def load_split(path: Path, task: Task, split: str) -> Data:
    """Read one split of a data set.

    Layouts of `path`:
        classification: `<split>.npz` with arrays `jpeg` (uint8, files end to end), `offsets` (int64 [n + 1]),
            `labels` (uint8 [n]) and `classes` (str); or `<split>/<label>/<image>` folders.
        detection: `<split>.json` in COCO's format beside `images/`; category ids may have holes; crowd annotations
            and empty boxes are left out.

    Raises:
        DataError: nothing of that kind is there, or it contradicts itself.
    """
    if task is Task.DETECTION:
        if (path / f"{split}.json").is_file():
            return _load_coco(path, split)
        raise DataError(f"{path}: expected {split}.json (COCO) beside images/, found {_listing(path)}")
    if (path / f"{split}.npz").is_file():
        return _load_packed(path, split)
    if (path / split).is_dir():
        return _load_folders(path, split)
    raise DataError(f"{path}: expected {split}.npz or {split}/<label>/*, found {_listing(path)}")


def has_split(path: Path, split: str) -> bool:
    """Whether the data set at `path` has a split of that name."""
    return any((path / f"{split}{suffix}").exists() for suffix in (".npz", ".json", ""))


def load_training_splits(path: Path, task: Task, *, held_out: float, seed: int) -> tuple[Data, Data]:
    """The images to train on, and those to watch progress with: the split `val`, else a random part of `train`."""
    train = load_split(path, task, "train")
    if has_split(path, "val"):
        val = load_split(path, task, "val")
        if val.labels != train.labels:
            raise DataError(f"{path}: the labels of train are {train.labels}, those of val {val.labels}")
        return train, val
    order = np.random.default_rng(seed).permutation(len(train))
    count = max(1, round(held_out * len(train)))
    if count >= len(train):
        raise DataError(f"{path}: expected more images in train than the {count} held out, found {len(train)}")
    return train.subset(order[count:]), train.subset(order[:count])


def _load_packed(path: Path, split: str) -> ClassificationData:
    file = path / f"{split}.npz"
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("jpeg", "offsets", "labels", "classes")}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: expected arrays jpeg, offsets, labels and classes: {error}") from error
    class_ids = arrays["labels"].astype(np.int64)
    labels = tuple(str(label) for label in arrays["classes"])
    if len(class_ids) != len(arrays["offsets"]) - 1:
        raise DataError(f"{file}: expected {len(class_ids) + 1} offsets, found {len(arrays['offsets'])}")
    if len(class_ids) == 0 or class_ids.min() < 0 or class_ids.max() >= len(labels):
        raise DataError(f"{file}: expected images with labels from 0 to {len(labels) - 1}, found {class_ids}")
    offsets = arrays["offsets"]
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(arrays["jpeg"]):
        raise DataError(f"{file}: expected offsets that rise from 0 to at most {len(arrays['jpeg'])}, found {offsets}")
    names = [f"{file}[{i}]" for i in range(len(class_ids))]
    return ClassificationData(path.name, split, labels, names, _Packed(arrays["jpeg"], offsets), class_ids)


def _load_folders(path: Path, split: str) -> ClassificationData:
    visible = (folder for folder in (path / split).iterdir() if folder.is_dir() and folder.name[0] not in "._")
    folders = sorted(visible)  # ".ipynb_checkpoints", "__MACOSX" and the like are no labels
    files: list[Path] = []
    class_ids: list[int] = []
    for class_id, folder in enumerate(folders):
        images = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)
        files += images
        class_ids += [class_id] * len(images)
    if not files:
        raise DataError(f"{path / split}: expected <label>/<image>, found no {', '.join(SUPPORTED_FORMATS)} file")
    synsets = dict(named_labels("imagenet-1k"))  # the folders of ImageNet are named by WordNet's ids
    names_of_folders = [folder.name for folder in folders]
    readable = all(name in synsets for name in names_of_folders)
    labels = tuple(synsets[name] if readable else name for name in names_of_folders)
    names = [str(file) for file in files]
    return ClassificationData(path.name, split, labels, names, _Files(files), np.array(class_ids, dtype=np.int64))


def _load_coco(path: Path, split: str) -> DetectionData:
    file = path / f"{split}.json"
    try:
        document: dict[str, Any] = json.loads(file.read_text())
        categories = sorted(document["categories"], key=lambda category: int(category["id"]))
        contiguous = {category["id"]: index for index, category in enumerate(categories)}
        labels = tuple(str(category["name"]) for category in categories)
        by_image: dict[int, list[tuple[int, list[float]]]] = {image["id"]: [] for image in document["images"]}
        for annotation in document["annotations"]:
            x, y, width, height = map(float, annotation["bbox"])
            if not all(map(math.isfinite, (x, y, width, height))):
                raise ValueError(f"annotation {annotation.get('id')} has bbox {annotation['bbox']}")
            if annotation.get("iscrowd", 0) or width <= 0 or height <= 0:
                continue
            entry = (contiguous[annotation["category_id"]], [x, y, x + width, y + height])
            by_image[annotation["image_id"]].append(entry)
        if len(set(labels)) != len(labels):
            raise ValueError(f"two categories have the same name: {labels}")
        paths = [path / "images" / image["file_name"] for image in document["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not in COCO's format: {type(error).__name__} {error}") from error
    missing = [image.name for image in paths if not image.is_file()]
    if missing or not paths:
        raise DataError(f"{file}: {len(missing)} of {len(paths)} images are not in images/: {missing[:3]}")
    annotations = list(by_image.values())
    return DetectionData(
        path.name,
        split,
        labels,
        [str(image) for image in paths],
        _Files(paths),
        [np.array([class_id for class_id, _ in image], dtype=np.int64) for image in annotations],
        [np.array([box for _, box in image], dtype=np.float32).reshape(-1, 4) for image in annotations],
    )


def check_labels(data: "Data", labels: Sequence[str]) -> None:
    """Refuse data whose labels are not a network's, in its order.

    Raises:
        DataError: naming the first label that differs.
    """
    for i, (expected, found) in enumerate(zip_longest(labels, data.labels)):
        if expected != found:
            raise DataError(
                f"{data.name}: labels: expected {len(labels)}, found {len(data.labels)}; the first that differs is "
                f"number {i}: expected {expected!r}, found {found!r}"
            )


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder"
