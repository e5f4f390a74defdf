"""Crop the objects of a detection set into a classification set, to pretrain a detector's backbone."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vitrine.models.training.data.classification_layouts import write_packed
from vitrine.models.training.data.dataset import DetectionData
from vitrine.models.training.errors import DataError

_QUALITY = 95  # of the JPEG files


def write_crops(data: DetectionData, file: Path, *, margin: float, smallest: int, show: bool = False) -> int:
    """Write a packed split with an image for each object; return the number of images.

    Args:
        data: images with boxes.
        file: `<split>.npz` to write.
        margin: context on each side of a box, as a fraction of the box's edge; clipped to the image.
        smallest: objects with fewer visible pixels in width or height are skipped; at least 1.
        show: whether to show progress.

    Raises:
        DataError: an image is broken, no object is large enough, or the file exists or cannot be written.
    """
    if file.exists():
        raise DataError(f"{file}: is there already; choose another folder")
    crops = list(_crops(data, margin, smallest, show))
    if not crops:
        raise DataError(f"{data.name}: expected an object of {smallest} x {smallest} pixels or more, found none")
    encoded, class_ids = zip(*crops, strict=True)
    partial = file.with_suffix(".partial.npz")  # an interrupted write leaves no split
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_packed(partial, encoded, np.array(class_ids, dtype=np.int64), data.labels)
        partial.replace(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error}") from error
    return len(crops)


def _crops(data: DetectionData, margin: float, smallest: int, show: bool) -> Iterator[tuple[bytes, int]]:
    for index in tqdm(range(len(data)), unit=" images", dynamic_ncols=True, disable=None if show else True):
        image = data.image(index)
        for class_id, box in zip(data.class_ids[index], data.boxes[index], strict=True):
            visible = box.clip(0, (*image.size, *image.size))
            edges = visible[2:] - visible[:2]
            if edges.min() < smallest:
                continue
            left, top = np.floor((visible[:2] - margin * edges).clip(0)).astype(int).tolist()
            right, bottom = np.ceil((visible[2:] + margin * edges).clip(max=image.size)).astype(int).tolist()
            buffer = io.BytesIO()
            image.crop((left, top, right, bottom)).save(buffer, "JPEG", quality=_QUALITY)
            yield buffer.getvalue(), int(class_id)
