"""What training does to images and labels, as settings of a recipe.

All moves of one image (crop, mirror, RandAugment's geometry) are one map and one interpolation; its random numbers are
its own row of `noise`, so that it is augmented alike in whichever batch it comes. Colours change afterwards.
Shapes: B images, H x W pixels of a canvas, h x w of the network's input, K classes.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from vitrine.models.training.augmentation import mosaic as tiles
from vitrine.models.training.augmentation import randaugment
from vitrine.models.training.augmentation.color import color_jitter
from vitrine.models.training.augmentation.mixup import mixup_cutmix, random_erasing
from vitrine.models.training.augmentation.resampling import (
    flip_valid_region,
    pixel_centres,
    resample,
    shift_and_flip,
    valid_pixels,
    within,
)
from vitrine.models.training.targets import Target

NOISE = 32  # columns of `noise`; the last one is not used here

_PLACE, _FLIPS, _COLOURS = slice(0, 2), slice(2, 4), slice(4, 8)
_AREA, _RATIO, _MIX, _ERASE, _OPERATIONS = 8, 9, slice(10, 14), slice(14, 20), 20  # of classification
_ZOOMED, _ZOOM, _MOSAIC, _CENTRE, _PLACES = 8, 9, 10, slice(11, 13), slice(13, 21)  # of detection


def _in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"expected the lower bound first, found {bounds[0]:g} and {bounds[1]:g}")
    return bounds


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Alpha = Annotated[float, Field(ge=0, le=100)]


class _Augmentation(BaseModel):
    """What both tasks do. Changes of colour are by factors drawn from 1 - setting to 1 + setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip: Fraction = 0.5  # part of the images that are mirrored left to right
    brightness: Fraction = 0.0  # largest relative change
    contrast: Fraction = 0.0  # largest relative change, about the image's mean grey
    saturation: Fraction = 0.0  # largest relative change
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # largest turn, as a part of the circle of hues

    def _color_jitter(self, pixels: Tensor, noise: Tensor, valid: Tensor | None = None) -> Tensor:
        amounts = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue], device=pixels.device)
        if not any((self.brightness, self.contrast, self.saturation, self.hue)):
            return pixels
        as_is = torch.tensor([1.0, 1.0, 1.0, 0.0], device=pixels.device)
        return color_jitter(pixels, as_is + amounts * (2 * noise[:, _COLOURS] - 1), valid)


class ClassificationAugmentation(_Augmentation):
    """Augmentation of labelled images: crop and mirror, RandAugment, colours, erasing, mixing, in this order."""

    # "resized": a random part of the canvas, resized to the network's input (Szegedy et al. 2015);
    # "shift": the whole image, moved by a few pixels, grey coming in; "none": the image as evaluation sees it.
    crop: Literal["resized", "shift", "none"] = "resized"
    # Part of the image's area that "resized" takes; less if it would not fit.
    scale: Annotated[tuple[Positive, Fraction], AfterValidator(_in_order)] = (0.08, 1.0)
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(_in_order)] = (3 / 4, 4 / 3)  # its width over height
    padding: Annotated[float, Field(ge=0, le=0.5)] = 0.125  # furthest move of "shift", as a part of the image's edge
    randaugment_ops: Annotated[int, Field(ge=0, le=4)] = 0  # operations of RandAugment on each image
    randaugment_magnitude: Annotated[float, Field(ge=0, le=randaugment.MAX_MAGNITUDE)] = 9.0  # their strength
    erasing: Fraction = 0.0  # part of the images in which a rectangle is erased
    mixup: Alpha = 0.0  # alpha of mixup; 0: off
    cutmix: Alpha = 0.0  # alpha of CutMix; 0: off; with mixup, each image draws one of them

    @property
    def group(self) -> int:
        """How many neighbouring images of a batch are mixed with each other."""
        return 2 if self.mixup or self.cutmix else 1

    def __call__(
        self,
        canvas: Tensor,
        sizes: Tensor,
        class_ids: Tensor,
        num_classes: int,
        noise: Tensor,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            canvas: uint8 [B, H, W, 3]; of the network's own size unless crop is "resized".
            sizes: int64 [B, 2], height and width of each valid region.
            class_ids: int64 [B].
            num_classes: K.
            noise: float [B, NOISE], uniform in [0, 1), on the CPU.
            size: h and w.

        Returns:
            pixels uint8 [B, h, w, 3], and soft targets float [B, K] whose rows add up to 1.

        Raises:
            ValueError: the canvas has another size than the network's input.
        """
        if self.crop != "resized" and tuple(canvas.shape[1:3]) != tuple(size):
            found = f"{tuple(canvas.shape[1:3])} and {tuple(size)}"
            raise ValueError(f"crop={self.crop}: canvas and network input have to be equally large, found {found}")
        own = noise.to(canvas.device)
        operations, signs = randaugment.draw(noise[:, _OPERATIONS : _OPERATIONS + 2 * self.randaugment_ops])
        if self.randaugment_ops:
            turns = randaugment.geometry(operations, signs, self.randaugment_magnitude, size).to(canvas.device)
            pixels = self._resampled(canvas, sizes, own, size, turns)
            pixels = randaugment.apply_color_operations(pixels, operations, signs, self.randaugment_magnitude)
        elif self.crop == "resized":
            pixels = self._resampled(canvas, sizes, own, size)
        elif self.flip or (self.crop == "shift" and self.padding):
            pixels = shift_and_flip(canvas, self._shift(own, size), own[:, _FLIPS][:, 0] < self.flip)
        else:
            pixels = canvas
        pixels = self._color_jitter(pixels, own)
        if self.erasing:
            pixels = random_erasing(pixels, noise[:, _ERASE], self.erasing)
        targets = F.one_hot(class_ids, num_classes).float()
        return (
            mixup_cutmix(pixels, targets, noise[:, _MIX], self.mixup, self.cutmix)
            if self.group > 1
            else (pixels, targets)
        )

    def _shift(self, noise: Tensor, size: tuple[int, int]) -> Tensor:
        """How many pixels each image moves down and right: int64 [B, 2]."""
        if self.crop != "shift":
            return torch.zeros(len(noise), 2, dtype=torch.int64, device=noise.device)
        furthest = torch.tensor([round(edge * self.padding) for edge in size], device=noise.device)
        return (noise[:, _PLACE] * (2 * furthest + 1)).long() - furthest

    def _resampled(
        self, canvas: Tensor, sizes: Tensor, noise: Tensor, size: tuple[int, int], turns: Tensor | None = None
    ) -> Tensor:
        """The crop, mirrored and turned: grey where `turns` or a shift reach beyond the image."""
        height, width = size
        edges = sizes.flip(-1).float()  # [B, 2]: width, height
        output = torch.tensor([width, height], device=canvas.device)
        if self.crop == "resized":
            window = self._window(edges, noise)
            centre = window / 2 + noise[:, _PLACE] * (edges - window)
        else:
            window = output.expand_as(edges)
            centre = window / 2 - self._shift(noise, size).flip(-1)
        zoom = window / output
        zoom[:, 0] *= torch.where(noise[:, _FLIPS][:, 0] < self.flip, -1, 1)
        x = (pixel_centres(width, canvas.device) - width / 2).expand(len(canvas), 1, -1)
        y = (pixel_centres(height, canvas.device) - height / 2)[:, None].expand(len(canvas), -1, 1)
        if turns is not None:
            (a, b, c), (d, e, f) = (row[..., None, None].unbind(1) for row in turns[:, :2].unbind(1))
            x, y = a * x + b * y + c, d * x + e * y + f
        x, y = (
            within(zoom[:, axis, None, None] * place + centre[:, axis, None, None], edge, fill=turns is not None)
            for axis, (place, edge) in enumerate(zip((x, y), edges[..., None, None].unbind(1), strict=True))
        )
        return resample(canvas, x, y)

    def _window(self, edges: Tensor, noise: Tensor) -> Tensor:
        """Width and height in pixels of each crop, which keeps its ratio where it has to shrink to fit."""
        area = edges.prod(dim=1) * (self.scale[0] + (self.scale[1] - self.scale[0]) * noise[:, _AREA])
        low, high = (math.log(bound) for bound in self.ratio)
        ratio = torch.exp(low + (high - low) * noise[:, _RATIO])
        window = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), dim=1)
        return window * (edges / window).amin(dim=1, keepdim=True).clamp(max=1)


class DetectionAugmentation(_Augmentation):
    """Augmentation of images with boxes: zoom or mosaic and mirror, then colours. Images keep their size."""

    flip_vertical: Fraction = 0.0  # part of the images that are mirrored upside down
    # Enlargement, evenly drawn on a logarithmic scale: above 1 a part of the image is seen, below 1 grey around it.
    zoom: Annotated[tuple[Annotated[float, Field(ge=0.5)], Positive], AfterValidator(_in_order)] = (1.0, 1.6)
    zoom_probability: Fraction = 1.0  # part of the images that are zoomed
    mosaic: Fraction = 0.0  # part of the images that share the picture with three others (Bochkovskiy et al. 2020)
    min_visible: Fraction = 0.3  # a box stays if this part of its area, or more, is still seen
    brightness: Fraction = 0.2
    contrast: Fraction = 0.2

    @property
    def group(self) -> int:
        """How many neighbouring images of a batch are mixed with each other."""
        return tiles.GROUP if self.mosaic else 1

    def __call__(
        self, canvas: Tensor, sizes: Tensor, targets: list[Target], noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Target]]:
        """Augment a batch.

        Args:
            canvas: uint8 [B, H, W, 3].
            sizes: int64 [B, 2], height and width of each valid region.
            targets: one per image.
            noise: float [B, NOISE], uniform in [0, 1), on the CPU.

        Returns:
            pixels uint8 [B, H, W, 3], arbitrary outside the valid regions; sizes int64 [B, 2], as they were; the valid
            pixels, bool [B, 1, H, W]; and the targets.
        """
        noise = noise.to(canvas.device)
        valid = valid_pixels(sizes, *canvas.shape[1:3])
        mirror = noise[:, _FLIPS] < torch.tensor([self.flip, self.flip_vertical], device=canvas.device)
        zooms = self.zoom != (1.0, 1.0) and self.zoom_probability > 0
        pixels = canvas
        if zooms or self.mosaic or self.flip or self.flip_vertical:
            edges = sizes.flip(-1)
            layout = self._layout(edges, noise, mirror)
            targets = tiles.move(layout, targets, edges, self.min_visible)
            if zooms or self.mosaic:
                pixels = tiles.show(layout, canvas, edges, fill=zooms and self.zoom[0] < 1)
            else:
                pixels = flip_valid_region(canvas, sizes, mirror.flip(-1))
        return self._color_jitter(pixels, noise, valid), sizes, valid[:, None], targets

    def _layout(self, edges: Tensor, noise: Tensor, mirror: Tensor) -> tiles.Tiles:
        low, high = (math.log(bound) for bound in self.zoom)
        zoomed = noise[:, _ZOOMED] < self.zoom_probability
        zoom = torch.where(zoomed, torch.exp(low + (high - low) * noise[:, _ZOOM]), 1.0)
        layout = tiles.window(zoom, noise[:, _PLACE], mirror)
        if not self.mosaic:
            return layout
        chosen = noise[:, _MOSAIC] < self.mosaic
        centre = 0.3 + 0.4 * noise[:, _CENTRE]
        return tiles.mosaic(layout, chosen, centre, noise[:, _PLACES].unflatten(1, (4, 2)), edges)
