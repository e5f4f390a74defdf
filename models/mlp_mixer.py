"""MLP-Mixer (Tolstikhin et al. 2021, "MLP-Mixer: An all-MLP Architecture for Vision").

Shapes: B batch, H x W pixels, N tokens (patches), D embedding (channels), K classes.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.transformer import DropPath, Mlp
from models.vit import PatchEmbed, init_weights


@dataclass(frozen=True)
class MlpMixerConfig:
    """The shape of a Mixer (table 1 of the paper). Token mixing fixes the number of patches."""

    num_classes: int
    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 512
    depth: int = 8
    tokens_mlp_dim: int = 256
    channels_mlp_dim: int = 2048
    drop_path: float = 0.0

    @property
    def num_patches(self) -> int:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        return (self.image_size // self.patch_size) ** 2


class MixerBlock(nn.Module):
    """Token mixing (an MLP across patches), then channel mixing (an MLP across channels), eq. 1 of the paper."""

    def __init__(self, num_patches: int, config: MlpMixerConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp_tokens = Mlp(num_patches, config.tokens_mlp_dim)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp_channels = Mlp(config.embed_dim, config.channels_mlp_dim)
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
        x = self.stem(x)  # [B, N, D]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits
