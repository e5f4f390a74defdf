"""Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words").

Shapes: B batch, C channels, H x W pixels, N tokens, D embedding, K classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.position import LearnedPositions
from models.transformer import Block


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a ViT. `stem` "patch" is the paper's linear patch embedding, "conv" a stack of stride-2 3x3
    convolutions (Xiao et al. 2021, "Early Convolutions Help Transformers See Better")."""

    num_classes: int
    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    stem: Literal["patch", "conv"] = "patch"
    global_pool: Literal["token", "avg"] = "token"
    drop_path: float = 0.0

    @property
    def num_patches(self) -> int:
        """Tokens of the grid, without the class token."""
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        return (self.image_size // self.patch_size) ** 2


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each linearly: a convolution whose stride is its kernel size (eq. 1)."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions, doubling the channels, down to one cell per patch."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if patch_size != 2**steps or steps == 0:
            raise ValueError(f"a conv stem needs a patch_size that is a power of two above 1, found {patch_size}")
        layers: list[nn.Module] = []
        channels = 3
        for step in range(steps):
            out_channels = embed_dim // 2 ** (steps - 1 - step)
            layers += [nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
            channels = out_channels
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        tokens: Tensor = self.proj(self.conv(x)).flatten(2).transpose(1, 2)
        return tokens


class ViT(nn.Module):
    """Image to class logits. Parts: patchify stem, class token, positions, encoder blocks, norm, linear head."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        stem = {"patch": PatchEmbed, "conv": ConvStem}[config.stem]
        self.patch_embed = stem(config.patch_size, dim)
        has_token = config.global_pool == "token"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if has_token else None
        self.pos_embed = LearnedPositions(config.num_patches + has_token, dim)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, config.mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, config.num_classes)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W] -> logits [B, K]."""
        x = self.patch_embed(x)  # [B, N, D]
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # [B, 1 + N, D]
        x = self.pos_embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        x = x[:, 0] if self.cls_token is not None else x.mean(dim=1)  # [B, D]
        logits: Tensor = self.head(x)
        return logits


def init_weights(module: nn.Module) -> None:
    """Truncated normal with standard deviation 0.02 for linear layers, zero biases (ViT and Mixer code release)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
