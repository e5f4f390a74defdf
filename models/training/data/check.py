"""Validate a data set before training.

Every image is decoded once, as in training. Broken images, boxes without area or outside their image, unknown labels
and the same picture in two splits are errors. Anything else that looks suspicious is a warning.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from vitrine.bundle.errors import ImageError
from vitrine.bundle.images import decode
from vitrine.bundle.manifest import Task
from vitrine.models.training.data.classification_layouts import SPLITS, LabelledImages, unknown_label
from vitrine.models.training.data.contact_sheet import DrawnBox, box_sheet, class_sheet
from vitrine.models.training.data.dataset import IMBALANCE, Files
from vitrine.models.training.data.detection_layouts import AnnotatedImage, Annotation, Annotations, Box
from vitrine.models.training.data.layouts import find_task, missing_split, read_split
from vitrine.models.training.errors import DataError

_TOLERANCE = 1.0  # pixels; annotation tools round boxes
_AREAS = {"small": 32**2, "medium": 96**2, "large": float("inf")}  # upper bounds in square pixels, as in COCO
_MAX_SHOWN = 5  # findings of a kind in the summary
_CHUNK = 64  # images per task of the thread pool
_MAX_ROWS, _MAX_COLUMNS = 30, 10  # classes, and images per class, on a contact sheet
_MAX_PICTURES = 24  # with boxes, on a contact sheet


@dataclass(frozen=True)
class Finding:
    """A problem in a data set."""

    level: Literal["error", "warning"]
    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Sizes:
    """Smallest, median and largest size of the upright images, in pixels."""

    width: tuple[int, int, int]
    height: tuple[int, int, int]


@dataclass(frozen=True)
class SplitSummary:
    """The contents of a split."""

    images: int
    per_class: dict[str, int]  # images; boxes for detection
    sizes: Sizes | None  # None without a valid image
    boxes: int | None = None  # None for classification
    boxes_by_area: dict[str, int] = field(default_factory=dict)
    left_out: int = 0  # crowds and difficult objects
    without_boxes: int = 0  # images


@dataclass(frozen=True)
class DataSummary:
    """The contents of a data set, and its problems."""

    path: str
    task: Task
    labels: tuple[str, ...]
    splits: dict[str, SplitSummary]
    findings: list[Finding]

    @property
    def errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _InspectedImage(NamedTuple):
    """The outcome of decoding an image."""

    size: tuple[int, int] | None  # width and height
    digest: bytes  # SHA-256 of its pixels, or of its bytes if it is broken
    error: str | None


@dataclass(frozen=True)
class _Split:
    """A split of either task, with its images still encoded."""

    labels: tuple[str, ...]
    names: Sequence[str]
    encoded: Sequence[bytes]
    problems: list[str]
    class_ids: Sequence[int] = ()
    annotated: Sequence[AnnotatedImage] = ()
    fractions: bool = False


def check_data(
    path: Path, splits: Sequence[str] = (), *, sheets: Path | None = None, show: bool = False
) -> DataSummary:
    """Validate a data set without stopping at the first problem.

    Args:
        path: in any layout of `models.training.data.layouts`.
        splits: splits to check; by default those of train, val and test that exist.
        sheets: folder for a contact sheet of each split, SPLIT.png.
        show: whether to show progress.

    Raises:
        DataError: there is no data set, or a requested split is missing.
    """
    tasks = {split: find_task(path, split) for split in splits or SPLITS}
    task = next(filter(None, tasks.values()), None)
    if task is None or (splits and None in tasks.values()):
        raise missing_split(path, next(split for split in tasks if tasks[split] is None))
    chosen = [split for split in tasks if splits or tasks[split] is task]
    labels: tuple[str, ...] = ()
    findings: list[Finding] = []
    summaries: dict[str, SplitSummary] = {}
    locations: dict[bytes, list[tuple[str, str]]] = {}
    for split in chosen:
        try:
            read = _as_split(read_split(path, task, split))
        except DataError as error:
            findings.append(Finding("error", "unreadable split", split, str(error)))
            continue
        labels = labels or read.labels
        findings += [Finding("error", "unreadable annotation", split, problem) for problem in read.problems]
        inspected = _inspect_images(read, split, show)
        for name, image in zip(read.names, inspected, strict=True):
            locations.setdefault(image.digest, []).append((split, name))
            if image.error is not None:
                findings.append(Finding("error", "broken image", name, image.error))
        if task is Task.DETECTION:
            summaries[split] = _summarise_detection(read, inspected, findings)
        else:
            per_class = np.bincount(read.class_ids, minlength=len(read.labels)).tolist()
            counts = dict(zip(read.labels, per_class, strict=True))
            summaries[split] = SplitSummary(len(read.names), counts, _sizes(inspected))
        findings += _check_classes(split, summaries[split].per_class)
        if sheets is not None:
            sheets.mkdir(parents=True, exist_ok=True)
            _contact_sheet(read, inspected).save(sheets / f"{split}.png")
    findings += _check_duplicates(locations)
    return DataSummary(str(path), task, labels, summaries, findings)


def format_summary(summary: DataSummary) -> str:
    """Format a summary as text."""
    unit = "boxes" if summary.task is Task.DETECTION else "images"
    lines = [f"{summary.path}: {summary.task}, {len(summary.labels)} labels"]
    for name, split in summary.splits.items():
        lines.append(f"\n{name}: {split.images:,} images" + ("" if split.boxes is None else f", {split.boxes:,} boxes"))
        if split.sizes is not None:
            edges = ", ".join(
                f"{edge} {low} to {high} (median {middle})" for edge, (low, middle, high) in asdict(split.sizes).items()
            )
            lines.append(f"  pixels: {edges}")
        if split.boxes is not None:
            areas = ", ".join(f"{count:,} {area}" for area, count in split.boxes_by_area.items())
            lines.append(f"  boxes by area (up to 32², up to 96², larger): {areas}; left out: {split.left_out:,}")
            lines.append(f"  images without boxes: {split.without_boxes:,}")
    if summary.splits:
        width = max(len(unit) + 10, *map(len, summary.labels))
        lines.append(f"\n{unit + ' per class':<{width}}" + "".join(f" {name:>9}" for name in summary.splits))
        for label in summary.labels:
            counts = "".join(f" {split.per_class.get(label, 0):>9,}" for split in summary.splits.values())
            lines.append(f"{label:<{width}}{counts}")
    for level in ("error", "warning"):
        kinds = Counter(finding.kind for finding in summary.findings if finding.level == level)
        for kind, count in kinds.items():
            lines.append(f"\n{level}: {kind} ({count:,})")
            same = [finding for finding in summary.findings if (finding.level, finding.kind) == (level, kind)]
            lines += [f"  {finding}" for finding in same[:_MAX_SHOWN]]
            lines += [f"  ... and {count - _MAX_SHOWN:,} more"] * (count > _MAX_SHOWN)
    lines.append(f"\nerrors: {summary.errors:,}, warnings: {len(summary.findings) - summary.errors:,}")
    return "\n".join(lines)


def _as_split(found: LabelledImages | Annotations) -> _Split:
    if isinstance(found, LabelledImages):
        data = found.data
        return _Split(data.labels, data.names, data.encoded, found.problems, data.class_ids.tolist())
    paths = [str(image.path) for image in found.images]
    return _Split(found.labels, paths, Files(paths), found.problems, annotated=found.images, fractions=found.fractions)


def _inspect_images(split: _Split, name: str, show: bool) -> list[_InspectedImage]:
    chunks = [range(i, min(i + _CHUNK, len(split.names))) for i in range(0, len(split.names), _CHUNK)]
    bar = tqdm(total=len(split.names), desc=name, unit=" images", leave=False, disable=None if show else True)
    inspected = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:
        for chunk in pool.map(lambda indices: [_inspect_image(split.encoded, i) for i in indices], chunks):
            inspected += chunk
            bar.update(len(chunk))
    return inspected


def _inspect_image(encoded: Sequence[bytes], index: int) -> _InspectedImage:
    data = b""
    try:
        data = encoded[index]
        image = decode(data)
    except (ImageError, DataError) as error:
        reason = str(error).rpartition(": ")[2] if isinstance(error, DataError) else str(error)
        return _InspectedImage(None, hashlib.sha256(data).digest() if data else b"", reason)
    return _InspectedImage(image.size, hashlib.sha256(b"%d %d " % image.size + image.tobytes()).digest(), None)


def _sizes(inspected: Sequence[_InspectedImage]) -> Sizes | None:
    sizes = np.array([image.size for image in inspected if image.size is not None], int).reshape(-1, 2)
    if len(sizes) == 0:
        return None
    (low, lower), (middle, centre), (high, higher) = np.quantile(sizes, (0, 0.5, 1), axis=0).astype(int).tolist()
    return Sizes((low, middle, high), (lower, centre, higher))


def _summarise_detection(split: _Split, inspected: Sequence[_InspectedImage], findings: list[Finding]) -> SplitSummary:
    per_class = dict.fromkeys(split.labels, 0)
    areas = dict.fromkeys(_AREAS, 0)
    boxes = left_out = without_boxes = 0
    for image, (size, *_) in zip(split.annotated, inspected, strict=True):
        valid = 0
        for item in image.objects:
            box = _pixel_box(split, item, size)
            problem = _box_problem(item, box, size, split.labels)
            if problem is not None:
                where = f"{image.path.name}: {item.where} of {image.file}"
                findings.append(Finding("error", problem[0], where, problem[1]))
            elif item.left_out:
                left_out += 1
            else:
                valid += 1
                per_class[item.label] += 1
                if box is not None:
                    area = (box[2] - box[0]) * (box[3] - box[1])
                    areas[next(name for name, most in _AREAS.items() if area < most)] += 1
        boxes += valid
        without_boxes += not valid
    return SplitSummary(len(inspected), per_class, _sizes(inspected), boxes, areas, left_out, without_boxes)


def _pixel_box(split: _Split, item: Annotation, size: tuple[int, int] | None) -> Box | None:
    """Return a box in pixels; None if it is in fractions of an image of unknown size."""
    if not split.fractions:
        return item.box
    if size is None:
        return None
    (left, top, right, bottom), (width, height) = item.box, size
    return left * width, top * height, right * width, bottom * height


def _box_problem(
    item: Annotation, box: Box | None, size: tuple[int, int] | None, labels: Sequence[str]
) -> tuple[str, str] | None:
    """Return the kind of problem of an object and its description, or None."""
    if item.class_id is None:
        return "unknown label", unknown_label(item.label, labels)
    numbers = ", ".join(f"{value:g}" for value in item.box)
    if not np.isfinite(item.box).all():
        return "box without numbers", f"expected a box of finite numbers, found {numbers}"
    if item.left_out:
        return None
    if item.box[0] >= item.box[2] or item.box[1] >= item.box[3]:
        return "empty box", f"{item.label}: expected left, top < right, bottom, found {numbers}"
    if box is None or size is None:
        return None
    overshoot = max(-box[0], -box[1], box[2] - size[0], box[3] - size[1])
    if overshoot > _TOLERANCE:
        reach = f"reaches {overshoot:.1f} pixels out of the image of {size[0]} x {size[1]}"
        return "box outside its image", f"{item.label}: {numbers} {reach}"
    return None


def _check_classes(split: str, per_class: dict[str, int]) -> Iterator[Finding]:
    if empty := [label for label, count in per_class.items() if count == 0]:
        names = ", ".join(empty[:_MAX_SHOWN]) + ", ..." * (len(empty) > _MAX_SHOWN)
        yield Finding("warning", "class without examples", split, f"{len(empty)} of {len(per_class)} classes: {names}")
    counts = {label: count for label, count in per_class.items() if count}
    if counts:
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        ratio = counts[most] / counts[least]
        if ratio >= IMBALANCE:
            sizes = f"{most} is {ratio:.0f} times as frequent as {least} ({counts[most]:,} to {counts[least]:,})"
            yield Finding("warning", "unbalanced classes", split, sizes)


def _contact_sheet(split: _Split, inspected: Sequence[_InspectedImage]) -> Image.Image:
    """Draw some images of each class, or some images with their boxes."""
    valid = np.array([i for i, image in enumerate(inspected) if image.error is None], np.int64)
    if split.annotated:
        return box_sheet([_with_boxes(split, i, inspected[i].size) for i in _evenly_spaced(valid, _MAX_PICTURES)])
    class_ids = np.array(split.class_ids)[valid]
    rows = []
    for class_id in _evenly_spaced(np.unique(class_ids), _MAX_ROWS):
        indices = _evenly_spaced(valid[class_ids == class_id], _MAX_COLUMNS)
        rows.append((split.labels[class_id], [decode(split.encoded[i]) for i in indices]))
    return class_sheet(rows)


def _with_boxes(split: _Split, index: int, size: tuple[int, int] | None) -> tuple[Image.Image, list[DrawnBox]]:
    boxes = []
    for item in split.annotated[index].objects:
        box = _pixel_box(split, item, size)
        if box is not None and np.isfinite(box).all():
            boxes.append(DrawnBox(item.label, None if item.left_out else item.class_id, box))
    return decode(split.encoded[index]), boxes


def _evenly_spaced(values: NDArray[np.int64], count: int) -> list[int]:
    """Return at most `count` values at even distances."""
    return values[np.unique(np.linspace(0, len(values) - 1, count).round().astype(int))].tolist() if len(values) else []


def _check_duplicates(locations: dict[bytes, list[tuple[str, str]]]) -> Iterator[Finding]:
    for digest, same in locations.items():
        if digest and len(same) > 1:
            (split, name), *others = same
            across = any(other != split for other, _ in others)
            names = [f"{other} ({part})" for part, other in others[:_MAX_SHOWN]]
            rest = ", ".join(names + ["..."] * (len(others) > _MAX_SHOWN))
            kind = "same picture in two splits" if across else "same picture twice"
            yield Finding("error" if across else "warning", kind, f"{name} ({split})", f"equals {rest}")
