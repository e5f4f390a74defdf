"""Batched resampling: integer shifts and flips by indexing, everything else by one bilinear interpolation.

Positions are in input pixels, 0 at the left or top edge, so that the centre of the first pixel is at 0.5.
Shapes: B images of H x W pixels, h x w pixels of output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 128  # fill value outside an image: about 0 after normalisation
_OUTSIDE = 1e6  # a position outside every image


def chunks(pixels: Tensor) -> list[slice]:
    """Slices of a batch to process one at a time: on a CPU, small enough to stay in its cache."""
    step = 4 if pixels.device.type == "cpu" else max(1, len(pixels))
    return [slice(start, start + step) for start in range(0, len(pixels), step)]


def pixel_centres(count: int, device: torch.device) -> Tensor:
    """0.5, 1.5, ...: [count]."""
    return torch.arange(count, device=device) + 0.5


def valid_pixels(sizes: Tensor, height: int, width: int) -> Tensor:
    """Mask of the valid region of padded images, bool [B, H, W], from its height and width, int64 [B, 2]."""
    rows, columns = (torch.arange(edge, device=sizes.device) for edge in (height, width))
    return (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]


def clamp_positions(position: Tensor, edge: Tensor, *, fill: bool) -> Tensor:
    """Clamp positions to at least half a pixel inside an image `edge` pixels long, so that padding is never sampled.

    Args:
        fill: fill with grey outside the image instead of replicating its edge.
    """
    clamped = torch.minimum(position.clamp(min=0.5), edge - 0.5)
    return torch.where((position < 0) | (position > edge), _OUTSIDE, clamped) if fill else clamped


def resample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sample each output pixel with bilinear interpolation; grey where a position is outside the image.

    Interpolation reads four pixels: average images first before shrinking them to less than half their size.

    Args:
        images: uint8 [B, H, W, 3].
        x, y: positions, broadcast to [B, h, w].

    Returns:
        uint8 [B, h, w, 3].
    """
    height, width = images.shape[1:3]
    pixels = torch.empty(*torch.broadcast_shapes(x.shape, y.shape), 3, dtype=torch.uint8, device=images.device)
    x, y = x * (2 / width) - 1, y * (2 / height) - 1
    for part in chunks(images):
        inputs = images[part].permute(0, 3, 1, 2).float().sub_(GREY)
        grid = torch.stack(torch.broadcast_tensors(x[part], y[part]), dim=-1)
        sampled = F.grid_sample(inputs, grid, padding_mode="zeros", align_corners=False)
        pixels[part] = sampled.add_(GREY + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
    return pixels


def gather_pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Gather the pixels at `rows`, int64 [B, h], and `columns`, int64 [B, w]: uint8 [B, h, w, 3]."""
    indices = torch.arange(len(images), device=images.device)
    return images[indices[:, None, None], rows[:, :, None], columns[:, None]]


def shift_and_flip(images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Shift images by whole pixels with grey fill, then flip some of them left to right.

    Args:
        images: uint8 [B, H, W, 3].
        shift: int64 [B, 2], pixels down and right; less than the height and width.
        flip: bool [B].
    """
    _, height, width, _ = images.shape
    device = images.device
    rows = torch.arange(height, device=device) - shift[:, :1]
    columns = torch.arange(width, device=device) - shift[:, 1:]
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    outside = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None]
    pixels = gather_pixels(images, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    return pixels.masked_fill_(outside[..., None], GREY)


def flip_valid_region(images: Tensor, sizes: Tensor, flip: Tensor) -> Tensor:
    """Flip the valid region of each image, leaving padding in place.

    Args:
        images: uint8 [B, H, W, 3].
        sizes: int64 [B, 2], height and width of each valid region.
        flip: bool [B, 2], vertically and horizontally.
    """
    indices = []
    for axis, edge in enumerate(images.shape[1:3]):
        forward = torch.arange(edge, device=images.device).expand(len(images), -1)
        reverse = sizes[:, axis, None] - 1 - forward
        indices.append(torch.where(flip[:, axis, None] & (reverse >= 0), reverse, forward))
    return gather_pixels(images, *indices)
