"""Image loading: images are decoded once and cached in memory, or decoded by worker processes in every epoch.

Loaded images are the input of augmentation: uint8, resized at most. Shapes: B images of H x W pixels.
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
Decoded = tuple[Pixels, tuple[int, int]]  # and the height and width of the original image

_MAX_CACHE_BYTES = 2 * 2**30  # bytes, all processes on a machine
_SAMPLE = 32  # images, to estimate the size of the cache
_CROP_MARGIN = 1.25  # loaded size over network input: large random resized crops lose no detail


class ImageBatch(NamedTuple):
    """Images padded to one size, at the bottom and right."""

    pixels: Tensor  # uint8 [B, H, W, 3]
    sizes: Tensor  # int64 [B, 2], height and width of each valid region
    image_sizes: Tensor  # int64 [B, 2], height and width of the original images


class ImageCache:
    """The loaded images of a data set, by index."""

    def __init__(self, data: Data, recipe: Recipe, *, show: bool) -> None:
        self._dataset = _DecodedImages(data, image_transform(recipe))
        self._workers = recipe.workers
        self._cached: list[Decoded] | None = None
        processes = local_world_size()
        budget = _MAX_CACHE_BYTES / processes
        if recipe.cache == "memory" or (recipe.cache == "auto" and self._estimate_bytes() <= budget):
            self._cached = self._decode_all(show, threads=max(1, (os.cpu_count() or 1) // processes))

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, batches: Sequence[Tensor]) -> Iterator[ImageBatch]:
        """Yield a batch for each tensor of indices.

        Raises:
            DataError: an image is broken.
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
        """Estimate the bytes of all loaded images."""
        sample = np.unique(np.linspace(0, len(self) - 1, _SAMPLE, dtype=int))
        return float(np.mean([self._decoded(int(i))[0].nbytes for i in sample])) * len(self)

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
    """Returns errors instead of raising them: DataLoader wraps errors of its workers in their tracebacks."""

    def __init__(self, data: Data, transform: Callable[[Image.Image], Pixels]) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Decoded | DataError:
        try:
            if isinstance(self.transform, _EvaluationTransform):
                reduced = self.data.image_for(index, self.transform.recipe.training_preprocessing)
                return self.transform(reduced), (reduced.height, reduced.width)
            image = self.data.image(index)
            return self.transform(image), (image.height, image.width)
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
    for number in (signal.SIGTERM, signal.SIGINT):  # sent to the process group; the training process ends its workers
        signal.signal(number, signal.SIG_IGN)


class _ResizeShortest:
    """Downscale an image so that its shortest edge has at most `shortest` pixels."""

    def __init__(self, shortest: int) -> None:
        self.shortest = shortest

    def __call__(self, image: Image.Image) -> Pixels:
        scale = self.shortest / min(image.size)
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        return np.asarray(image)


class _EvaluationTransform:
    """Preprocess an image as in evaluation."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(self, image: Image.Image | ReducedImage) -> Pixels:
        if isinstance(self.recipe, ClassificationRecipe):
            return to_classification_pixels(image, self.recipe.preprocessing)
        return to_detection_pixels(image, self.recipe.training_preprocessing)


def image_transform(recipe: Recipe) -> Callable[[Image.Image], Pixels]:
    """Return the transform of loaded images: that of evaluation, unless augmentation takes random resized crops."""
    if isinstance(recipe, ClassificationRecipe) and recipe.augmentation.crop == "resized":
        return _ResizeShortest(round(_CROP_MARGIN * max(recipe.preprocessing.input_size)))
    return _EvaluationTransform(recipe)
