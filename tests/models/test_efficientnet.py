from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrine.models.efficientnet import VARIANTS, EfficientNet, EfficientNetConfig, MBConv, SameConv2d, Stage

TINY = EfficientNetConfig(num_classes=5, width_factor=0.25, depth_factor=0.5)

# For 1,000 classes: the authors' figures in millions are 4.7, 5.4, 6.1, 8.2, 13.0.
PARAMETERS = {
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "efficientnet_lite3": 8_197_096,
    "efficientnet_lite4": 13_006_568,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(**changes: Any) -> EfficientNet:
    """A narrow network as after training: its norms are not the identity."""
    network = EfficientNet(replace(TINY, **changes)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def same_convolution(x: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
    """TensorFlow's definition: as many zeros as the last window needs, of an odd number one more behind."""
    kernel = weight.shape[-1]
    pads = []
    for edge in reversed(x.shape[-2:]):
        needed = max((-(-edge // stride) - 1) * stride + kernel - edge, 0)
        pads += [needed // 2, needed - needed // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_has_its_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        network = EfficientNet(EfficientNetConfig(num_classes=1000, **VARIANTS[name]))
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


def test_every_published_number_belongs_to_a_variant() -> None:
    assert VARIANTS.keys() == PARAMETERS.keys()


@settings(deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    depthwise=st.booleans(),
)
def test_convolutions_are_padded_as_in_tensorflow(
    height: int, width: int, kernel: int, stride: int, depthwise: bool
) -> None:
    if kernel == 1:
        stride = 1
    groups = 4 if depthwise else 1
    torch.manual_seed(0)
    convolution, x = SameConv2d(4, 8, kernel, stride, groups), torch.randn(2, 4, height, width)
    expected = same_convolution(x, convolution.weight, stride, groups)
    assert expected.shape[-2:] == (-(-height // stride), -(-width // stride))
    torch.testing.assert_close(convolution(x), expected)


def test_blocks_expand_convolve_and_project() -> None:
    block = MBConv(8, Stage(expansion=6, kernel=5, stride=2, channels=8, blocks=2), 1, drop_path=0.0).eval()
    x = torch.randn(2, 8, 6, 7)

    def norm(x: Tensor, module: nn.BatchNorm2d) -> Tensor:
        return x / (1 + 1e-3) ** 0.5  # of fresh statistics

    out = norm(F.conv2d(x, block.expand.conv.weight), block.expand.norm).clamp(0, 6)
    out = norm(F.conv2d(out, block.depthwise.conv.weight, padding=2, groups=48), block.depthwise.norm).clamp(0, 6)
    out = norm(F.conv2d(out, block.project.conv.weight), block.project.norm)
    torch.testing.assert_close(block(x), x + out)


@pytest.mark.parametrize(("in_channels", "stride"), [(8, 2), (16, 1)])
def test_blocks_that_change_the_shape_have_no_shortcut(in_channels: int, stride: int) -> None:
    block = MBConv(in_channels, Stage(1, 3, stride, 8, 1), stride, drop_path=0.0).eval()
    nn.init.zeros_(block.project.conv.weight)
    assert (block(torch.randn(1, in_channels, 6, 6)) == 0).all()
    assert not any(name.startswith("expand") for name in block.state_dict())


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (64, 31)])
def test_logits_are_the_head_of_the_averaged_features(size: tuple[int, int]) -> None:
    network, x = make(), torch.randn(2, 3, *size)
    features = network.features(x)
    assert features.shape == (2, 1280, -(-size[0] // 32), -(-size[1] // 32))
    assert features.min() >= 0
    assert features.max() <= 6
    torch.testing.assert_close(network(x), network.head(features.mean(dim=(2, 3))))


def test_depth_is_scaled_but_for_the_first_and_last_stage() -> None:
    blocks = [stage.blocks for stage in EfficientNetConfig(num_classes=2, depth_factor=1.2).stages]
    assert blocks == [1, 3, 3, 4, 4, 5, 1]
    assert len(make(depth_factor=1.2).backbone.blocks) == sum(blocks)


def test_drop_path_grows_with_depth() -> None:
    rates = [block.drop_path.probability for block in make(drop_path=0.2).backbone.blocks]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)


def test_every_parameter_gets_a_gradient() -> None:
    network = make().train()
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not missing


@settings(deadline=None, max_examples=20)
@given(edges=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=2, max_size=3))
def test_features_of_a_padded_image_equal_those_of_the_image_alone(edges: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    backbone = make().backbone
    images = [torch.randn(3, *edge) for edge in edges]
    batch = torch.zeros(len(edges), 3, *map(max, zip(*edges, strict=True)))
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        together = backbone(batch, torch.tensor(edges))
        for i, image in enumerate(images):
            alone = backbone(image[None], torch.tensor([edges[i]]))
            for stride, level, own in zip(backbone.strides, together, alone, strict=True):
                height, width = (-(-edge // stride) for edge in edges[i])
                torch.testing.assert_close(
                    level[i, :, :height, :width], own[0, :, :height, :width], atol=1e-4, rtol=1e-4
                )
                assert (level[i, :, height:] == 0).all()
                assert (level[i, ..., width:] == 0).all()


def test_maps_are_those_of_every_resolution() -> None:
    network, x = make(), torch.randn(1, 3, 64, 96)
    maps = network.backbone(x)
    assert network.backbone.strides == [2, 4, 8, 16, 32]
    assert [tuple(level.shape[1:]) for level in maps] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(network.backbone.channels, network.backbone.strides, strict=True)
    ]
    # Of whole images whose edges are multiples of 32, sizes change nothing.
    for level, masked in zip(maps, network.backbone(x, torch.tensor([[64, 96]])), strict=True):
        torch.testing.assert_close(level, masked)


@pytest.mark.parametrize("head", ["linear", "vit"])
def test_head_continues_the_features(head: str) -> None:
    network = make(head=head, image_size=64, vit_embed_dim=8, vit_num_heads=2)
    x = torch.randn(2, 3, 64, 64)
    features = network.forward_features(x)
    assert features.shape == ((2, 1280) if head == "linear" else (2, 1280, 2, 2))
    torch.testing.assert_close(network.forward_head(features), network(x))


def test_vit_head_records_its_attention_over_the_cells() -> None:
    network, record = make(head="vit", image_size=(64, 96), vit_embed_dim=8, vit_num_heads=2, vit_depth=3), []
    logits = network(torch.randn(2, 3, 64, 96), record)
    assert logits.shape == (2, 5)
    assert [tuple(weights.shape) for weights in record] == [(2, 2, 7, 7)] * 3  # a class token and 2 x 3 cells
