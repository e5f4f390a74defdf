"""Position encodings, and the cells of padded feature maps that they encode.

Shapes: B batch, h x w grid, N = h w tokens, D embedding.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PositionEncoding = Literal["learned", "sine_1d", "sine_2d", "none"]


class LearnedPositions(nn.Module):
    """One learned vector per token (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", sec. 3.1).

    The tokens are those of a grid in row-major order, preceded by the class token if there is one.
    """

    def __init__(self, grid: tuple[int, int], embed_dim: int, *, class_token: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(1, class_token + grid[0] * grid[1], embed_dim))
        nn.init.trunc_normal_(self.embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return x + self.embedding


class SinePositions(nn.Module):
    """Fixed vectors: `sine` of a patch's row-major index (1-D), or `sincos_2d` of its row and column (2-D).

    Zero for the class token.
    """

    embedding: Tensor

    def __init__(self, grid: tuple[int, int], embed_dim: int, *, class_token: bool, dimensions: Literal[1, 2]) -> None:
        super().__init__()
        if embed_dim % (2 * dimensions) or (dimensions == 2 and embed_dim < 8):
            expected = "an even one" if dimensions == 1 else "a multiple of 4 from 8 on"
            raise ValueError(f"embed_dim: expected {expected} for sine_{dimensions}d, found {embed_dim}")
        with torch.device("cpu"):  # even when the network is built on "meta": checkpoints do not hold these values
            indices = torch.arange(grid[0] * grid[1], dtype=torch.float32)
            embedding = sine(indices, embed_dim)[None] if dimensions == 1 else sincos_2d(grid, embed_dim)
        self.register_buffer("embedding", F.pad(embedding, (0, 0, int(class_token), 0)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return x + self.embedding


def make_positions(
    encoding: PositionEncoding, grid: tuple[int, int], embed_dim: int, *, class_token: bool
) -> LearnedPositions | SinePositions | nn.Identity:
    """Return the module that adds position encodings to the tokens of a grid."""
    if encoding == "none":
        return nn.Identity()
    if encoding == "learned":
        return LearnedPositions(grid, embed_dim, class_token=class_token)
    return SinePositions(grid, embed_dim, class_token=class_token, dimensions=1 if encoding == "sine_1d" else 2)


def interpolate_positions(embedding: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize learned positions to another resolution, as an image (sec. 3.2 of the ViT paper).

    Args:
        embedding: [1, P + h w, D]; the P vectors before the grid (the class token's) are left unchanged.
        old_grid: (h, w) of `embedding`.
        new_grid: (h', w').

    Returns:
        [1, P + h' w', D].
    """
    if old_grid == new_grid:
        return embedding
    prefix = embedding.shape[1] - old_grid[0] * old_grid[1]
    image = embedding[:, prefix:].unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, D, h, w]
    resized = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat((embedding[:, :prefix], resized.flatten(2).transpose(1, 2)), dim=1)


def sine(coordinates: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine encoding of coordinates (Vaswani et al. 2017, sec. 3.5): sines and cosines at geometric wavelengths.

    Args:
        coordinates: [...], in radians of the shortest wavelength (DETR normalises an image to 0..2 pi).
        dim: length of the encoding, even.

    Returns:
        [..., dim], sine and cosine interleaved.
    """
    frequencies = temperature ** (-torch.arange(0, dim, 2, device=coordinates.device) / dim)  # [dim / 2]
    angles = coordinates[..., None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def sine_2d(points: Tensor, embed_dim: int) -> Tensor:
    """Sine encoding of points: half of the channels for y, half for x (Carion et al. 2020, DETR, appendix A.4).

    Args:
        points: (x, y) [..., 2], fractions of the valid image, 0 to 1.

    Returns:
        [..., embed_dim].
    """
    x, y = (points * 2 * math.pi).unbind(-1)
    return torch.cat((sine(y, embed_dim // 2), sine(x, embed_dim // 2)), dim=-1)


def sincos_2d(grid: tuple[int, int], embed_dim: int, temperature: float = 10000.0) -> Tensor:
    """Fixed positions of a ViT's patches (Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k").

    Args:
        grid: rows and columns of patches.
        embed_dim: a multiple of four: sines of x, cosines of x, sines of y, cosines of y.

    Returns:
        [1, rows * columns, embed_dim].
    """
    y, x = torch.meshgrid(*(torch.arange(edge, dtype=torch.float64) for edge in grid), indexing="ij")
    steps = torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4 - 1)
    angles = [place.flatten()[:, None] / temperature**steps for place in (x, y)]  # [rows * columns, embed_dim / 4]
    parts = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=-1)[None].float()


def valid_cells(sizes: Tensor, grid: Sequence[int], stride: int = 1) -> Tensor:
    """Mask of the cells of a padded feature map that hold image.

    Edges are rounded up, as in each stride-2 layer.

    Args:
        sizes: int64 [B, 2], height and width of each image's valid region in pixels.
        grid: height and width (h, w) of the feature map.
        stride: pixels per cell.

    Returns:
        bool [B, h, w], True in the top-left rectangle without padding.
    """
    cells = torch.div(sizes + stride - 1, stride, rounding_mode="trunc")  # [B, 2]; one ONNX node, // would be seven
    rows = torch.arange(grid[0], device=sizes.device) < cells[:, :1]  # [B, h]
    columns = torch.arange(grid[1], device=sizes.device) < cells[:, 1:]  # [B, w]
    return rows[:, :, None] & columns[:, None, :]


def level_cells(sizes: Tensor | None, grid: Sequence[int], stride: int) -> Tensor | None:
    """`valid_cells` of a backbone's feature map with a channel axis, bool [B, 1, h, w]; None without sizes."""
    return None if sizes is None else valid_cells(sizes, grid, stride)[:, None]


def pad_edges(images: Tensor, multiple: int) -> Tensor:
    """Pad images [B, C, H, W] with zeros at the bottom and right to edges that are multiples."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def nearest_valid_cells(sizes: Tensor, image: Sequence[int], grid: Sequence[int]) -> Tensor:
    """`valid_cells` by nearest-neighbour sampling of the padded image's mask, as in published DETR.

    Differs from `valid_cells` if the padded image's edges are not multiples of the stride.

    Args:
        sizes: int64 [B, 2], height and width of each image's valid region in pixels.
        image: height and width of the padded image.
        grid: height and width (h, w) of the feature map.

    Returns:
        bool [B, h, w].
    """
    mask = valid_cells(sizes, image).to(torch.float32)
    return F.interpolate(mask[:, None], size=tuple(grid))[:, 0] > 0


def grid_points(valid: Tensor, offset: float) -> Tensor:
    """Coordinates of the cells of a padded feature map.

    Args:
        valid: bool [B, h, w], True in the top-left rectangle without padding.
        offset: point within a cell: 0.5 for its centre, 1 for its lower right corner (published DETR).

    Returns:
        (x, y) of each cell, float [B, h, w, 2], as fractions of the valid rectangle.
    """
    y = torch.cumsum(valid, dim=1, dtype=torch.int32).float()
    x = torch.cumsum(valid, dim=2, dtype=torch.int32).float()
    height, width = y[:, -1:, :1], x[:, :1, -1:]
    shift = 1 - offset
    return torch.stack(((x - shift) / width.clamp(min=1), (y - shift) / height.clamp(min=1)), dim=-1)
