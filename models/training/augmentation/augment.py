"""Augmentation of images and labels, configured by a recipe.

All geometric operations on an image (crop, flip, RandAugment's) are composed into one map and one interpolation, then
colors change. An image draws its random numbers from its own row of `noise`, so that the result does not depend on the
batch. Shapes: B images of H x W pixels, h x w pixels of network input, K classes.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from vitrine.models.training.augmentation import randaugment
from vitrine.models.training.augmentation.color import color_jitter
from vitrine.models.training.augmentation.mixup import mixup_cutmix, random_erasing
from vitrine.models.training.augmentation.mosaic import GROUP, Tiles, four_tiles, move_boxes, one_tile, render_tiles
from vitrine.models.training.augmentation.resampling import (
    clamp_positions,
    flip_valid_region,
    pixel_centres,
    resample,
    shift_and_flip,
    valid_pixels,
)
from vitrine.models.training.targets import Target

NOISE = 32  # columns of `noise`; the last one is for denoising

_POSITION, _FLIPS, _COLOR = slice(0, 2), slice(2, 4), slice(4, 8)
_AREA, _RATIO, _MIX, _ERASE, _OPERATIONS = 8, 9, slice(10, 14), slice(14, 20), 20  # classification
_ZOOM_CHOICE, _ZOOM, _MOSAIC_CHOICE, _CENTRE, _TILE_POSITIONS = 8, 9, 10, slice(11, 13), slice(13, 21)  # detection


def _in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"expected the lower bound first, found {bounds[0]:g} and {bounds[1]:g}")
    return bounds


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Alpha = Annotated[float, Field(ge=0, le=100)]


class _Augmentation(BaseModel):
    """Settings of both tasks. Brightness, contrast and saturation factors are uniform in 1 - setting to 1 + setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip: Fraction = 0.5  # fraction of images flipped left to right
    brightness: Fraction = 0.0  # largest relative change
    contrast: Fraction = 0.0  # largest relative change, about the image's mean grey
    saturation: Fraction = 0.0  # largest relative change
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # largest rotation, as a fraction of the hue circle

    def _color_jitter(self, pixels: Tensor, noise: Tensor, valid: Tensor | None = None) -> Tensor:
        amounts = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue], device=pixels.device)
        if not any((self.brightness, self.contrast, self.saturation, self.hue)):
            return pixels
        identity = torch.tensor([1.0, 1.0, 1.0, 0.0], device=pixels.device)
        return color_jitter(pixels, identity + amounts * (2 * noise[:, _COLOR] - 1), valid)


class ClassificationAugmentation(_Augmentation):
    """Augmentation of labelled images: crop and flip, RandAugment, color jitter, erasing, mixing, in this order."""

    # "resized": a random crop, resized to the network's input (Szegedy et al. 2015); "shift": the whole image, shifted
    # by a few pixels with grey fill; "none": the image as in evaluation.
    crop: Literal["resized", "shift", "none"] = "resized"
    # Area of a "resized" crop, as a fraction of the image's; less if it would not fit.
    scale: Annotated[tuple[Positive, Fraction], AfterValidator(_in_order)] = (0.08, 1.0)
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(_in_order)] = (3 / 4, 4 / 3)  # width / height
    padding: Annotated[float, Field(ge=0, le=0.5)] = 0.125  # largest "shift", as a fraction of the image's edge
    randaugment_ops: Annotated[int, Field(ge=0, le=4)] = 0  # RandAugment operations per image
    randaugment_magnitude: Annotated[float, Field(ge=0, le=randaugment.MAX_MAGNITUDE)] = 9.0  # 0 to 10
    erasing: Fraction = 0.0  # fraction of images in which a rectangle is erased
    mixup: Alpha = 0.0  # alpha of mixup; 0: off
    cutmix: Alpha = 0.0  # alpha of CutMix; 0: off; with mixup, each image gets one of the two

    @property
    def group(self) -> int:
        """Number of neighbouring images of a batch that are mixed with each other."""
        return 2 if self.mixup or self.cutmix else 1

    def __call__(
        self,
        images: Tensor,
        sizes: Tensor,
        class_ids: Tensor,
        num_classes: int,
        noise: Tensor,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: uint8 [B, H, W, 3]; of the network's input size unless crop is "resized".
            sizes: int64 [B, 2], height and width of each valid region.
            class_ids: int64 [B].
            num_classes: K.
            noise: float [B, NOISE], uniform in [0, 1), on the CPU.
            size: h and w.

        Returns:
            pixels uint8 [B, h, w, 3], and soft targets float [B, K] whose rows add up to 1.

        Raises:
            ValueError: the images do not have the size of the network's input.
        """
        if self.crop != "resized" and tuple(images.shape[1:3]) != tuple(size):
            found = f"{tuple(images.shape[1:3])} and {tuple(size)}"
            raise ValueError(f"crop={self.crop}: images and network input must have the same size, found {found}")
        device_noise = noise.to(images.device)
        operations, signs = randaugment.sample_operations(
            noise[:, _OPERATIONS : _OPERATIONS + 2 * self.randaugment_ops]
        )
        if self.randaugment_ops:
            affine = randaugment.affine_matrix(operations, signs, self.randaugment_magnitude, size).to(images.device)
            pixels = self._resample(images, sizes, device_noise, size, affine)
            pixels = randaugment.apply_color_operations(pixels, operations, signs, self.randaugment_magnitude)
        elif self.crop == "resized":
            pixels = self._resample(images, sizes, device_noise, size)
        elif self.flip or (self.crop == "shift" and self.padding):
            pixels = shift_and_flip(images, self._shift(device_noise, size), device_noise[:, _FLIPS][:, 0] < self.flip)
        else:
            pixels = images
        pixels = self._color_jitter(pixels, device_noise)
        if self.erasing:
            pixels = random_erasing(pixels, noise[:, _ERASE], self.erasing)
        targets = F.one_hot(class_ids, num_classes).float()
        return (
            mixup_cutmix(pixels, targets, noise[:, _MIX], self.mixup, self.cutmix)
            if self.group > 1
            else (pixels, targets)
        )

    def _shift(self, noise: Tensor, size: tuple[int, int]) -> Tensor:
        """Shift of each image in pixels, down and right: int64 [B, 2]."""
        if self.crop != "shift":
            return torch.zeros(len(noise), 2, dtype=torch.int64, device=noise.device)
        limit = torch.tensor([round(edge * self.padding) for edge in size], device=noise.device)
        return (noise[:, _POSITION] * (2 * limit + 1)).long() - limit

    def _resample(
        self, images: Tensor, sizes: Tensor, noise: Tensor, size: tuple[int, int], affine: Tensor | None = None
    ) -> Tensor:
        """Crop, flip and apply `affine`; with `affine`, the area outside the image is grey."""
        height, width = size
        edges = sizes.flip(-1).float()  # [B, 2]: width, height
        output = torch.tensor([width, height], device=images.device)
        if self.crop == "resized":
            window = self._crop_size(edges, noise)
            centre = window / 2 + noise[:, _POSITION] * (edges - window)
        else:
            window = output.expand_as(edges)
            centre = window / 2 - self._shift(noise, size).flip(-1)
        zoom = window / output
        zoom[:, 0] *= torch.where(noise[:, _FLIPS][:, 0] < self.flip, -1, 1)
        x = (pixel_centres(width, images.device) - width / 2).expand(len(images), 1, -1)
        y = (pixel_centres(height, images.device) - height / 2)[:, None].expand(len(images), -1, 1)
        if affine is not None:
            (a, b, c), (d, e, f) = (row[..., None, None].unbind(1) for row in affine[:, :2].unbind(1))
            x, y = a * x + b * y + c, d * x + e * y + f
        zoom, centre = zoom[..., None, None], centre[..., None, None]
        x, y = (
            clamp_positions(zoom[:, axis] * place + centre[:, axis], edge, fill=affine is not None)
            for axis, (place, edge) in enumerate(zip((x, y), edges[..., None, None].unbind(1), strict=True))
        )
        return resample(images, x, y)

    def _crop_size(self, edges: Tensor, noise: Tensor) -> Tensor:
        """Width and height of each crop in pixels; a crop that does not fit shrinks and keeps its ratio."""
        area = edges.prod(dim=1) * (self.scale[0] + (self.scale[1] - self.scale[0]) * noise[:, _AREA])
        low, high = (math.log(bound) for bound in self.ratio)
        ratio = torch.exp(low + (high - low) * noise[:, _RATIO])
        crop = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), dim=1)
        return crop * (edges / crop).amin(dim=1, keepdim=True).clamp(max=1)


class DetectionAugmentation(_Augmentation):
    """Augmentation of images with boxes: zoom or mosaic and flip, then color jitter. Images keep their size."""

    flip_vertical: Fraction = 0.0  # fraction of images flipped upside down
    # Scale factor, log-uniform: above 1 shows a part of the image, below 1 adds a grey border.
    zoom: Annotated[tuple[Annotated[float, Field(ge=0.5)], Positive], AfterValidator(_in_order)] = (1.0, 1.6)
    zoom_probability: Fraction = 1.0  # fraction of images that are zoomed
    mosaic: Fraction = 0.0  # fraction of images combined with three others (Bochkovskiy et al. 2020)
    feature_paste: Fraction = 0.0  # fraction of images whose right part is another's; needs cached features (`views`)
    min_visible: Fraction = 0.3  # a box is dropped if less than this fraction of its area is visible
    brightness: Fraction = 0.2
    contrast: Fraction = 0.2

    @property
    def group(self) -> int:
        """Number of neighbouring images of a batch that are mixed with each other."""
        return GROUP if self.mosaic else 1

    def __call__(
        self, images: Tensor, sizes: Tensor, targets: list[Target], noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Target]]:
        """Augment a batch.

        Args:
            images: uint8 [B, H, W, 3].
            sizes: int64 [B, 2], height and width of each valid region.
            targets: one per image.
            noise: float [B, NOISE], uniform in [0, 1), on the CPU.

        Returns:
            pixels uint8 [B, H, W, 3], arbitrary outside the valid regions; sizes int64 [B, 2], unchanged; mask of the
            valid pixels, bool [B, 1, H, W]; and the targets.
        """
        noise = noise.to(images.device)
        valid = valid_pixels(sizes, *images.shape[1:3])
        flip = noise[:, _FLIPS] < torch.tensor([self.flip, self.flip_vertical], device=images.device)
        zoom_enabled = self.zoom != (1.0, 1.0) and self.zoom_probability > 0
        pixels = images
        if zoom_enabled or self.mosaic or self.flip or self.flip_vertical:
            edges = sizes.flip(-1)
            tiles = self._tiles(edges, noise, flip)
            targets = move_boxes(tiles, targets, edges, self.min_visible)
            if zoom_enabled or self.mosaic:
                pixels = render_tiles(tiles, images, edges, fill=zoom_enabled and self.zoom[0] < 1)
            else:
                pixels = flip_valid_region(images, sizes, flip.flip(-1))
        return self._color_jitter(pixels, noise, valid), sizes, valid[:, None], targets

    def _tiles(self, edges: Tensor, noise: Tensor, flip: Tensor) -> Tiles:
        low, high = (math.log(bound) for bound in self.zoom)
        zoomed = noise[:, _ZOOM_CHOICE] < self.zoom_probability
        zoom = torch.where(zoomed, torch.exp(low + (high - low) * noise[:, _ZOOM]), 1.0)
        tiles = one_tile(zoom, noise[:, _POSITION], flip)
        if not self.mosaic:
            return tiles
        chosen = noise[:, _MOSAIC_CHOICE] < self.mosaic
        centre = 0.3 + 0.4 * noise[:, _CENTRE]
        return four_tiles(tiles, chosen, centre, noise[:, _TILE_POSITIONS].unflatten(1, (4, 2)), edges)
