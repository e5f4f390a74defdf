"""Augmentation on uint8 batches that already have the network's size; random numbers come from the caller's generator.

Shapes: B batch, H x W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from models.training.matcher import Target


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    return torch.empty(count, device=generator.device).uniform_(low, high, generator=generator)


def shift_and_flip(pixels: Tensor, generator: Generator, *, padding: float = 0.125) -> Tensor:
    """Move each image by up to `padding` of its size in any direction (black comes in) and mirror half of them.

    Args:
        pixels: uint8 [B, H, W, 3].
    """
    batch, height, width, _ = pixels.shape
    pad_y, pad_x = round(height * padding), round(width * padding)
    device = pixels.device
    padded = F.pad(pixels, (0, 0, pad_x, pad_x, pad_y, pad_y))
    top = torch.randint(2 * pad_y + 1, (batch, 1), generator=generator, device=device)
    left = torch.randint(2 * pad_x + 1, (batch, 1), generator=generator, device=device)
    rows = top + torch.arange(height, device=device)  # [B, H]
    columns = left + torch.arange(width, device=device)  # [B, W]
    flip = torch.randint(2, (batch, 1), generator=generator, device=device).bool()
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(batch, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def window_and_flip(
    pixels: Tensor,
    sizes: Tensor,
    targets: list[Target],
    generator: Generator,
    *,
    min_scale: float = 0.6,
    jitter: float = 0.2,
) -> tuple[Tensor, Tensor, list[Target]]:
    """Zoom into a random window of each image, mirror it in x and y at random, change brightness and contrast.

    A box stays if its centre is inside the window, and is cut at the window's edge. Sizes stay as they are.

    Args:
        pixels: uint8 [B, H, W, 3], padded below and to the right.
        sizes: int64 [B, 2], height and width of each valid region.
        targets: one per image, in fractions of the valid region.
        min_scale: shortest edge of a window, as a fraction of the image's.
        jitter: largest relative change of brightness and of contrast.

    Returns:
        The new pixels, which of them are valid (bool [B, 1, H, W]), and the new targets.
    """
    batch, height, width, _ = pixels.shape
    device = pixels.device
    scale = torch.exp(_uniform(batch, math.log(min_scale), 0.0, generator))
    left = _uniform(batch, 0, 1, generator) * (1 - scale)
    top = _uniform(batch, 0, 1, generator) * (1 - scale)
    mirror_x, mirror_y = (_uniform(batch, 0, 1, generator) < 0.5 for _ in range(2))

    # Each output pixel's place in the valid region (0..1), where it comes from, and that in grid_sample's -1..1.
    own_height, own_width = sizes[:, :1], sizes[:, 1:]
    x = (torch.arange(width, device=device) + 0.5) / own_width  # [B, W]
    y = (torch.arange(height, device=device) + 0.5) / own_height  # [B, H]
    valid = (y < 1)[:, None, :, None] & (x < 1)[:, None, None, :]
    x = torch.where(mirror_x[:, None], 1 - x, x) * scale[:, None] + left[:, None]
    y = torch.where(mirror_y[:, None], 1 - y, y) * scale[:, None] + top[:, None]
    # Half a pixel inside the valid region, so that interpolation never takes padding in.
    x = torch.minimum((x * own_width).clamp(min=0.5), own_width - 0.5) / width * 2 - 1
    y = torch.minimum((y * own_height).clamp(min=0.5), own_height - 0.5) / height * 2 - 1
    grid = torch.stack((x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
    images = F.grid_sample(pixels.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
    contrast, brightness = (_uniform(batch, 1 - jitter, 1 + jitter, generator)[:, None, None, None] for _ in range(2))
    mean = (images * valid).sum(dim=(1, 2, 3), keepdim=True) / (3 * valid.sum(dim=(1, 2, 3), keepdim=True))
    images = ((images - mean) * contrast + mean * brightness).round().clamp(0, 255)

    origin = torch.stack((left, top), dim=-1)  # [B, 2]
    mirrored = torch.stack((mirror_x, mirror_y), dim=-1)  # [B, 2]
    moved = []
    for i, target in enumerate(targets):
        low, high = ((cxcywh_to_xyxy(target.boxes_cxcywh).unflatten(-1, (2, 2)) - origin[i]) / scale[i]).unbind(1)
        low, high = torch.where(mirrored[i], 1 - high, low), torch.where(mirrored[i], 1 - low, high)
        centre = (low + high) / 2
        inside = ((centre > 0) & (centre < 1)).all(dim=-1)
        boxes = xyxy_to_cxcywh(torch.cat((low, high), dim=-1).clamp(0, 1))
        moved.append(Target(target.class_ids[inside], boxes[inside]))
    return images.to(torch.uint8).permute(0, 2, 3, 1), valid, moved
