"""ResNet feature extractor, DETR's backbone (He et al. 2016, "Deep Residual Learning for Image Recognition").

It is trained from random weights with batch norm. Padding is kept at zero before every spatial convolution and pooling:
batch norm would otherwise lift it from zero, and it would leak into the features along an image's border, so that an
image's answer depended on the batch that it is in.

Shapes: B batch, H x W pixels, C channels.
"""

from typing import cast

from torch import Tensor, nn

from models.position import valid_cells


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity (or, where the shape changes, projected) shortcut (fig. 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor, sizes: Tensor, total_stride: int) -> Tensor:
        """Transform features.

        Args:
            x: [B, in_channels, h, w], zero outside the valid regions.
            sizes: int64 [B, 2], height and width of each image's valid region in pixels.
            total_stride: pixels per cell of the result.

        Returns:
            [B, channels, h / stride, w / stride] (rounded up), zero outside the valid regions.
        """
        out = self.relu(self.bn1(self.conv1(x)))
        valid = valid_cells(sizes, out.shape[-2:], total_stride)[:, None]  # [B, 1, h / stride, w / stride]
        out = self.bn2(self.conv2(out * valid))
        result: Tensor = self.relu(out + self.downsample(x)) * valid
        return result


class ResNet(nn.Module):
    """A ResNet of basic blocks without its classifier: (2, 2, 2, 2) blocks of width 64 are ResNet-18's.

    Fewer than four stages stop at a finer grid: the output stride is 2 ** (1 + len(layers)).
    """

    def __init__(self, layers: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.ModuleList()
        channels = width
        for index, blocks in enumerate(layers):
            out_channels = width * 2**index
            stride = 1 if index == 0 else 2
            stage = [BasicBlock(channels, out_channels, stride)]
            stage += [BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
            self.stages.append(nn.ModuleList(stage))
            channels = out_channels
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """Extract features.

        Args:
            x: normalised images, float [B, 3, H, W], zero outside their valid regions.
            sizes: int64 [B, 2], height and width of each valid region.

        Returns:
            [B, num_features, H / stride, W / stride] (rounded up), zero outside the valid regions.
        """
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x * valid_cells(sizes, x.shape[-2:], stride=2)[:, None])
        x = x * valid_cells(sizes, x.shape[-2:], stride=4)[:, None]
        for index, stage in enumerate(self.stages):
            for block in cast(nn.ModuleList, stage):
                x = block(x, sizes, 4 * 2**index)
        return x
