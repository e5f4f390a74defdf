import math

import pytest
import torch

from models.resnet import BasicBlock, ResNet


@pytest.mark.parametrize(("layers", "stride"), [((1,), 4), ((1, 1), 8), ((2, 1, 1), 16), ((1, 1, 1, 1), 32)])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 71)])
def test_stride_and_width(layers: tuple[int, ...], stride: int, height: int, width: int) -> None:
    network = ResNet(layers, 4).eval()
    features = network(torch.randn(2, 3, height, width), torch.tensor([[height, width]] * 2))
    assert network.num_features == 4 * 2 ** (len(layers) - 1)
    assert features.shape == (2, network.num_features, math.ceil(height / stride), math.ceil(width / stride))


@pytest.mark.parametrize(("channels", "stride", "projected"), [(4, 1, False), (8, 1, True), (4, 2, True)])
def test_shortcut_is_projected_where_the_shape_changes(channels: int, stride: int, projected: bool) -> None:
    block = BasicBlock(4, channels, stride).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the branch answers zero: only the shortcut is left
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(block(x, torch.tensor([[6, 6]]), stride), block.downsample(x).relu())
    assert isinstance(block.downsample, torch.nn.Identity) is not projected


def test_resnet18_has_its_published_size() -> None:
    network = ResNet((2, 2, 2, 2), 64)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_176_512  # ResNet-18 without its fc
