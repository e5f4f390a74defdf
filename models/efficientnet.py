"""EfficientNet-Lite, the pretrained ConvNet that other networks start from.

Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table 1 and eq. 3; its blocks
are the inverted residuals of Sandler et al. 2018, "MobileNetV2", fig. 4. The Lite networks of the same authors (2020)
have ReLU6 instead of Swish, no squeeze-and-excitation, and a stem, a head and outer stages that are not scaled.

Shapes: B batch, C channels, H x W pixels, h x w cells, K classes.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.position import level_cells, pad_edges
from vitrine.models.transformer import DropPath
from vitrine.models.vit import ViT, ViTConfig

_NORM_EPS, _NORM_MOMENTUM = 1e-3, 0.01  # of the authors' code, in PyTorch's terms
_CHANNELS_MULTIPLE = 8  # channels are rounded to it
_STEM_CHANNELS, _STEM_STRIDE, _HEAD_CHANNELS = 32, 2, 1280


class Stage(NamedTuple):
    """Equal blocks, of which the first has the stride."""

    expansion: int
    kernel: int
    stride: int
    channels: int
    blocks: int


# Table 1 of the paper, stages 2 to 8.
_STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


@dataclass(frozen=True)
class EfficientNetConfig:
    """Configuration of an EfficientNet-Lite: factors of the channels and of the number of blocks (eq. 3).

    `head` "linear" is the published one: a linear layer on averaged features. "vit" is a ViT whose patches are the
    cells of the feature map (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", sec. 3.1, hybrid architecture),
    of the `vit_*` settings.
    """

    num_classes: int
    image_size: int | tuple[int, int] = 224  # pixels, (height, width) if not square; a linear head accepts any size
    width_factor: float = 1.0
    depth_factor: float = 1.0
    dropout: float = 0.0  # of the averaged features
    drop_path: float = 0.0  # of the last block; it grows linearly from 0
    head: Literal["linear", "vit"] = "linear"
    vit_embed_dim: int = 192
    vit_depth: int = 2
    vit_num_heads: int = 3

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The scaled stages."""
        last = len(_STAGES) - 1
        return tuple(
            stage._replace(
                channels=_scale_channels(stage.channels, self.width_factor),
                blocks=stage.blocks if index in (0, last) else math.ceil(stage.blocks * self.depth_factor),
            )
            for index, stage in enumerate(_STAGES)
        )


# The authors' factors and resolutions.
VARIANTS: dict[str, dict[str, Any]] = {
    "efficientnet_lite0": {"image_size": 224, "width_factor": 1.0, "depth_factor": 1.0},
    "efficientnet_lite1": {"image_size": 240, "width_factor": 1.0, "depth_factor": 1.1},
    "efficientnet_lite2": {"image_size": 260, "width_factor": 1.1, "depth_factor": 1.2},
    "efficientnet_lite3": {"image_size": 280, "width_factor": 1.2, "depth_factor": 1.4},
    "efficientnet_lite4": {"image_size": 300, "width_factor": 1.4, "depth_factor": 1.8},
}


def _scale_channels(channels: int, factor: float) -> int:
    """Return the nearest multiple of eight, but at least nine tenths of the product (as in the authors' code)."""
    scaled = channels * factor
    rounded = max(_CHANNELS_MULTIPLE, int(scaled + _CHANNELS_MULTIPLE / 2) // _CHANNELS_MULTIPLE * _CHANNELS_MULTIPLE)
    return rounded if rounded >= 0.9 * scaled else rounded + _CHANNELS_MULTIPLE


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as by TensorFlow's "SAME": of an odd number of zeros, the last is behind."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            in_channels, out_channels, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, h, w] -> [B, C_out, h / stride, w / stride] (rounded up)."""
        if self.stride != (1, 1):  # 2: an even edge has a cell less in front
            height, width = x.shape[-2:]
            behind = self.kernel_size[0] // 2
            x = F.pad(x, (behind - 1 + width % 2, behind, behind - 1 + height % 2, behind))
        return super().forward(x)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, and ReLU6 unless it is a linear one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = SameConv2d(in_channels, out_channels, kernel, stride, groups)
        self.norm = nn.BatchNorm2d(out_channels, eps=_NORM_EPS, momentum=_NORM_MOMENTUM)
        self.act = nn.Identity() if linear else nn.ReLU6()


class MBConv(nn.Module):
    """An inverted residual: 1x1 to expand, depthwise k x k with the stride, 1x1 to project, without an activation."""

    def __init__(self, in_channels: int, stage: Stage, stride: int, drop_path: float) -> None:
        super().__init__()
        channels = in_channels * stage.expansion
        self.expand = ConvNorm(in_channels, channels) if stage.expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(channels, channels, stage.kernel, stride, groups=channels)
        self.project = ConvNorm(channels, stage.channels, linear=True)
        self.drop_path = DropPath(drop_path)
        self.stride = stride
        self.residual = stride == 1 and in_channels == stage.channels

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Transform features.

        Args:
            x: [B, in_channels, h, w].
            valid: bool [B, 1, h, w], the cells that hold image; None if all do.

        Returns:
            [B, channels, h / stride, w / stride] (rounded up), arbitrary where not valid.
        """
        expanded = self.expand(x)
        out: Tensor = self.project(self.depthwise(expanded if valid is None else expanded * valid))
        return x + self.drop_path(out) if self.residual else out


class EfficientNetBackbone(nn.Module):
    """The stem and the inverted residuals.

    `strides` and `channels` are those of the feature maps, from fine to coarse.
    """

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.stem = ConvNorm(3, _STEM_CHANNELS, 3, _STEM_STRIDE)
        self.blocks = nn.ModuleList()
        self.strides: list[int] = []
        self.channels: list[int] = []
        self._ends: list[int] = []  # the block behind each map
        channels, stride, depth = _STEM_CHANNELS, _STEM_STRIDE, sum(stage.blocks for stage in config.stages)
        for index, stage in enumerate(config.stages):
            for i in range(stage.blocks):
                rate = config.drop_path * len(self.blocks) / max(1, depth - 1)
                self.blocks.append(MBConv(channels, stage, stage.stride if i == 0 else 1, rate))
                channels = stage.channels
            stride *= stage.stride
            if index + 1 == len(config.stages) or config.stages[index + 1].stride == 2:  # the last at this resolution
                self.strides.append(stride)
                self.channels.append(stage.channels)
                self._ends.append(len(self.blocks))
        init_filters(self)

    def last_stages(self, count: int) -> tuple[str, ...]:
        """Return the prefixes of the names of the weights of `forward_last`."""
        return tuple(f"blocks.{i}." for i in range(self._ends[-1 - count], len(self.blocks)))

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
        """Extract feature maps.

        With `sizes`, an image's features do not depend on the padding beside it: padding is reset to zero before every
        depthwise convolution, and the edges of the batch are rounded up to multiples of the largest stride.

        Args:
            x: normalised images, float [B, 3, H, W], zero outside their valid regions.
            sizes: int64 [B, 2], height and width of each valid region; None if there is no padding.

        Returns:
            For each of `strides`, [B, channels, H / stride, W / stride] (rounded up), zero outside the valid regions.
        """
        return self.forward_early(x, sizes, stages=0)

    def forward_early(self, x: Tensor, sizes: Tensor | None, stages: int) -> list[Tensor]:
        """As `forward`, but without the `stages` coarsest maps."""
        if sizes is not None:
            x = pad_edges(x, self.strides[-1])
        return self._run(range(len(self.strides) - stages), self.stem(x), sizes)

    def forward_last(self, x: Tensor, sizes: Tensor | None, stages: int) -> list[Tensor]:
        """The last map of `forward_early` -> the `stages` coarsest maps."""
        return self._run(range(len(self.strides) - stages, len(self.strides)), x, sizes)

    def _run(self, stages: range, x: Tensor, sizes: Tensor | None) -> list[Tensor]:
        maps = []
        for stage in stages:
            first, end = self._ends[stage - 1] if stage else 0, self._ends[stage]
            valid = level_cells(sizes, x.shape[-2:], self.strides[stage - 1] if stage else _STEM_STRIDE)
            for block in self.blocks[first:end]:
                x = block(x, valid)
                valid = level_cells(sizes, x.shape[-2:], self.strides[stage])
            x = x if valid is None else x * valid
            maps.append(x)
        return maps


def init_filters(module: nn.Module) -> None:
    """Normal filters with variance 2 / fan-out of each group, as in the authors' code."""
    for part in module.modules():
        if isinstance(part, SameConv2d):  # PyTorch's own function does not divide by the groups
            fan_out = part.kernel_size[0] ** 2 * part.out_channels // part.groups
            nn.init.normal_(part.weight, std=math.sqrt(2 / fan_out))


class EfficientNet(nn.Module):
    """Image to class logits: backbone, then 1x1 convolution, global average and a linear layer, or a ViT."""

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = EfficientNetBackbone(config)
        channels = self.backbone.channels[-1]
        self.neck = ConvNorm(channels, _HEAD_CHANNELS)
        init_filters(self.neck)
        self.dropout = nn.Dropout(config.dropout)
        self.head: nn.Linear | ViT
        if config.head == "linear":
            self.head = nn.Linear(_HEAD_CHANNELS, config.num_classes)
        else:
            size = config.image_size if isinstance(config.image_size, tuple) else (config.image_size,) * 2
            height, width = (-(-edge // self.backbone.strides[-1]) for edge in size)
            self.head = ViT(
                ViTConfig(
                    config.num_classes,
                    image_size=(height, width),
                    patch_size=1,
                    in_channels=_HEAD_CHANNELS,
                    embed_dim=config.vit_embed_dim,
                    depth=config.vit_depth,
                    num_heads=config.vit_num_heads,
                    drop_path=config.drop_path,
                )
            )

    def forward(self, x: Tensor, record: list[Tensor] | None = None) -> Tensor:
        """Normalised images float [B, 3, H, W] -> logits [B, K].

        A ViT's attention weights are appended to `record`.
        """
        return self.forward_head(self.forward_features(x), record)

    def features(self, x: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W] -> feature map [B, 1280, h, w]."""
        features: Tensor = self.neck(self.backbone(x)[-1])
        return features

    def forward_features(self, x: Tensor, *, stages: int = 0) -> Tensor:
        """Normalised images float [B, 3, H, W] -> what the head needs: [B, 1280] for a linear head, else `features`.

        If the backbone's last `stages` are left to `forward_head`, the map before them.
        """
        if stages:
            return self.backbone.forward_early(x, None, stages)[-1]
        return self._pool(self.features(x))

    def forward_head(self, features: Tensor, record: list[Tensor] | None = None, *, stages: int = 0) -> Tensor:
        """`forward_features` -> logits [B, K]."""
        if stages:
            features = self._pool(self.neck(self.backbone.forward_last(features, None, stages)[-1]))
        features = self.dropout(features)
        logits: Tensor = self.head(features) if isinstance(self.head, nn.Linear) else self.head(features, record)
        return logits

    def _pool(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3)) if isinstance(self.head, nn.Linear) else features
