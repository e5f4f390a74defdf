"""MLP-Mixer (Tolstikhin et al. 2021, "MLP-Mixer: An all-MLP Architecture for Vision").

Shapes: B batch, H x W pixels, N tokens (patches), D embedding (channels), K classes.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitrine.models.transformer import DropPath, Gelu, Mlp
from vitrine.models.vit import PatchEmbed, init_weights, patch_grid


@dataclass(frozen=True)
class MlpMixerConfig:
    """Configuration of a Mixer (table 1 of the paper). Token mixing fixes the number of patches."""

    num_classes: int
    image_size: int | tuple[int, int] = 224  # pixels, (height, width) if not square
    patch_size: int = 16
    embed_dim: int = 512
    depth: int = 8
    tokens_mlp_dim: int = 256
    channels_mlp_dim: int = 2048
    gelu: Gelu = "exact"
    drop_path: float = 0.0

    @property
    def num_patches(self) -> int:
        """Number of tokens."""
        rows, columns = patch_grid(self.image_size, self.patch_size)
        return rows * columns


# Table 1 of the paper. The last one is for images of 32 x 32 pixels.
VARIANTS: dict[str, dict[str, Any]] = {
    f"mixer_{size}{patch}": {
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth,
        "tokens_mlp_dim": tokens,
        "channels_mlp_dim": channels,
    }
    for size, dim, depth, tokens, channels, patches in (
        ("s", 512, 8, 256, 2048, (16, 32)),
        ("b", 768, 12, 384, 3072, (16, 32)),
        ("l", 1024, 24, 512, 4096, (16, 32)),
        ("h", 1280, 32, 640, 5120, (14,)),
    )
    for patch in patches
} | {
    "mixer_micro4_32": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 8,
        "tokens_mlp_dim": 64,
        "channels_mlp_dim": 512,
    }
}


class MixerBlock(nn.Module):
    """Token mixing (an MLP across patches), then channel mixing (an MLP across channels), eq. 1 of the paper."""

    def __init__(self, num_patches: int, config: MlpMixerConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp_tokens = Mlp(num_patches, config.tokens_mlp_dim, config.gelu)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp_channels = Mlp(config.embed_dim, config.channels_mlp_dim, config.gelu)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        x = x + self.drop_path(self.mlp_channels(self.norm2(x)))
        return x


class MlpMixer(nn.Module):
    """Image to class logits: patch embedding, mixer blocks, norm, global average, linear head."""

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = PatchEmbed(config.patch_size, config.embed_dim)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(MixerBlock(config.num_patches, config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.head = nn.Linear(config.embed_dim, config.num_classes)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W] -> logits [B, K]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W] -> averaged tokens [B, D]."""
        x = self.stem(x)  # [B, N, D]
        for block in self.blocks:
            x = block(x)
        tokens: Tensor = self.norm(x)
        return tokens.mean(dim=1)

    def forward_head(self, features: Tensor) -> Tensor:
        """`forward_features` -> logits [B, K]."""
        logits: Tensor = self.head(features)
        return logits
