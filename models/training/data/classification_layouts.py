"""Layouts of labelled images: packed archives, folders and lists.

<split>.npz                 arrays `jpeg` (uint8, image files end to end), `offsets` (int64 [n + 1]), `labels`
                            (integers [n]) and `classes` (str)
<split>/<label>/**/<image>  folders; names that are WordNet ids are replaced by ImageNet labels
<label>/**/<image>          the same without splits: all images are of the split train
<split>.csv                 a header, then one image per line; column names as in `COLUMNS`, other columns are ignored,
                            separated by commas, semicolons or tabs
<split>.jsonl               the same as one JSON object per line: {"image": "images/1.jpg", "label": "cat"}

Lists give image paths relative to the data folder. The labels of all splits are the lines of `labels.txt` or
`classes.txt` if there is such a file, else those of the split train, else those of the only split. Labels that do not
come from a file are sorted, numerically if all are numbers. If they do, numbers in lists are class ids.
"""

import csv
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.bundle.images import SUPPORTED_FORMATS
from vitrine.models.labels.named import named_labels
from vitrine.models.training.data.dataset import ClassificationData, Files, Names, Packed, Ragged
from vitrine.models.training.errors import DataError

COLUMNS = {
    "image": ("image", "path", "file", "filename", "file_name", "filepath", "image_path"),
    "label": ("label", "class", "category", "target", "class_name"),
}
SPLITS = ("train", "val", "test")
LABEL_FILES = ("labels.txt", "classes.txt")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SUFFIXES = (".npz", ".csv", ".jsonl", "")  # of the file or folder of a split


@dataclass(frozen=True)
class LabelledImages:
    """A split as it is on disk: the usable images, and the problems of the others."""

    data: ClassificationData
    problems: list[str]
    listed: bool  # whether the images come from a list and may be missing


def find(path: Path, split: str) -> Path | None:
    """Return the file or folder of a split, if there is one."""
    for suffix in _SUFFIXES:
        file = path / f"{split}{suffix}"
        if file.is_dir() if suffix == "" else file.is_file():
            return file
    return path if split == "train" and _has_labels_only(path) else None


def _has_labels_only(path: Path) -> bool:
    """Return whether the folder has at least two subfolders, each with images, and nothing that is part of a layout."""
    folders = _label_folders(path) if path.is_dir() else []
    known = {*SPLITS, "valid", "images", "labels", "Annotations", "ImageSets", "JPEGImages"}
    return len(folders) > 1 and not any(folder.name in known for folder in folders) and all(map(_has_image, folders))


def _has_image(folder: Path) -> bool:
    return any(name.lower().endswith(IMAGE_SUFFIXES) for _, _, files in os.walk(folder) for name in files)


def read(path: Path, source: Path, split: str, train: Path | None) -> LabelledImages:
    """Read the split at `source`, with the labels of the split at `train` unless a file lists them.

    Raises:
        DataError: it is inconsistent or has no images.
    """
    synsets = dict(named_labels("imagenet-1k"))  # by WordNet id
    listed = read_label_file(path)
    labels = listed or _labels(source if train is None else train)
    if all(label in synsets for label in labels):
        labels = tuple(synsets[label] for label in labels)
    class_ids = {label: i for i, label in enumerate(labels)}
    class_ids = {id_: class_ids[label] for id_, label in synsets.items() if label in class_ids} | class_ids
    if listed and not any(label.isdecimal() for label in labels):
        class_ids = {str(i): i for i in range(len(labels))} | class_ids
    if source.suffix == ".npz":
        return LabelledImages(_read_packed(path, source, split, labels, class_ids), [], listed=False)
    names, ids, problems = _read_folders(source, class_ids) if source.is_dir() else _read_list(source, class_ids)
    prefix = f"{source if source.is_dir() else path}{os.sep}"
    if not names and not problems:
        expected = "<label>/<image>" if source.is_dir() else "an image on each line"
        raise DataError(f"{source}: expected {expected}, found no {', '.join(SUPPORTED_FORMATS)} file")
    paths = Names(prefix, names)
    data = ClassificationData(path.name, split, labels, paths, Files(paths), np.array(ids, dtype=np.int64))
    return LabelledImages(data, problems, listed=not source.is_dir())


def write_packed(file: Path, encoded: Sequence[bytes], class_ids: NDArray[np.integer], labels: Sequence[str]) -> None:
    """Write a packed split: encoded images, their class ids, and the labels."""
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    files = np.frombuffer(b"".join(encoded), np.uint8)
    np.savez(file, jpeg=files, offsets=offsets, labels=class_ids, classes=np.array(labels))


def read_label_file(path: Path) -> tuple[str, ...] | None:
    """Return the lines of `labels.txt` or `classes.txt`, if there is such a file.

    Raises:
        DataError: the file is not text, is empty, or has duplicate labels.
    """
    file = next((path / name for name in LABEL_FILES if (path / name).is_file()), None)
    if file is None:
        return None
    try:
        labels = tuple(line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: expected a label on each line: {error}") from error
    return validate_labels(file, labels)


def validate_labels(file: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels as a tuple; raise `DataError` if there are none or some are duplicates."""
    if len(labels) == 0 or len(set(labels)) < len(labels):
        duplicate = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
        found = "none" if duplicate is None else f"{duplicate!r} twice"
        raise DataError(f"{file}: expected labels with different names, found {found}")
    return tuple(labels)


def _labels(source: Path) -> tuple[str, ...]:
    """Return the labels that occur in a split."""
    if source.suffix == ".npz":
        classes = _arrays(source, "classes")["classes"]
        return validate_labels(source, [str(label) for label in np.atleast_1d(classes)])
    if source.is_dir():
        return tuple(folder.name for folder in _label_folders(source))
    return sort_labels({label for _, _, label in _rows(source) if label})


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort labels numerically if all are numbers, else alphabetically."""
    names = sorted(labels)
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else names)


def _arrays(file: Path, *names: str) -> dict[str, NDArray[Any]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: expected arrays jpeg, offsets, labels and classes: {error}") from error


def _read_packed(
    path: Path, file: Path, split: str, labels: tuple[str, ...], label_to_id: Mapping[str, int]
) -> ClassificationData:
    arrays = _arrays(file, "jpeg", "offsets", "labels", "classes")
    names, offsets = [str(label) for label in np.atleast_1d(arrays["classes"])], arrays["offsets"]
    class_ids = arrays["labels"].astype(np.int64)
    if len(class_ids) != len(offsets) - 1:
        raise DataError(f"{file}: expected {len(class_ids) + 1} offsets, found {len(offsets)}")
    if len(class_ids) == 0 or class_ids.min() < 0 or class_ids.max() >= len(names):
        raise DataError(f"{file}: expected images with labels from 0 to {len(names) - 1}, found {class_ids}")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(arrays["jpeg"]):
        raise DataError(f"{file}: expected offsets that rise from 0 to at most {len(arrays['jpeg'])}, found {offsets}")
    mapping = np.array([label_to_id.get(label, -1) for label in names])
    if unknown := [names[i] for i in np.unique(class_ids).tolist() if mapping[i] < 0]:
        raise DataError(f"{file}: {_unknown(unknown[0], label_to_id)}")
    image_names = Names(str(file), (f"[{i}]" for i in range(len(class_ids))))
    files = Packed(Ragged(arrays["jpeg"], offsets))
    return ClassificationData(path.name, split, labels, image_names, files, mapping[class_ids].astype(np.int64))


def _label_folders(folder: Path) -> list[Path]:
    """Return the label folders in order, without ".ipynb_checkpoints", "__MACOSX" and the like."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] not in "._")


def image_files(folder: Path) -> list[str]:
    """Return the sorted paths, relative to `folder`, of all images in it and its subfolders."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        subfolder = os.path.relpath(parent, folder)
        images = (name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("._"))
        found += [name if subfolder == "." else os.path.join(subfolder, name) for name in images]
    return sorted(found)


ImageList = tuple[list[str], list[int], list[str]]  # image paths, class ids, problems


def _read_folders(source: Path, label_to_id: Mapping[str, int]) -> ImageList:
    names: list[str] = []
    ids: list[int] = []
    problems = []
    for folder in _label_folders(source):
        images = image_files(folder)
        if folder.name in label_to_id:
            names += [os.path.join(folder.name, image) for image in images]
            ids += [label_to_id[folder.name]] * len(images)
        elif images:
            problems.append(f"{folder}: {_unknown(folder.name, label_to_id)}")
    return names, ids, problems


def _read_list(file: Path, label_to_id: Mapping[str, int]) -> ImageList:
    names: list[str] = []
    ids: list[int] = []
    problems = []
    for line, image, label in _rows(file):
        class_id = label_to_id.get(label)
        if not image:
            problems.append(f"{file}: line {line}: expected the path of an image, found nothing")
        elif class_id is None:
            problems.append(f"{file}: line {line}: {_unknown(label, label_to_id)}")
        else:
            names.append(image)
            ids.append(class_id)
    return names, ids, problems


def _unknown(label: str, label_to_id: Mapping[str, int]) -> str:
    return unknown_label(label, list({class_id: name for name, class_id in label_to_id.items()}.values()))


def unknown_label(label: str, labels: Sequence[str]) -> str:
    """Return the error message for a label that is not in `labels`."""
    return f"expected one of the labels {', '.join(labels[:8])}{', ...' * (len(labels) > 8)}, found {label!r}"


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, image and label of each row of a list.

    Raises:
        DataError: it is not a list.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = _json_rows(file, lines) if file.suffix == ".jsonl" else _csv_rows(file, lines)
            yield from rows
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: expected an image and its label on each line: {error}") from error


def _csv_rows(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    lines = iter(lines)
    first = next(lines, "")
    separator = max(",;\t", key=first.count)
    header = [name.strip().lower() for name in next(csv.reader([first], delimiter=separator), [])]
    image, label = (header.index(_column(file, header, kind)) for kind in ("image", "label"))
    for number, row in enumerate(csv.reader(lines, delimiter=separator), start=2):
        if row:
            cells = [cell.strip() for cell in row] + [""] * len(header)
            yield number, cells[image], cells[label]


def _json_rows(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f'{file}: line {number}: expected {{"image": ..., "label": ...}}, found {line.strip()}')
            image, label = (row[_column(file, list(row), kind)] for kind in ("image", "label"))
            yield number, str(image).strip(), str(label).strip()


def _column(file: Path, names: Sequence[str], kind: str) -> str:
    for name in COLUMNS[kind]:
        if name in names:
            return name
    raise DataError(f"{file}: expected a column {' or '.join(COLUMNS[kind])}, found {', '.join(names) or 'none'}")
