"""Layouts of images with boxes, read without validating the boxes.

COCO    <split>.json beside images/; annotations/instances_<split>2017.json beside <split>2017/; or
        <split>/_annotations.coco.json among the images (Roboflow). Category ids may have gaps; labels are in
        their order. Crowds are ignored.
YOLO    images/<split>/**/<image> with labels/<split>/**/<image>.txt, or <split>/images and <split>/labels; label
        names in data.yaml or classes.txt. Each line is a class id and the centre, width and height of a box, or the
        corners of a polygon, as fractions of the image. An image without a file has no boxes. Paths in data.yaml are
        ignored.
VOC     ImageSets/Main/<split>.txt, Annotations/<name>.xml and JPEGImages/<name>.jpg, in the data folder or in
        VOC<year> folders in it or in its VOCdevkit, whose years are merged. Labels are sorted. Pixel coordinates start
        at 1 and boxes include both ends. As in VOC's protocol, difficult objects are ignored.

A file `labels.txt` or `classes.txt` in the data folder overrides the order of labels. Otherwise they are those of the
split train, or of the only split.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml

from vitrine.models.training.data.classification_layouts import image_files, read_label_file, validate_labels
from vitrine.models.training.errors import DataError

_YAML_FILES = ("data.yaml", "data.yml", "dataset.yaml")

Box = tuple[float, float, float, float]


class Annotation(NamedTuple):
    """An annotated object as it is in its file."""

    where: str  # position in the file
    label: str
    class_id: int | None  # None where the label is unknown
    box: Box  # xyxy in the unit of the layout, not validated
    left_out: bool  # a crowd or a difficult object


class AnnotatedImage(NamedTuple):
    """An image, which may be missing, and its objects."""

    path: Path
    file: Path  # the file with the annotations
    objects: list[Annotation]


@dataclass(frozen=True)
class Annotations:
    """A split as it is on disk, and what cannot be read of it."""

    labels: tuple[str, ...]
    images: list[AnnotatedImage]
    problems: list[str]
    complete_labels: bool = False  # whether every split has the same labels
    fractions: bool = False  # whether boxes are fractions of the image instead of pixels

    def with_labels(self, labels: tuple[str, ...]) -> "Annotations":
        """Replace the labels; objects keep the names of theirs."""
        class_ids = {label: i for i, label in enumerate(labels)}
        images = [
            image._replace(
                objects=[
                    item._replace(class_id=None if item.class_id is None else class_ids.get(item.label))
                    for item in image.objects
                ]
            )
            for image in self.images
        ]
        return replace(self, labels=labels, images=images)


class Source(NamedTuple):
    """The file or folder of a split, and its reader."""

    file: Path
    read: Callable[[], Annotations]


def find(path: Path, split: str) -> Source | None:
    """Return the split in the first layout that has it."""
    return next(filter(None, (layout(path, split) for layout in (_find_coco, _find_yolo, _find_voc))), None)


def read(path: Path, source: Source, train: Source | None) -> Annotations:
    """Read the split at `source`, with the labels of the split at `train` unless a file lists them.

    Raises:
        DataError: it is not in the format of its layout.
    """
    annotations = source.read()
    labels = annotations.labels
    if (listed := read_label_file(path)) is not None:
        labels = listed
    elif train is not None and not annotations.complete_labels:
        labels = train.read().labels
    return annotations if labels == annotations.labels else annotations.with_labels(labels)


def _find_coco(path: Path, split: str) -> Source | None:
    image_folders = {
        path / f"{split}.json": path / "images",
        path / split / "_annotations.coco.json": path / split,
        path / "annotations" / f"instances_{split}2017.json": path / f"{split}2017",
    }
    for file, images in image_folders.items():
        if file.is_file():
            return Source(file, partial(_read_coco, file, images, complete_labels=file.parent.name == "annotations"))
    return None


def _read_coco(file: Path, folder: Path, *, complete_labels: bool) -> Annotations:
    try:
        document: dict[str, Any] = json.loads(file.read_text("utf-8"))
        categories = sorted(document["categories"], key=lambda category: int(category["id"]))
        class_ids = {category["id"]: i for i, category in enumerate(categories)}
        labels = tuple(str(category["name"]) for category in categories)
        images = {image["id"]: AnnotatedImage(folder / image["file_name"], file, []) for image in document["images"]}
        if len(images) < len(document["images"]):
            raise ValueError("two images have the same id")
        annotations: list[dict[str, Any]] = document["annotations"]
        if not all(isinstance(annotation, dict) for annotation in annotations):
            raise ValueError("an annotation is no object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not in COCO's format: {type(error).__name__} {error}") from error
    problems = []
    for number, annotation in enumerate(annotations):
        where = f"annotation {annotation.get('id', f'number {number}')}"
        try:
            x, y, width, height = map(float, annotation["bbox"])
            class_id = class_ids.get(annotation["category_id"])
            label = f"category {annotation['category_id']}" if class_id is None else labels[class_id]
            box = (x, y, x + width, y + height)
            images[annotation["image_id"]].objects.append(
                Annotation(where, label, class_id, box, bool(annotation.get("iscrowd", 0)))
            )
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{file}: not in COCO's format: {where}: {type(error).__name__} {error}")
    return Annotations(validate_labels(file, labels), list(images.values()), problems, complete_labels=complete_labels)


def _find_yolo(path: Path, split: str) -> Source | None:
    for images, label_folder in ((f"images/{split}", f"labels/{split}"), (f"{split}/images", f"{split}/labels")):
        if (path / images).is_dir() and (path / label_folder).is_dir():
            return Source(path / label_folder, partial(_read_yolo, path, path / images, path / label_folder))
    return None


def _read_yolo(path: Path, folder: Path, label_folder: Path) -> Annotations:
    labels = _yolo_labels(path)
    images = []
    problems: list[str] = []
    for name in image_files(folder):
        file = (label_folder / name).with_suffix(".txt")
        objects = []
        try:
            lines = file.read_text("utf-8-sig").splitlines() if file.exists() else []
        except (OSError, ValueError) as error:
            problems.append(f"{file}: cannot be read: {error}")
            lines = []
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    objects.append(_yolo_object(f"line {number}", line, labels))
            except ValueError:
                expected = "a class id and four fractions, or the corners of a polygon"
                problems.append(f"{file}: line {number}: expected {expected}, found {line.strip()[:60]!r}")
        images.append(AnnotatedImage(folder / name, file, objects))
    return Annotations(labels, images, problems, complete_labels=True, fractions=True)


def _yolo_object(where: str, line: str, labels: tuple[str, ...]) -> Annotation:
    first, *numbers = line.split()
    class_id, values = int(first), [float(number) for number in numbers]
    known = 0 <= class_id < len(labels)
    if len(values) == 4:
        x, y, width, height = values
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    elif len(values) >= 6 and len(values) % 2 == 0:
        box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    else:
        raise ValueError
    return Annotation(where, labels[class_id] if known else f"class {first}", class_id if known else None, box, False)


def _yolo_labels(path: Path) -> tuple[str, ...]:
    file = next((path / name for name in _YAML_FILES if (path / name).is_file()), None)
    if file is None:
        listed = read_label_file(path)
        if listed is None:
            raise DataError(f"{path}: expected data.yaml or classes.txt with the names of the classes, found neither")
        return listed
    try:
        names = yaml.safe_load(file.read_text("utf-8-sig"))["names"]
        if isinstance(names, dict):
            names = [names[i] for i in range(len(names))]
        if not isinstance(names, list):
            raise TypeError(f"names is {names!r}")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{file}: expected names, a list or numbered from 0: {type(error).__name__} {error}") from error
    return validate_labels(file, [str(name) for name in names])


def _find_voc(path: Path, split: str) -> Source | None:
    roots = [path, *sorted(path.glob("VOC[0-9]*")), *sorted(path.glob("VOCdevkit/VOC[0-9]*"))]
    lists = [file for root in roots if (file := root / "ImageSets" / "Main" / f"{split}.txt").is_file()]
    return Source(lists[0], partial(_read_voc, lists)) if lists else None


def _read_voc(lists: list[Path]) -> Annotations:
    found: list[AnnotatedImage] = []
    problems: list[str] = []
    for file in lists:
        root = file.parents[2]
        try:
            names = [line.split()[0] for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: expected the name of an image on each line: {error}") from error
        for name in names:
            image, annotation = root / "JPEGImages" / f"{name}.jpg", root / "Annotations" / f"{name}.xml"
            objects: list[Annotation] = []
            try:
                tree = ElementTree.parse(annotation).getroot()
            except (OSError, ElementTree.ParseError) as error:
                problems.append(f"{annotation}: not in VOC's format: {error}")
            else:
                filename = tree.findtext("filename", "").strip()
                if filename and not image.exists() and (root / "JPEGImages" / filename).is_file():
                    image = root / "JPEGImages" / filename
                objects += _voc_objects(annotation, tree, problems)
            found.append(AnnotatedImage(image, annotation, objects))
    labels = tuple(sorted({item.label for image in found for item in image.objects}))
    class_ids = {label: i for i, label in enumerate(labels)}
    images = [
        image._replace(objects=[item._replace(class_id=class_ids[item.label]) for item in image.objects])
        for image in found
    ]
    return Annotations(labels, images, problems)


def _voc_objects(file: Path, tree: ElementTree.Element, problems: list[str]) -> Iterator[Annotation]:
    for number, element in enumerate(tree.findall("object"), start=1):
        where = f"object {number}"
        label = element.findtext("name", "").strip()
        corners = [element.findtext(f"bndbox/{corner}", "") for corner in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = map(float, corners)
            if not label:
                raise ValueError
        except ValueError:
            problems.append(f"{file}: {where}: expected name and bndbox, found {label!r} {corners}")
            continue
        box = (left - 1 if left else left, top - 1 if top else top, right, bottom)  # some tools count from 0
        yield Annotation(where, label, None, box, element.findtext("difficult", "0").strip() == "1")
