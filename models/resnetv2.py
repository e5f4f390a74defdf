"""BiT: ResNetV2 with group norm and weight standardisation, the convolutional baseline of the ViT paper.

Kolesnikov et al. 2020, "Big Transfer (BiT): General Visual Representation Learning", sec. 3.1; the pre-activation unit
is He et al. 2016, "Identity Mappings in Deep Residual Networks", fig. 1 (b).

Shapes: B batch, C channels, H x W pixels, h x w cells, K classes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.transformer import DropPath


@dataclass(frozen=True)
class ResNetV2Config:
    """Configuration of a BiT: `layers` units per stage, `width_factor` times the channels.

    `stem` "large" is the paper's 7x7 convolution and pooling with stride 4 in total; "small" a 3x3 convolution with
    stride 1, for images of about 32 x 32 pixels.
    """

    num_classes: int
    image_size: int | tuple[int, int] = 224  # pixels, (height, width) if not square; the network accepts any size
    layers: tuple[int, ...] = (3, 4, 6, 3)
    width_factor: float = 1
    stem: Literal["large", "small"] = "large"
    num_groups: int = 32  # of every group norm
    drop_path: float = 0.0


# Sec. 3.1 of the paper (depth x width). The last two are for images of 32 x 32 pixels.
VARIANTS: dict[str, dict[str, Any]] = {
    "resnetv2_50x1": {"layers": (3, 4, 6, 3), "width_factor": 1},
    "resnetv2_50x3": {"layers": (3, 4, 6, 3), "width_factor": 3},
    "resnetv2_101x1": {"layers": (3, 4, 23, 3), "width_factor": 1},
    "resnetv2_101x3": {"layers": (3, 4, 23, 3), "width_factor": 3},
    "resnetv2_152x2": {"layers": (3, 8, 36, 3), "width_factor": 2},
    "resnetv2_152x4": {"layers": (3, 8, 36, 3), "width_factor": 4},
    "resnetv2_26x1_32": {"image_size": 32, "layers": (2, 2, 2, 2), "width_factor": 1, "stem": "small"},
    "resnetv2_26x05_32": {"image_size": 32, "layers": (2, 2, 2, 2), "width_factor": 0.5, "stem": "small"},
}


class StdConv2d(nn.Conv2d):
    """A convolution whose filters are standardised: mean zero, variance one (Qiao et al. 2019, eq. 7)."""

    EPS = 1e-8

    def standardised(self) -> Tensor:
        """Return the standardised filters, [C_out, C_in, k, k]."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return (self.weight - mean) * torch.rsqrt(variance + self.EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, h, w] -> [B, C_out, h / stride, w / stride] (rounded up)."""
        return F.conv2d(x, self.standardised(), None, self.stride, self.padding)


def std_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> StdConv2d:
    """Return a standardised convolution without bias, padded by half its kernel."""
    return StdConv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class PreActBottleneck(nn.Module):
    """Norm and ReLU before each convolution: 1x1 to reduce, 3x3 with the stride, 1x1 to expand by four."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, drop_path: float) -> None:
        super().__init__()
        channels = out_channels // 4
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = std_conv(in_channels, channels, 1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = std_conv(channels, channels, 3, stride)
        self.norm3 = nn.GroupNorm(groups, channels)
        self.conv3 = std_conv(channels, out_channels, 1)
        self.relu = nn.ReLU()
        projected = stride != 1 or in_channels != out_channels
        self.downsample = std_conv(in_channels, out_channels, 1, stride) if projected else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, h, w] -> [B, out_channels, h / stride, w / stride] (rounded up)."""
        out = self.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.norm2(out)))
        out = self.conv3(self.relu(self.norm3(out)))
        return shortcut + self.drop_path(out)


class ResNetV2(nn.Module):
    """Image to class logits: stem, stages of pre-activation units, norm, global average, linear head."""

    def __init__(self, config: ResNetV2Config) -> None:
        super().__init__()
        self.config = config
        width = 64 * config.width_factor
        channels = int(width)
        self.stem = std_conv(3, channels, 7, 2) if config.stem == "large" else std_conv(3, channels, 3)
        # Padded with zeros as in the paper's code; max pooling's own padding is minus infinity.
        self.pool = nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)) if config.stem == "large" else nn.Identity()
        depth = sum(config.layers)
        self.stages = nn.ModuleList()
        unit = 0
        for index, units in enumerate(config.layers):
            out_channels = int(4 * width * 2**index)
            stage = nn.Sequential()
            for i in range(units):
                stride = 2 if i == 0 and index > 0 else 1
                rate = config.drop_path * unit / max(1, depth - 1)
                stage.append(PreActBottleneck(channels, out_channels, stride, config.num_groups, rate))
                channels, unit = out_channels, unit + 1
            self.stages.append(stage)
        self.norm = nn.GroupNorm(config.num_groups, channels)
        self.relu = nn.ReLU()
        self.head = nn.Linear(channels, config.num_classes)
        nn.init.zeros_(self.head.weight)  # as in the paper's code
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W] -> logits [B, K]."""
        return self.forward_head(self.forward_features(x))

    def features(self, x: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W] -> features before global average pooling [B, C, h, w]."""
        x = self.pool(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        x = self.relu(self.norm(x))
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W] -> averaged features [B, C]."""
        return self.features(x).mean(dim=(2, 3))

    def forward_head(self, features: Tensor) -> Tensor:
        """`forward_features` -> logits [B, K]."""
        logits: Tensor = self.head(features)
        return logits


def fold_weight_standardisation(network: nn.Module) -> None:
    """Replace every standardised convolution in place by an `nn.Conv2d` with the standardised filters, for export."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, StdConv2d):
                arguments = (child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding)
                plain = nn.utils.skip_init(nn.Conv2d, *arguments, bias=False)
                plain.weight = nn.Parameter(child.standardised().detach(), requires_grad=False)
                setattr(module, name, plain)
