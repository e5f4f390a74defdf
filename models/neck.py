"""A light neck between DETR's backbone and decoder: attention on the coarsest feature map, details from finer ones.

Attention costs the square of the number of cells and is worth most between the cells of the most semantic map, so that
the encoder sees stride 32 only (Zhao et al. 2024, "DETRs Beat YOLOs on Real-time Object Detection", sec. 4.2). Its
output is added to the maps of stride 16 and 8; the decoder attends to one memory of stride 16.

Shapes: B batch, C channels, D embedding, h x w cells of stride 16, M = h w.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

_BLOCKS = 2
_EXPANSION = 2


class FusionBlock(nn.Module):
    """Depthwise 3x3 convolution, then an MLP per cell, with a residual (Liu et al. 2022, "A ConvNet for the 2020s")."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, _EXPANSION * embed_dim)
        self.fc2 = nn.Linear(_EXPANSION * embed_dim, embed_dim)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """[B, D, h, w] and the cells that hold image, bool [B, 1, h, w] -> [B, D, h, w]."""
        tokens = self.norm(self.conv(x * valid).permute(0, 2, 3, 1))  # [B, h, w, D]
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens))).permute(0, 3, 1, 2)
        return x + out


class FusionNeck(nn.Module):
    """Maps of strides 8, 16 and 32 to one memory of stride 16."""

    def __init__(self, channels: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        fine, middle, _ = channels
        self.fine_proj = nn.Conv2d(4 * fine, embed_dim, kernel_size=1)  # 2 x 2 cells to one
        self.middle_proj = nn.Conv2d(middle, embed_dim, kernel_size=1)
        self.blocks = nn.ModuleList(FusionBlock(embed_dim) for _ in range(_BLOCKS))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, maps: Sequence[Tensor], tokens: Tensor, valid: Tensor) -> Tensor:
        """Fuse the maps.

        Args:
            maps: of strides 8, 16 and 32, [B, C, 2 h, 2 w], [B, C, h, w], [B, C, h / 2, w / 2].
            tokens: the encoder's output for the last, [B, M / 4, D].
            valid: cells of stride 16 that hold image, bool [B, h, w].

        Returns:
            [B, M, D].
        """
        fine, middle, coarse = maps
        encoded = tokens.transpose(1, 2).unflatten(2, coarse.shape[-2:])
        x = self.middle_proj(middle) + self.fine_proj(F.pixel_unshuffle(fine, 2))
        x = x + F.interpolate(encoded, scale_factor=2.0, mode="nearest")
        for block in self.blocks:
            x = block(x, valid[:, None])
        memory: Tensor = self.norm(x.flatten(2).transpose(1, 2))
        return memory
