"""Detection's geometry: output images made of tiles, each showing a window of an image; their pixels and their boxes.

Places and edges are fractions of an image's valid region, x before y. Shapes: B images, n x n tiles (1 or 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrine.models.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from vitrine.models.training.augmentation.resampling import pixel_centres, resample, within
from vitrine.models.training.targets import Target, pad_targets

GROUP = 4  # images of a mosaic
_SMALLEST = 0.5  # scale in a mosaic: interpolation would alias below


@dataclass(frozen=True)
class Tiles:
    """What the tile in each row and column of an output image shows."""

    sources: Tensor  # int64 [B, n, n], index of the image
    low: Tensor  # float [B, n, n, 2], the tile's first corner
    high: Tensor  # float [B, n, n, 2], the tile's other corner
    origin: Tensor  # float [B, n, n, 2], the place of the image that is at `low`
    gain: Tensor  # float [B, n, n, 2], how long the image's whole edges would be in the output
    mirror: Tensor  # bool [B, 2], of the whole output


def window(zoom: Tensor, place: Tensor, mirror: Tensor) -> Tiles:
    """One tile: a window of the image itself.

    Args:
        zoom: float [B], above 1 a part of the image is enlarged, below 1 there is room around it.
        place: float [B, 2] in 0..1, of the window: from left (top) to right (bottom).
    """
    zero = torch.zeros(len(zoom), 1, 1, 2, device=zoom.device)
    gain = zoom[:, None, None, None].expand_as(zero)
    origin = place[:, None, None] * (1 - 1 / gain)
    sources = torch.arange(len(zoom), device=zoom.device)[:, None, None]
    return Tiles(sources, zero, zero + 1, origin, gain, mirror)


def mosaic(alone: Tiles, chosen: Tensor, centre: Tensor, place: Tensor, edges: Tensor) -> Tiles:
    """Four tiles for the chosen images: the image itself and the others of its group of four, meeting in one point.

    Each image fills its tile, at half its size or more. The others stay alone, in the first of their tiles.

    Args:
        alone: one tile per image.
        chosen: bool [B].
        centre: float [B, 2], where the tiles meet.
        place: float [B, 4, 2] in 0..1, of the windows.
        edges: int64 [B, 2], width and height of the images.
    """
    count, device = len(chosen), chosen.device
    numbers = torch.arange(count, device=device)
    # A last group that is not full repeats the last image.
    sources = (numbers[:, None] // GROUP * GROUP + (numbers[:, None] + torch.arange(4, device=device)) % GROUP).clamp(
        max=count - 1
    )
    chosen = chosen[:, None, None]
    centre = torch.where(chosen, centre[:, None], 1.0)  # [B, 1, 2]
    corner = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=device).bool()  # of each tile: is it the second?
    low, high = torch.where(corner, centre, 0.0), torch.where(corner, 1.0, centre)
    ratio = edges[:, None] / edges[sources]
    scale = ((high - low) * ratio).amax(dim=-1, keepdim=True).clamp(min=_SMALLEST)
    gain = torch.where(chosen, scale / ratio, alone.gain.flatten(1, 2))
    origin = torch.where(chosen, place * (1 - (high - low) / gain), alone.origin.flatten(1, 2))
    sources, low, high, origin, gain = (part.unflatten(1, (2, 2)) for part in (sources, low, high, origin, gain))
    return Tiles(sources, low, high, origin, gain, alone.mirror)


def show(tiles: Tiles, canvas: Tensor, edges: Tensor, *, fill: bool) -> Tensor:
    """The pixels: uint8 [B, H, W, 3], arbitrary outside the valid regions.

    Args:
        canvas: uint8 [B, H, W, 3].
        edges: int64 [B, 2], width and height of each valid region.
        fill: whether windows may reach beyond their images, where it is grey.
    """
    count = tiles.sources.shape[1]
    places, indices = [], []
    for axis, length in enumerate((canvas.shape[2], canvas.shape[1])):
        place = pixel_centres(length, canvas.device) / edges[:, axis, None]
        places.append(torch.where(tiles.mirror[:, axis, None], 1 - place, place))
        border = tiles.high[:, :1, 0, axis]
        indices.append(((places[axis] >= border) & (count > 1)).long())  # of each pixel's tile

    def positions(axis: int) -> Tensor:
        """Where in the canvases pixels come from: [B, length of the other axis or 1, length of this axis]."""
        parts = tiles.low, tiles.origin, tiles.gain, edges[tiles.sources]
        along = indices[axis][:, None].expand(-1, count, -1)
        low, origin, gain, edge = ((part[..., 0] if axis == 0 else part[..., 1].mT).gather(2, along) for part in parts)
        position = within(((places[axis][:, None] - low) / gain + origin) * edge, edge, fill=fill)
        if count == 1:
            return position
        if axis == 0:  # canvases of a group lie side by side
            position = position + (tiles.sources % GROUP * canvas.shape[2]).gather(2, along)
        return position.gather(1, indices[1 - axis][:, :, None].expand(-1, -1, position.shape[2]))

    x, y = positions(0), positions(1).mT
    if count == 1:
        return resample(canvas, x, y)
    batch, height, width, _ = canvas.shape
    missing = -batch % GROUP
    joined = F.pad(canvas, (0, 0, 0, 0, 0, 0, 0, missing)).unflatten(0, (-1, GROUP)).transpose(1, 2).flatten(2, 3)
    x, y = (F.pad(part, (0, 0, 0, 0, 0, missing)).reshape(-1, GROUP * height, width) for part in (x, y))
    return resample(joined, x, y).view(-1, height, width, 3)[:batch]


def move(tiles: Tiles, targets: Sequence[Target], edges: Tensor, min_visible: float) -> list[Target]:
    """The boxes: those of which enough is visible, cut at the edges of their tiles.

    Args:
        targets: one per image.
        edges: int64 [B, 2], width and height of each valid region.
        min_visible: part of a box's area. What is less than a pixel wide or high goes, too.
    """
    class_ids, boxes, real = pad_targets(targets)
    low, high, origin, gain = (
        part.flatten(1, 2)[:, :, None] for part in (tiles.low, tiles.high, tiles.origin, tiles.gain)
    )  # [B, n * n, 1, 2]
    sources = tiles.sources.flatten(1)
    corners = (cxcywh_to_xyxy(boxes)[sources].unflatten(-1, (2, 2)) - origin[..., None, :]) * gain[..., None, :]
    corners = corners + low[..., None, :]  # [B, n * n, objects, 2 corners, 2]
    visible = torch.minimum(torch.maximum(corners, low[..., None, :]), high[..., None, :])
    whole, seen = ((part[..., 1, :] - part[..., 0, :]) for part in (corners, visible))
    kept = real[sources] & (seen * edges[:, None, None] >= 1).all(dim=-1)
    kept = (kept & (seen.prod(dim=-1) >= min_visible * whole.prod(dim=-1))).flatten(1)  # [B, n * n * objects]
    mirror = tiles.mirror[:, None, None, None]
    visible = torch.where(mirror, 1 - visible.flip(-2), visible).flatten(-2).flatten(1, 2)
    counts = kept.sum(dim=1).tolist()
    chosen_ids = class_ids[sources].flatten(1)[kept].split(counts)
    chosen_boxes = xyxy_to_cxcywh(visible[kept]).split(counts)
    return [Target(*pair) for pair in zip(chosen_ids, chosen_boxes, strict=True)]
