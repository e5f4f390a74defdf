"""ResNet feature extractor, DETR's backbone (He et al. 2016, "Deep Residual Learning for Image Recognition").

Padding is reset to zero before every spatial convolution and pooling. Otherwise batch norm would shift it from zero,
and it would leak into the features along an image's border, so that predictions depended on the batch. In published
DETR it leaks, as in this network without sizes.

Shapes: B batch, H x W pixels, C channels, h x w cells of a level.
"""

import operator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor, nn

from vitrine.models.position import level_cells


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and affine parameters: a scale and a shift per channel."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


Norm = Literal["batch", "frozen"]
_NORMS: dict[Norm, type[nn.Module]] = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm}


def _masked(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x * valid


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with an identity (or, if the shape changes, projection) shortcut (fig. 5, left)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, dilations: tuple[int, int], norm: Norm) -> None:
        super().__init__()
        make_norm = _NORMS[norm]
        first, second = dilations
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=first, dilation=first, bias=False)
        self.bn1 = make_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=second, dilation=second, bias=False)
        self.bn2 = make_norm(channels)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(in_channels, channels, stride, make_norm)

    def forward(self, x: Tensor, valid: Tensor | None, out_valid: Tensor | None) -> Tensor:
        """Transform features.

        Args:
            x: [B, in_channels, h, w], zero where not valid.
            valid: bool [B, 1, h, w], the cells that hold image; None lets padding leak.
            out_valid: `valid` after the stride, bool [B, 1, h / stride, w / stride].

        Returns:
            [B, channels, h / stride, w / stride] (rounded up), zero where not valid.
        """
        out = _masked(self.relu(self.bn1(self.conv1(x))), out_valid)
        out = self.bn2(self.conv2(out))
        return _masked(self.relu(out + self.downsample(x)), out_valid)


class Bottleneck(nn.Module):
    """A 3x3 convolution, which has the stride, between 1x1 convolutions that reduce and expand (fig. 5, right)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, dilations: tuple[int, int], norm: Norm) -> None:
        super().__init__()
        make_norm = _NORMS[norm]
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = make_norm(channels)
        first, _ = dilations
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=first, dilation=first, bias=False)
        self.bn2 = make_norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = make_norm(out_channels)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(in_channels, out_channels, stride, make_norm)

    def forward(self, x: Tensor, valid: Tensor | None, out_valid: Tensor | None) -> Tensor:
        """As `BasicBlock.forward`, with 4 `channels` output channels."""
        out = _masked(self.relu(self.bn1(self.conv1(x))), valid)
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return _masked(self.relu(out + self.downsample(x)), out_valid)


def _shortcut(in_channels: int, out_channels: int, stride: int, make_norm: type[nn.Module]) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), make_norm(out_channels))


# On CPUs without AVX-512, oneDNN 3.12 (PyTorch 2.13) writes beyond the weights' gradient of a strided 1 x 1 convolution
# of fewer channels: training crashes.
_MIN_WIDTH = 8

_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


@dataclass(frozen=True)
class ResNetConfig:
    """Configuration of a ResNet (table 1 of the paper).

    With fewer than four stages, the grid is finer. `dilation` replaces the last stage's stride by dilated convolutions
    (DETR's DC5). `norm` "frozen" keeps pretrained statistics.
    """

    layers: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    block: Literal["basic", "bottleneck"] = "basic"
    norm: Norm = "batch"
    dilation: bool = False

    @property
    def stride(self) -> int:
        """Pixels per cell of the features."""
        return 2 ** (1 + len(self.layers) - self.dilation)


# Table 1 of the paper.
VARIANTS = {
    "resnet18": ResNetConfig((2, 2, 2, 2)),
    "resnet34": ResNetConfig((3, 4, 6, 3)),
    "resnet50": ResNetConfig((3, 4, 6, 3), block="bottleneck"),
    "resnet101": ResNetConfig((3, 4, 23, 3), block="bottleneck"),
}


class ResNet(nn.Module):
    """A ResNet without its classifier. `channels` are those of the stages' feature maps, `strides` their pixels."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if width < _MIN_WIDTH:
            raise ValueError(f"width of a ResNet: expected at least {_MIN_WIDTH}, found {width}")
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = _NORMS[config.norm](width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self._steps = [1 if index == 0 else 2 for index in range(len(config.layers))]  # strides of each stage
        if config.dilation:
            self._steps[-1] = 1
        self.strides = [4 * step for step in accumulate(self._steps, operator.mul)]
        self.channels: list[int] = []
        self.stages = nn.ModuleList()
        block = _BLOCKS[config.block]
        channels = width
        for index, depth in enumerate(config.layers):
            stage = nn.ModuleList()
            for i in range(depth):
                # Dilation starts after the convolution that lost its stride (Yu et al. 2017, "DRN").
                dilated = config.dilation and index == len(config.layers) - 1
                dilations = (2 if dilated and i > 0 else 1, 2 if dilated else 1)
                stride = self._steps[index] if i == 0 else 1
                stage.append(block(channels, width * 2**index, stride, dilations, config.norm))
                channels = block.expansion * width * 2**index
            self.stages.append(stage)
            self.channels.append(channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
        """Extract feature maps.

        Args:
            x: normalised images, float [B, 3, H, W], zero outside their valid regions.
            sizes: int64 [B, 2], height and width of each valid region; None lets padding leak.

        Returns:
            For each stage, [B, channels, H / stride, W / stride] (rounded up), zero outside the valid regions.
        """
        return self.forward_early(x, sizes, stages=0)

    def forward_early(self, x: Tensor, sizes: Tensor | None, stages: int) -> list[Tensor]:
        """As `forward`, but without the last `stages` maps."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(_masked(x, level_cells(sizes, x.shape[-2:], 2)))
        x = _masked(x, level_cells(sizes, x.shape[-2:], 4))
        return self._run(range(len(self.stages) - stages), x, sizes)

    def forward_last(self, x: Tensor, sizes: Tensor | None, stages: int) -> list[Tensor]:
        """The last map of `forward_early` -> the last `stages` maps."""
        return self._run(range(len(self.stages) - stages, len(self.stages)), x, sizes)

    def last_stages(self, count: int) -> tuple[str, ...]:
        """Return the prefixes of the names of the weights of `forward_last`."""
        return tuple(f"stages.{i}." for i in range(len(self.stages) - count, len(self.stages)))

    def _run(self, stages: range, x: Tensor, sizes: Tensor | None) -> list[Tensor]:
        maps = []
        for index in stages:
            step, stride = self._steps[index], self.strides[index]
            valid = level_cells(sizes, x.shape[-2:], stride // step)
            out_valid = level_cells(sizes, [(edge - 1) // step + 1 for edge in x.shape[-2:]], stride)
            for block in cast(nn.ModuleList, self.stages[index]):
                x = block(x, valid, out_valid)
                valid = out_valid
            maps.append(x)
        return maps


def thaw_frozen_norm(network: nn.Module) -> None:
    """Replace every frozen batch norm in place by an `nn.BatchNorm2d` that computes the same in evaluation mode.

    For export: exporters can fold the latter into the preceding convolution.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, FrozenBatchNorm):
                plain = nn.BatchNorm2d(len(child.weight), eps=child.eps)
                plain.load_state_dict(child.state_dict(), strict=False)  # it also has num_batches_tracked
                setattr(module, name, plain.eval())
