"""RandAugment (Cubuk et al. 2020): some of 14 operations for each image, all at one magnitude.

The strengths at magnitude 10 are torchvision's, signs are drawn. The geometry of all operations is one affine map,
applied before the changes of colour; in the paper each operation works on the last one's result.
"""

import math
from enum import IntEnum, auto

import torch
from torch import Tensor

from vitrine.models.training.augmentation.color import (
    autocontrast,
    color_jitter,
    equalize,
    posterize,
    sharpen,
    solarize,
)

MAX_MAGNITUDE = 10.0  # magnitude


class Operation(IntEnum):
    """What RandAugment draws from; the numbers of the first three are `color_jitter`'s columns."""

    BRIGHTNESS = 0
    CONTRAST = auto()
    COLOR = auto()
    SHARPNESS = auto()
    POSTERIZE = auto()
    SOLARIZE = auto()
    AUTOCONTRAST = auto()
    EQUALIZE = auto()
    ROTATE = auto()
    SHEAR_X = auto()
    SHEAR_Y = auto()
    TRANSLATE_X = auto()
    TRANSLATE_Y = auto()
    IDENTITY = auto()


def draw(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Operations, int64, and their signs, -1 or 1, for uniform numbers [B, 2 * count]: [B, count] each."""
    which, sign = noise.chunk(2, dim=1)
    return (which * len(Operation)).long(), torch.where(sign < 0.5, -1.0, 1.0)


def geometry(operations: Tensor, signs: Tensor, magnitude: float, size: tuple[int, int]) -> Tensor:
    """The operations' joint map from a place in their output to one in their input, in pixels from the centre.

    Shears are by up to 0.3, rotations by up to 30 degrees, translations by up to 150/331 of an edge.

    Args:
        operations, signs: [B, count].
        size: height and width in pixels.

    Returns:
        float [B, 3, 3] for columns x, y, 1.
    """
    amounts = signs * magnitude / MAX_MAGNITUDE
    joint = torch.eye(3, device=signs.device).expand(len(signs), 3, 3)
    for operation, amount in zip(operations.unbind(1), amounts.unbind(1), strict=True):
        chosen = {member: torch.where(operation == member, amount, 0.0) for member in Operation}
        angle = math.radians(30) * chosen[Operation.ROTATE]
        own = torch.eye(3, device=signs.device).repeat(len(signs), 1, 1)
        own[:, 0, 0] = own[:, 1, 1] = torch.cos(angle)
        own[:, 0, 1] = 0.3 * chosen[Operation.SHEAR_X] - torch.sin(angle)
        own[:, 1, 0] = 0.3 * chosen[Operation.SHEAR_Y] + torch.sin(angle)
        own[:, 0, 2] = 150 / 331 * size[1] * chosen[Operation.TRANSLATE_X]
        own[:, 1, 2] = 150 / 331 * size[0] * chosen[Operation.TRANSLATE_Y]
        joint = joint @ own
    return joint


def apply_color_operations(pixels: Tensor, operations: Tensor, signs: Tensor, magnitude: float) -> Tensor:
    """Apply the operations on colours, in place, to each group of images that drew the same.

    Brightness, contrast, colour and sharpness change by up to 90 %, 4 to 8 bits stay when posterizing, solarizing
    inverts from 255 down to 0 on.

    Args:
        pixels: uint8 [B, H, W, 3].
        operations, signs: [B, count], on the CPU.
    """
    strength = magnitude / MAX_MAGNITUDE
    for operation, sign in zip(operations.unbind(1), signs.unbind(1), strict=True):
        factor = 1 + 0.9 * strength * sign
        linear = (operation <= Operation.COLOR).nonzero()[:, 0]
        if len(linear):
            factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(len(linear), 1)
            factors[torch.arange(len(linear)), operation[linear]] = factor[linear]
            pixels[linear] = color_jitter(pixels[linear], factors.to(pixels.device))
        for member in range(Operation.SHARPNESS, Operation.ROTATE):
            rows = (operation == member).nonzero()[:, 0]
            if len(rows):
                pixels[rows] = _changed(pixels[rows], Operation(member), factor[rows], strength)
    return pixels


def _changed(pixels: Tensor, operation: Operation, factor: Tensor, strength: float) -> Tensor:
    match operation:
        case Operation.SHARPNESS:
            return sharpen(pixels, factor.to(pixels.device))
        case Operation.POSTERIZE:
            return posterize(pixels, 8 - round(4 * strength))
        case Operation.SOLARIZE:
            return solarize(pixels, 256 * (1 - strength))
        case Operation.AUTOCONTRAST:
            return autocontrast(pixels)
    return equalize(pixels)
