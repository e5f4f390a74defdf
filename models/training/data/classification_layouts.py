"""Layouts of labelled images: packed archives, folders and lists.

<split>.npz                 arrays `jpeg` (uint8, image files end to end), `offsets` (int64 [n + 1]), `labels`
                            (integers [n]) and `classes` (str)
<split>/<label>/**/<image>  folders; those named by WordNet's ids get ImageNet's labels
<split>.csv                 a header, then one image on each line; the columns are named as in `COLUMNS`, other columns
                            do not matter, and are parted by commas, semicolons or tabs
<split>.jsonl               the same as one object on each line: {"image": "images/1.jpg", "label": "cat"}

The images of lists are named by their paths from the data folder. The labels of all splits are, in this order, the
lines of `labels.txt` or `classes.txt`, or those of the split train, or those of the only split. Where they are
not listed they are sorted, as numbers if all of them are. Where they are, numbers in lists are class ids.
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
LABEL_FILES = ("labels.txt", "classes.txt")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SUFFIXES = (".npz", ".csv", ".jsonl", "")  # behind the name of the split


@dataclass(frozen=True)
class LabelledImages:
    """A split as it is on disk: the images that can be used, and why others cannot."""

    data: ClassificationData
    problems: list[str]
    listed: bool  # whether images are named by a list, and may not be there


def find(path: Path, split: str) -> Path | None:
    """The file or folder that holds a split, if there is one."""
    for suffix in _SUFFIXES:
        file = path / f"{split}{suffix}"
        if file.is_dir() if suffix == "" else file.is_file():
            return file
    return None


def read(path: Path, source: Path, split: str, train: Path | None) -> LabelledImages:
    """Read the split at `source`, with the labels of the split at `train` unless a file lists them.

    Raises:
        DataError: it contradicts itself or holds no image.
    """
    synsets = dict(named_labels("imagenet-1k"))  # by WordNet's id
    listed = listed_labels(path)
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
        wanted = "<label>/<image>" if source.is_dir() else "an image on each line"
        raise DataError(f"{source}: expected {wanted}, found no {', '.join(SUPPORTED_FORMATS)} file")
    paths = Names(prefix, names)
    data = ClassificationData(path.name, split, labels, paths, Files(paths), np.array(ids, dtype=np.int64))
    return LabelledImages(data, problems, listed=not source.is_dir())


def write_packed(file: Path, encoded: Sequence[bytes], class_ids: NDArray[np.integer], labels: Sequence[str]) -> None:
    """Write a packed split: image files, the class id of each, and the labels."""
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    files = np.frombuffer(b"".join(encoded), np.uint8)
    np.savez(file, jpeg=files, offsets=offsets, labels=class_ids, classes=np.array(labels))


def listed_labels(path: Path) -> tuple[str, ...] | None:
    """The lines of `labels.txt` or `classes.txt`, if there is one.

    Raises:
        DataError: it is no text, is empty, or names a label twice.
    """
    file = next((path / name for name in LABEL_FILES if (path / name).is_file()), None)
    if file is None:
        return None
    try:
        labels = tuple(line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: expected a label on each line: {error}") from error
    return distinct_labels(file, labels)


def distinct_labels(file: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """Refuse labels of which there are none, or two of the same name."""
    if len(labels) == 0 or len(set(labels)) < len(labels):
        twice = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
        found = "none" if twice is None else f"{twice!r} twice"
        raise DataError(f"{file}: expected labels with different names, found {found}")
    return tuple(labels)


def _labels(source: Path) -> tuple[str, ...]:
    """The labels that a split alone names."""
    if source.suffix == ".npz":
        classes = _arrays(source, "classes")["classes"]
        return distinct_labels(source, [str(label) for label in np.atleast_1d(classes)])
    if source.is_dir():
        return tuple(folder.name for folder in _label_folders(source))
    return sort_labels({label for _, _, label in _rows(source) if label})


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in their order: that of numbers if all are numbers, else that of texts."""
    texts = sorted(labels)
    return tuple(sorted(texts, key=int) if all(text.isdecimal() for text in texts) else texts)


def _arrays(file: Path, *names: str) -> dict[str, NDArray[Any]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: expected arrays jpeg, offsets, labels and classes: {error}") from error


def _read_packed(
    path: Path, file: Path, split: str, labels: tuple[str, ...], known: Mapping[str, int]
) -> ClassificationData:
    arrays = _arrays(file, "jpeg", "offsets", "labels", "classes")
    own, offsets = [str(label) for label in np.atleast_1d(arrays["classes"])], arrays["offsets"]
    class_ids = arrays["labels"].astype(np.int64)
    if len(class_ids) != len(offsets) - 1:
        raise DataError(f"{file}: expected {len(class_ids) + 1} offsets, found {len(offsets)}")
    if len(class_ids) == 0 or class_ids.min() < 0 or class_ids.max() >= len(own):
        raise DataError(f"{file}: expected images with labels from 0 to {len(own) - 1}, found {class_ids}")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(arrays["jpeg"]):
        raise DataError(f"{file}: expected offsets that rise from 0 to at most {len(arrays['jpeg'])}, found {offsets}")
    places = np.array([known.get(label, -1) for label in own])
    if strange := [own[i] for i in np.unique(class_ids).tolist() if places[i] < 0]:
        raise DataError(f"{file}: {_unknown(strange[0], known)}")
    names = Names(str(file), (f"[{i}]" for i in range(len(class_ids))))
    return ClassificationData(
        path.name, split, labels, names, Packed(Ragged(arrays["jpeg"], offsets)), places[class_ids].astype(np.int64)
    )


def _label_folders(folder: Path) -> list[Path]:
    """The folders of labels, in order; ".ipynb_checkpoints", "__MACOSX" and the like are none."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] not in "._")


def image_files(folder: Path) -> list[str]:
    """The paths from `folder` of all images in it and its folders, in order."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        inner = os.path.relpath(parent, folder)
        images = (name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("._"))
        found += [name if inner == "." else os.path.join(inner, name) for name in images]
    return sorted(found)


Found = tuple[list[str], list[int], list[str]]  # paths of images, their class ids, problems


def _read_folders(source: Path, known: Mapping[str, int]) -> Found:
    names: list[str] = []
    ids: list[int] = []
    problems = []
    for folder in _label_folders(source):
        images = image_files(folder)
        if folder.name in known:
            names += [os.path.join(folder.name, image) for image in images]
            ids += [known[folder.name]] * len(images)
        elif images:
            problems.append(f"{folder}: {_unknown(folder.name, known)}")
    return names, ids, problems


def _read_list(file: Path, known: Mapping[str, int]) -> Found:
    names: list[str] = []
    ids: list[int] = []
    problems = []
    for line, image, label in _rows(file):
        class_id = known.get(label)
        if not image:
            problems.append(f"{file}: line {line}: expected the path of an image, found nothing")
        elif class_id is None:
            problems.append(f"{file}: line {line}: {_unknown(label, known)}")
        else:
            names.append(image)
            ids.append(class_id)
    return names, ids, problems


def _unknown(label: str, known: Mapping[str, int]) -> str:
    return unknown_label(label, list({class_id: name for name, class_id in known.items()}.values()))


def unknown_label(label: str, labels: Sequence[str]) -> str:
    """What is wrong with a label that is none of `labels`."""
    return f"expected one of the labels {', '.join(labels[:8])}{', ...' * (len(labels) > 8)}, found {label!r}"


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """Number of the line, image and label of each row of a list.

    Raises:
        DataError: it is no list.
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
