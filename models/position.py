"""Position encoding: what tells a permutation-equivariant transformer where a token lies.

Shapes: B batch, h x w grid, N = h w tokens, D embedding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """One learned vector per token (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", sec. 3.1)."""

    def __init__(self, num_tokens: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
        nn.init.trunc_normal_(self.embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return x + self.embedding


def sine(coordinates: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine encoding of coordinates (Vaswani et al. 2017, sec. 3.5): sines and cosines at geometric wavelengths.

    Args:
        coordinates: [...], in radians of the longest-but-one wavelength (DETR normalises an image to 0..2 pi).
        dim: even length of the encoding.

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


def valid_cells(sizes: Tensor, grid: Sequence[int], stride: int = 1) -> Tensor:
    """Which cells of a padded feature map hold image.

    Each stride-2 layer rounds an edge up, and so does the whole stride.

    Args:
        sizes: int64 [B, 2], height and width of each image's valid region in pixels.
        grid: height and width (h, w) of the feature map.
        stride: pixels per cell.

    Returns:
        bool [B, h, w], True in the top-left rectangle that is no padding.
    """
    cells = (sizes + stride - 1) // stride  # [B, 2]
    rows = torch.arange(grid[0], device=sizes.device) < cells[:, :1]  # [B, h]
    columns = torch.arange(grid[1], device=sizes.device) < cells[:, 1:]  # [B, w]
    return rows[:, :, None] & columns[:, None, :]


def grid_centres(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cells of a padded feature map lie in their image.

    Args:
        valid: bool [B, h, w], True in the top-left rectangle that is no padding.

    Returns:
        y and x of each cell's centre, float [B, h, w], as fractions of the valid rectangle.
    """
    y = torch.cumsum(valid, dim=1, dtype=torch.float32) - 0.5
    x = torch.cumsum(valid, dim=2, dtype=torch.float32) - 0.5
    height = y[:, -1:, :1] + 0.5
    width = x[:, :1, -1:] + 0.5
    return y / height.clamp(min=1), x / width.clamp(min=1)
