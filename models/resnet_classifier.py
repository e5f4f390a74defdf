"""ResNet classifier, to pretrain DETR's backbone (He et al. 2016, "Deep Residual Learning for Image Recognition").

`backbone` has the names and shapes of `models.detr.Detr.backbone`, so that its weights can be transferred.

Shapes: B batch, H x W pixels, C channels, K classes.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vitrine.models.resnet import VARIANTS as RESNETS
from vitrine.models.resnet import Norm, ResNet, ResNetConfig


@dataclass(frozen=True)
class ResNetClassifierConfig:
    """Configuration of a ResNet (`models.resnet.ResNetConfig`); `dropout` is applied to the averaged features."""

    num_classes: int
    image_size: int | tuple[int, int] = 224  # pixels, (height, width) if not square; the network accepts any size
    layers: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    block: Literal["basic", "bottleneck"] = "basic"
    norm: Norm = "batch"
    dropout: float = 0.0


VARIANTS: dict[str, dict[str, Any]] = {
    name: {"layers": shape.layers, "block": shape.block} for name, shape in RESNETS.items()
}


class ResNetClassifier(nn.Module):
    """Image to class logits: backbone, global average, linear head."""

    def __init__(self, config: ResNetClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(ResNetConfig(config.layers, config.width, config.block, config.norm))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.backbone.channels[-1], config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W] -> logits [B, K]."""
        return self.forward_head(self.forward_features(x))

    def features(self, x: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W] -> features before global average pooling [B, C, h, w]."""
        features: Tensor = self.backbone(x)[-1]
        return features

    def forward_features(self, x: Tensor, *, stages: int = 0) -> Tensor:
        """Normalised images float [B, 3, H, W] -> averaged features [B, C].

        If the backbone's last `stages` are left to `forward_head`, the map before them.
        """
        return self.backbone.forward_early(x, None, stages)[-1] if stages else self.features(x).mean(dim=(2, 3))

    def forward_head(self, features: Tensor, *, stages: int = 0) -> Tensor:
        """`forward_features` -> logits [B, K]."""
        if stages:
            features = self.backbone.forward_last(features, None, stages)[-1].mean(dim=(2, 3))
        logits: Tensor = self.head(self.dropout(features))
        return logits
