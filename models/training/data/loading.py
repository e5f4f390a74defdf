"""Images on their way into batches: decoded once and kept in memory, or by worker processes each time.

A canvas is what augmentation works on: a uint8 image that is at most resized. Shapes: B images, H x W pixels.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vitrine.bundle.images import ReducedImage, pad_and_stack, to_classification_pixels, to_detection_pixels
from vitrine.models.training.data.dataset import Data
from vitrine.models.training.distributed import local_world_size
from vitrine.models.training.errors import DataError
from vitrine.models.training.recipe import ClassificationRecipe, Recipe

Pixels = NDArray[np.uint8]  # [H, W, 3]
Decoded = tuple[Pixels, tuple[int, int]]  # with the height and width of the image that it was made from

_MAX_CACHE_BYTES = 2 * 2**30  # bytes, of all processes on a machine
_SAMPLE = 32  # images, to estimate how much memory all of them take
_MARGIN = 1.25  # canvas over network input: random resized crops that take most of an image lose no detail


class ImageBatch(NamedTuple):
    """Canvases of one size, padded below and to the right."""

    pixels: Tensor  # uint8 [B, H, W, 3]
    sizes: Tensor  # int64 [B, 2], height and width of each valid region
    image_sizes: Tensor  # int64 [B, 2], height and width of the images that the canvases were made from


class ImageCache:
    """The canvases of a data set, by index."""

    def __init__(self, data: Data, recipe: Recipe, *, show: bool) -> None:
        self._dataset = _DecodedImages(data, image_transform(recipe))
        self._workers = recipe.workers
        self._cached: list[Decoded] | None = None
        beside = local_world_size()
        if recipe.cache == "memory" or (recipe.cache == "auto" and self._estimate_bytes() <= _MAX_CACHE_BYTES / beside):
            self._cached = self._decode_all(show, threads=max(1, (os.cpu_count() or 1) // beside))

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, batches: Sequence[Tensor]) -> Iterator[ImageBatch]:
        """A batch for each tensor of indices.

        Raises:
            DataError: naming an image that is broken.
        """
        if self._cached is not None:
            for indices in batches:
                yield _stack([self._cached[i] for i in indices.tolist()])
            return
        loader = DataLoader(
            self._dataset,
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )
        for loaded in loader:
            if isinstance(loaded, DataError):
                raise loaded
            yield loaded

    def _estimate_bytes(self) -> float:
        """About how many bytes all canvases take."""
        some = np.unique(np.linspace(0, len(self) - 1, _SAMPLE, dtype=int))
        return float(np.mean([self._decoded(int(i))[0].nbytes for i in some])) * len(self)

    def _decode_all(self, show: bool, threads: int) -> list[Decoded]:
        bar = {"desc": "decode", "total": len(self), "leave": False, "disable": None if show else True}
        with ThreadPoolExecutor(threads) as pool:
            try:
                return list(tqdm(pool.map(self._decoded, range(len(self))), **bar))
            except DataError:
                pool.shutdown(cancel_futures=True)
                raise

    def _decoded(self, index: int) -> Decoded:
        decoded = self._dataset[index]
        if isinstance(decoded, DataError):
            raise decoded
        return decoded


class _DecodedImages(Dataset[Decoded | DataError]):
    """Errors are returned: a DataLoader would wrap what its workers raise in their tracebacks."""

    def __init__(self, data: Data, make: Callable[[Image.Image], Pixels]) -> None:
        self.data, self.make = data, make

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Decoded | DataError:
        try:
            if isinstance(self.make, _EvaluationTransform):
                reduced = self.data.image_for(index, self.make.recipe.preprocessing)
                return self.make(reduced), (reduced.height, reduced.width)
            image = self.data.image(index)
            return self.make(image), (image.height, image.width)
        except DataError as error:
            return error


def _collate(images: list[Decoded | DataError]) -> ImageBatch | DataError:
    broken = next((image for image in images if isinstance(image, DataError)), None)
    return _stack([image for image in images if not isinstance(image, DataError)]) if broken is None else broken


def _stack(images: Sequence[Decoded]) -> ImageBatch:
    arrays, image_sizes = zip(*images, strict=True)
    pixels, sizes = pad_and_stack(arrays)
    return ImageBatch(torch.from_numpy(pixels), torch.from_numpy(sizes), torch.tensor(image_sizes))


def _start_worker(_: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # sent to the whole group; the training process saves and ends us
        signal.signal(number, signal.SIG_IGN)


class _Shrink:
    """An image with its shortest edge at most `shortest` pixels long."""

    def __init__(self, shortest: int) -> None:
        self.shortest = shortest

    def __call__(self, image: Image.Image) -> Pixels:
        scale = self.shortest / min(image.size)
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        return np.asarray(image)


class _EvaluationTransform:
    """An image as evaluation sees it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(self, image: Image.Image | ReducedImage) -> Pixels:
        if isinstance(self.recipe, ClassificationRecipe):
            return to_classification_pixels(image, self.recipe.preprocessing)
        return to_detection_pixels(image, self.recipe.preprocessing)


def image_transform(recipe: Recipe) -> Callable[[Image.Image], Pixels]:
    """How an image becomes a canvas: as for evaluation, unless crops of the whole image are wanted."""
    if isinstance(recipe, ClassificationRecipe) and recipe.augmentation.crop == "resized":
        return _Shrink(round(_MARGIN * max(recipe.preprocessing.input_size)))
    return _EvaluationTransform(recipe)
