"""Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words").

Shapes: B batch, C channels, H x W pixels, N tokens, D embedding, K classes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrine.models.position import PositionEncoding, make_positions
from vitrine.models.transformer import Block, Gelu


@dataclass(frozen=True)
class ViTConfig:
    """Configuration of a ViT.

    `stem` "patch" is the paper's linear patch embedding, "conv" a stack of stride-2 3x3 convolutions (Xiao et al. 2021,
    "Early Convolutions Help Transformers See Better"). `global_pool` "token" classifies the class token's state, "avg"
    the mean over the patches, without a class token. `representation_size` is the width of a tanh layer before the head
    (the paper's pre-training head).
    """

    num_classes: int
    image_size: int | tuple[int, int] = 224  # pixels, (height, width) if not square
    patch_size: int = 16
    in_channels: int = 3  # of the image, or of the feature map whose cells are the patches (sec. 3.1, hybrid)
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    stem: Literal["patch", "conv"] = "patch"
    pos_embed: PositionEncoding = "learned"
    global_pool: Literal["token", "avg"] = "token"
    representation_size: int | None = None
    norm: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    gelu: Gelu = "exact"
    drop_path: float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.image_size, self.patch_size)


# Table 1 of the paper with patches of 14, 16 or 32 pixels, and the smaller sizes of Touvron et al. 2021 (DeiT) and
# Steiner et al. 2022. The last two are for images of 32 x 32 pixels.
VARIANTS: dict[str, dict[str, Any]] = {
    f"vit_{size}_patch{patch}": {"patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
    for size, dim, depth, heads, patches in (
        ("tiny", 192, 12, 3, (16,)),
        ("small", 384, 12, 6, (8, 16, 32)),
        ("base", 768, 12, 12, (8, 16, 32)),
        ("large", 1024, 24, 16, (14, 16, 32)),
        ("huge", 1280, 32, 16, (14,)),
    )
    for patch in patches
} | {
    "vit_micro_patch4_32": {"image_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "vit_tiny_patch4_32": {"image_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3},
}


def patch_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of square patches; the image must divide into whole patches."""
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if height % patch_size or width % patch_size:
        raise ValueError(f"image_size {image_size} is not divisible by patch_size {patch_size}")
    return height // patch_size, width // patch_size


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each linearly: a convolution whose stride is its kernel size (eq. 1)."""

    def __init__(self, patch_size: int, embed_dim: int, in_channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, N, D]."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions, doubling the channels, down to one cell per patch."""

    def __init__(self, patch_size: int, embed_dim: int, in_channels: int = 3) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if patch_size != 2**steps or steps == 0:
            raise ValueError(f"a conv stem needs a patch_size that is a power of two above 1, found {patch_size}")
        layers: list[nn.Module] = []
        channels = in_channels
        if embed_dim % 2 ** (steps - 1):
            raise ValueError(
                f"embed_dim {embed_dim} is not divisible by {2 ** (steps - 1)} (conv stem of {steps} steps)"
            )
        for step in range(steps):
            out_channels = embed_dim // 2 ** (steps - 1 - step)
            layers += [nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
            channels = out_channels
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, N, D]."""
        tokens: Tensor = self.proj(self.conv(x)).flatten(2).transpose(1, 2)
        return tokens


class ViT(nn.Module):
    """Image to class logits: patch embedding, class token, positions, encoder blocks, norm, linear head."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        stem = {"patch": PatchEmbed, "conv": ConvStem}[config.stem]
        self.patch_embed = stem(config.patch_size, dim, config.in_channels)
        has_token = config.global_pool == "token"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if has_token else None
        self.pos_embed = make_positions(config.pos_embed, config.grid, dim, class_token=has_token)
        mlp_dim = int(dim * config.mlp_ratio)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, mlp_dim, rate, config.norm, config.norm_eps, config.gelu) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.norm == "pre" else nn.Identity()
        size = config.representation_size
        self.pre_logits = nn.Identity() if size is None else nn.Sequential(nn.Linear(dim, size), nn.Tanh())
        self.head = nn.Linear(size or dim, config.num_classes)
        self.apply(init_weights)

    def forward(self, x: Tensor, record: list[Tensor] | None = None) -> Tensor:
        """Normalised images float [B, in_channels, H, W] -> logits [B, K].

        Each block's attention weights are appended to `record`.
        """
        return self.forward_head(self.forward_features(x, record))

    def forward_features(
        self, x: Tensor, record: list[Tensor] | None = None, states: list[Tensor] | None = None
    ) -> Tensor:
        """Normalised images float [B, in_channels, H, W] -> the state that is classified [B, D or representation].

        Each block's output is appended to `states`, as it would be classified if it were the last.
        """
        x = self.patch_embed(x)  # [B, N, D]
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # [B, 1 + N, D]
        x = self.pos_embed(x)
        for block in self.blocks:
            x = block(x, record)
            if states is not None:
                states.append(self._pool(x))
        return self._pool(x)

    def _pool(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] -> the state that is classified."""
        x = self.norm(x)
        x = x[:, 0] if self.cls_token is not None else x.mean(dim=1)  # [B, D]
        state: Tensor = self.pre_logits(x)
        return state

    def forward_head(self, features: Tensor) -> Tensor:
        """`forward_features` -> logits [B, K]."""
        logits: Tensor = self.head(features)
        return logits


def init_weights(module: nn.Module) -> None:
    """Truncated normal with standard deviation 0.02 for linear layers, zero biases (as timm and DeiT)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
