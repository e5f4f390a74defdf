"""RandAugment (Cubuk et al. 2020): random operations out of 14 for each image, all at one magnitude.

Strengths at magnitude 10 are torchvision's; signs are random. All geometric operations are composed into one affine
map, applied before the color operations; in the paper each operation is applied to the result of the previous one.
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

MAX_MAGNITUDE = 10.0


class Operation(IntEnum):
    """The operations of RandAugment; the values of the first three are the columns of `color_jitter`."""

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


def sample_operations(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Map uniform numbers [B, 2 * count] to operations, int64, and their signs, -1 or 1: [B, count] each."""
    choice, sign = noise.chunk(2, dim=1)
    return (choice * len(Operation)).long(), torch.where(sign < 0.5, -1.0, 1.0)


def affine_matrix(operations: Tensor, signs: Tensor, magnitude: float, size: tuple[int, int]) -> Tensor:
    """Compose the geometric operations into one map from output to input positions, in pixels from the centre.

    Shears are up to 0.3, rotations up to 30 degrees, translations up to 150/331 of an edge.

    Args:
        operations, signs: [B, count].
        size: height and width in pixels.

    Returns:
        float [B, 3, 3] for columns x, y, 1.
    """
    amounts = signs * magnitude / MAX_MAGNITUDE
    matrix = torch.eye(3, device=signs.device).expand(len(signs), 3, 3)
    for operation, amount in zip(operations.unbind(1), amounts.unbind(1), strict=True):
        chosen = {member: torch.where(operation == member, amount, 0.0) for member in Operation}
        angle = math.radians(30) * chosen[Operation.ROTATE]
        step = torch.eye(3, device=signs.device).repeat(len(signs), 1, 1)
        step[:, 0, 0] = step[:, 1, 1] = torch.cos(angle)
        step[:, 0, 1] = 0.3 * chosen[Operation.SHEAR_X] - torch.sin(angle)
        step[:, 1, 0] = 0.3 * chosen[Operation.SHEAR_Y] + torch.sin(angle)
        step[:, 0, 2] = 150 / 331 * size[1] * chosen[Operation.TRANSLATE_X]
        step[:, 1, 2] = 150 / 331 * size[0] * chosen[Operation.TRANSLATE_Y]
        matrix = matrix @ step
    return matrix


def apply_color_operations(pixels: Tensor, operations: Tensor, signs: Tensor, magnitude: float) -> Tensor:
    """Apply the color operations in place, to all images with the same operation at a time.

    Brightness, contrast, color and sharpness change by up to 90 %, posterize keeps 4 to 8 bits, the threshold of
    solarize goes from 256 down to 0.

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
                pixels[rows] = _apply_operation(pixels[rows], Operation(member), factor[rows], strength)
    return pixels


def _apply_operation(pixels: Tensor, operation: Operation, factor: Tensor, strength: float) -> Tensor:
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
