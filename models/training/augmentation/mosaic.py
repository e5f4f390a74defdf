"""Zoom and mosaic for detection: each output is a grid of tiles, each tile a window of a source image.

Positions and lengths are fractions of an image's valid region, x before y. Shapes: B images, n x n tiles (1 or 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrine.models.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from vitrine.models.training.augmentation.resampling import clamp_positions, pixel_centres, resample
from vitrine.models.training.targets import Target, pad_targets

GROUP = 4  # images in a mosaic
_MIN_SCALE = 0.5  # in a mosaic: below it, bilinear interpolation would alias


@dataclass(frozen=True)
class Tiles:
    """The tiles of each output image, by row and column."""

    sources: Tensor  # int64 [B, n, n], index of the source image
    low: Tensor  # float [B, n, n, 2], top-left corner of the tile in the output
    high: Tensor  # float [B, n, n, 2], bottom-right corner of the tile in the output
    origin: Tensor  # float [B, n, n, 2], position in the source image that is shown at `low`
    gain: Tensor  # float [B, n, n, 2], edge lengths of the whole source image in the output
    flip: Tensor  # bool [B, 2], flips the whole output horizontally, vertically


def one_tile(zoom: Tensor, place: Tensor, flip: Tensor) -> Tiles:
    """Fill each output with one tile: a window of its own image.

    Args:
        zoom: float [B]; above 1 the window is a part of the image, below 1 there is a border around the image.
        place: float [B, 2] in 0..1, position of the window, from left (top) to right (bottom).
        flip: bool [B, 2], horizontally and vertically.
    """
    zero = torch.zeros(len(zoom), 1, 1, 2, device=zoom.device)
    gain = zoom[:, None, None, None].expand_as(zero)
    origin = place[:, None, None] * (1 - 1 / gain)
    sources = torch.arange(len(zoom), device=zoom.device)[:, None, None]
    return Tiles(sources, zero, zero + 1, origin, gain, flip)


def four_tiles(single: Tiles, chosen: Tensor, centre: Tensor, place: Tensor, edges: Tensor) -> Tiles:
    """Replace one tile by a mosaic of four, where `chosen`: the image and the other three of its group.

    Each image fills its tile, at half its size or more. Without a mosaic, the first tile covers the whole output.

    Args:
        single: one tile per image.
        chosen: bool [B].
        centre: float [B, 2], the point where the tiles meet.
        place: float [B, 4, 2] in 0..1, positions of the windows.
        edges: int64 [B, 2], width and height of the images.
    """
    count, device = len(chosen), chosen.device
    numbers = torch.arange(count, device=device)
    # An incomplete last group repeats the last image.
    sources = (numbers[:, None] // GROUP * GROUP + (numbers[:, None] + torch.arange(4, device=device)) % GROUP).clamp(
        max=count - 1
    )
    chosen = chosen[:, None, None]
    centre = torch.where(chosen, centre[:, None], 1.0)  # [B, 1, 2]
    second = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=device).bool()  # column and row of each tile
    low, high = torch.where(second, centre, 0.0), torch.where(second, 1.0, centre)
    ratio = edges[:, None] / edges[sources]
    scale = ((high - low) * ratio).amax(dim=-1, keepdim=True).clamp(min=_MIN_SCALE)
    gain = torch.where(chosen, scale / ratio, single.gain.flatten(1, 2))
    origin = torch.where(chosen, place * (1 - (high - low) / gain), single.origin.flatten(1, 2))
    sources, low, high, origin, gain = (part.unflatten(1, (2, 2)) for part in (sources, low, high, origin, gain))
    return Tiles(sources, low, high, origin, gain, single.flip)


def render_tiles(tiles: Tiles, images: Tensor, edges: Tensor, *, fill: bool) -> Tensor:
    """Render the pixels: uint8 [B, H, W, 3], arbitrary outside the valid regions.

    Args:
        images: uint8 [B, H, W, 3].
        edges: int64 [B, 2], width and height of each valid region.
        fill: whether windows may extend beyond their images; the area outside is grey.
    """
    count = tiles.sources.shape[1]
    places, indices = [], []
    for axis, length in enumerate((images.shape[2], images.shape[1])):
        place = pixel_centres(length, images.device) / edges[:, axis, None]
        places.append(torch.where(tiles.flip[:, axis, None], 1 - place, place))
        border = tiles.high[:, :1, 0, axis]
        indices.append(((places[axis] >= border) & (count > 1)).long())  # tile of each pixel

    def positions(axis: int) -> Tensor:
        """Source position of each pixel along an axis: [B, length of the other axis or 1, length of this axis]."""
        parts = tiles.low, tiles.origin, tiles.gain, edges[tiles.sources]
        along = indices[axis][:, None].expand(-1, count, -1)
        low, origin, gain, edge = ((part[..., 0] if axis == 0 else part[..., 1].mT).gather(2, along) for part in parts)
        position = clamp_positions(((places[axis][:, None] - low) / gain + origin) * edge, edge, fill=fill)
        if count == 1:
            return position
        if axis == 0:  # the images of a group are joined side by side
            position = position + (tiles.sources % GROUP * images.shape[2]).gather(2, along)
        return position.gather(1, indices[1 - axis][:, :, None].expand(-1, -1, position.shape[2]))

    x, y = positions(0), positions(1).mT
    if count == 1:
        return resample(images, x, y)
    batch, height, width, _ = images.shape
    missing = -batch % GROUP
    joined = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)).unflatten(0, (-1, GROUP)).transpose(1, 2).flatten(2, 3)
    x, y = (F.pad(part, (0, 0, 0, 0, 0, missing)).reshape(-1, GROUP * height, width) for part in (x, y))
    return resample(joined, x, y).view(-1, height, width, 3)[:batch]


def move_boxes(tiles: Tiles, targets: Sequence[Target], edges: Tensor, min_visible: float) -> list[Target]:
    """Map the boxes to the output, clip them to their tiles and drop those that are hardly visible.

    Args:
        targets: one per image.
        edges: int64 [B, 2], width and height of each valid region.
        min_visible: smallest visible fraction of a box's area. Boxes under a pixel in width or height are dropped, too.
    """
    class_ids, boxes, valid = pad_targets(targets)
    low, high, origin, gain = (
        part.flatten(1, 2)[:, :, None] for part in (tiles.low, tiles.high, tiles.origin, tiles.gain)
    )  # [B, n * n, 1, 2]
    sources = tiles.sources.flatten(1)
    corners = (cxcywh_to_xyxy(boxes)[sources].unflatten(-1, (2, 2)) - origin[..., None, :]) * gain[..., None, :]
    corners = corners + low[..., None, :]  # [B, n * n, objects, 2 corners, 2]
    visible = torch.minimum(torch.maximum(corners, low[..., None, :]), high[..., None, :])
    whole, shown = ((part[..., 1, :] - part[..., 0, :]) for part in (corners, visible))
    kept = valid[sources] & (shown * edges[:, None, None] >= 1).all(dim=-1)
    kept = (kept & (shown.prod(dim=-1) >= min_visible * whole.prod(dim=-1))).flatten(1)  # [B, n * n * objects]
    flip = tiles.flip[:, None, None, None]
    visible = torch.where(flip, 1 - visible.flip(-2), visible).flatten(-2).flatten(1, 2)
    counts = kept.sum(dim=1).tolist()
    chosen_ids = class_ids[sources].flatten(1)[kept].split(counts)
    chosen_boxes = xyxy_to_cxcywh(visible[kept]).split(counts)
    return [Target(*pair) for pair in zip(chosen_ids, chosen_boxes, strict=True)]
