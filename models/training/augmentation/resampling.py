"""Moving the pixels of a whole batch: whole pixels by indexing, everything else by one bilinear interpolation.

Positions are in pixels of the canvas, 0 at the left or top edge, so that the first pixel's centre is at 0.5.
Shapes: B canvases of H x W pixels, h x w pixels of output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 128  # what comes in where there is no image: about 0 for the network
_OUTSIDE = 1e6  # a position in no canvas


def chunks(pixels: Tensor) -> list[slice]:
    """The parts of a batch to be worked on at a time: on a CPU, few enough to stay in its cache."""
    step = 4 if pixels.device.type == "cpu" else max(1, len(pixels))
    return [slice(start, start + step) for start in range(0, len(pixels), step)]


def pixel_centres(count: int, device: torch.device) -> Tensor:
    """0.5, 1.5, ...: [count]."""
    return torch.arange(count, device=device) + 0.5


def valid_pixels(sizes: Tensor, height: int, width: int) -> Tensor:
    """Which pixels of canvases belong to the images: bool [B, H, W] for their sizes, int64 [B, 2]."""
    rows, columns = (torch.arange(edge, device=sizes.device) for edge in (height, width))
    return (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]


def within(position: Tensor, edge: Tensor, *, fill: bool) -> Tensor:
    """Positions half a pixel inside an image `edge` pixels long, so that interpolation never takes padding in.

    Args:
        fill: make grey what lies outside the image, instead of drawing out its edge.
    """
    kept = torch.minimum(position.clamp(min=0.5), edge - 0.5)
    return torch.where((position < 0) | (position > edge), _OUTSIDE, kept) if fill else kept


def resample(canvas: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Look each output pixel up, with bilinear interpolation; grey where a position is in no canvas.

    Interpolation takes four pixels: what shrinks images to less than half of their size should average them first.

    Args:
        canvas: uint8 [B, H, W, 3].
        x, y: positions, broadcast to [B, h, w].

    Returns:
        uint8 [B, h, w, 3].
    """
    height, width = canvas.shape[1:3]
    pixels = torch.empty(*torch.broadcast_shapes(x.shape, y.shape), 3, dtype=torch.uint8, device=canvas.device)
    x, y = x * (2 / width) - 1, y * (2 / height) - 1
    for part in chunks(canvas):
        images = canvas[part].permute(0, 3, 1, 2).float().sub_(GREY)
        grid = torch.stack(torch.broadcast_tensors(x[part], y[part]), dim=-1)
        sampled = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
        pixels[part] = sampled.add_(GREY + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
    return pixels


def gather_pixels(canvas: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels of the given rows, int64 [B, h], and columns, int64 [B, w]: uint8 [B, h, w, 3]."""
    images = torch.arange(len(canvas), device=canvas.device)
    return canvas[images[:, None, None], rows[:, :, None], columns[:, None]]


def shift_and_flip(canvas: Tensor, shift: Tensor, mirror: Tensor) -> Tensor:
    """Move images by whole pixels, then mirror some of them; grey comes in.

    Args:
        canvas: uint8 [B, H, W, 3].
        shift: int64 [B, 2], how far the image goes down and right; less than its height and width.
        mirror: bool [B].
    """
    _, height, width, _ = canvas.shape
    device = canvas.device
    rows = torch.arange(height, device=device) - shift[:, :1]
    columns = torch.arange(width, device=device) - shift[:, 1:]
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    outside = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None]
    pixels = gather_pixels(canvas, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    return pixels.masked_fill_(outside[..., None], GREY)


def flip_valid_region(canvas: Tensor, sizes: Tensor, mirror: Tensor) -> Tensor:
    """Mirror the valid regions of canvases.

    Args:
        canvas: uint8 [B, H, W, 3].
        sizes: int64 [B, 2], height and width of each valid region.
        mirror: bool [B, 2], upside down and left to right.
    """
    indices = []
    for axis, edge in enumerate(canvas.shape[1:3]):
        own = torch.arange(edge, device=canvas.device).expand(len(canvas), -1)
        opposite = sizes[:, axis, None] - 1 - own
        indices.append(torch.where(mirror[:, axis, None] & (opposite >= 0), opposite, own))
    return gather_pixels(canvas, *indices)
