"""Labelled images in memory, read from any layout on disk.

Images stay encoded, and image files are read on access; `bundle.images` is the only decoder. Per-image data is stored
end to end in a few arrays, so that a million images are passed to other processes quickly. This module does not need
torch.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.errors import ImageError
from vitrine.bundle.images import ReducedImage, decode, decode_for
from vitrine.bundle.manifest import Preprocessing
from vitrine.models.training.errors import DataError

IMBALANCE = 10  # ratio of the largest to the smallest class that is reported
T = TypeVar("T")


class _Items(Sequence[T]):
    """A sequence that creates its items on access."""

    @abstractmethod
    def _item(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, found {index}")
        return self._item(index % len(self))


class Ragged(_Items[NDArray[Any]]):
    """Arrays of different lengths, stored end to end: the i-th is `values[offsets[i] : offsets[i + 1]]`."""

    def __init__(self, values: NDArray[Any], offsets: NDArray[np.int64]) -> None:
        self.values, self.offsets = values, offsets

    @classmethod
    def of(cls, values: NDArray[Any], lengths: Sequence[int]) -> Self:
        return cls(values, np.cumsum([0, *lengths], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _item(self, index: int) -> NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class Packed(_Items[bytes]):
    """The contents of files in one array."""

    def __init__(self, files: Ragged) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def _item(self, index: int) -> bytes:
        return self.files[index].tobytes()


class Names(_Items[str]):
    """Strings with a common prefix, in one array."""

    def __init__(self, prefix: str, suffixes: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in suffixes]
        self.prefix = prefix
        self._suffixes = Packed(Ragged.of(np.frombuffer(b"".join(encoded), np.uint8), list(map(len, encoded))))

    def __len__(self) -> int:
        return len(self._suffixes)

    def _item(self, index: int) -> str:
        return self.prefix + self._suffixes[index].decode("utf-8", "surrogateescape")


class Files(_Items[bytes]):
    """The contents of files, read on access."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def _item(self, index: int) -> bytes:
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise DataError(f"{self.paths[index]}: cannot be read: {error.strerror}") from error


class Chosen(_Items[T]):
    """A selection of the items of a sequence, in any order."""

    def __init__(self, items: Sequence[T], indices: NDArray[np.int64]) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def _item(self, index: int) -> T:
        return self.items[int(self.indices[index])]


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
        """Decode one image at full size.

        Raises:
            DataError: the image is broken; the message names it.
        """
        return self._decoded(index, decode)

    def image_for(self, index: int, preprocessing: Preprocessing) -> ReducedImage:
        """Decode one image as the service does for a network.

        Raises:
            DataError: the image is broken; the message names it.
        """
        return self._decoded(index, lambda data: decode_for(data, preprocessing))

    def _decoded(self, index: int, decoder: Callable[[bytes], T]) -> T:
        try:
            return decoder(self.encoded[index])
        except ImageError as error:
            raise DataError(f"{self.names[index]}: {error}") from error


@dataclass(frozen=True)
class ClassificationData(_Images):
    """One split of encoded images, each with one class."""

    class_ids: NDArray[np.int64]  # [n], indices into labels

    def subset(self, indices: NDArray[np.int64]) -> "ClassificationData":
        """Select the images at `indices` without reading them."""
        names, encoded = Chosen(self.names, indices), Chosen(self.encoded, indices)
        return replace(self, names=names, encoded=encoded, class_ids=self.class_ids[indices])


@dataclass(frozen=True)
class DetectionData(_Images):
    """One split of encoded images, each with any number of boxes."""

    class_ids: Sequence[NDArray[np.int64]]  # [n_i] each, indices into labels
    boxes: Sequence[NDArray[np.float32]]  # [n_i, 4] each, xyxy in pixels of the upright image

    def subset(self, indices: NDArray[np.int64]) -> "DetectionData":
        """Select the images at `indices` without reading them."""
        return replace(
            self,
            names=Chosen(self.names, indices),
            encoded=Chosen(self.encoded, indices),
            class_ids=Chosen(self.class_ids, indices),
            boxes=Chosen(self.boxes, indices),
        )


Data = ClassificationData | DetectionData


def balanced_weights(class_ids: NDArray[np.int64], num_classes: int) -> NDArray[np.float32]:
    """Return weights of the classes by which each has the same total, and an image 1 on average; [num_classes]."""
    counts = np.bincount(class_ids, minlength=num_classes)
    present = np.maximum(counts, 1)
    return (len(class_ids) / (np.count_nonzero(counts) * present)).astype(np.float32)


def is_unbalanced(class_ids: NDArray[np.int64]) -> bool:
    """Return whether the largest class has at least `IMBALANCE` times the images of the smallest that occurs."""
    counts = np.bincount(class_ids)
    counts = counts[counts > 0]
    return bool(len(counts)) and bool(counts.max() >= IMBALANCE * counts.min())


def check_labels(data: Data, labels: Sequence[str]) -> None:
    """Check that the labels of the data are those of a network, in the same order.

    Raises:
        DataError: they differ; the message names the first difference.
    """
    for i, (expected, found) in enumerate(zip_longest(labels, data.labels)):
        if expected != found:
            hint = ""
            if expected is not None and found is not None and expected.partition(",")[0] == found:
                hint = "; the network's label also lists synonyms: import its weights with --labels imagenet-1k"
            raise DataError(
                f"{data.name}: labels: expected {len(labels)}, found {len(data.labels)}; the first that differs is "
                f"number {i}: expected {expected!r}, found {found!r}{hint}"
            )
