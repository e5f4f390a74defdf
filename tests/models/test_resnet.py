import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrine.models.resnet import (
    VARIANTS,
    BasicBlock,
    Bottleneck,
    FrozenBatchNorm,
    ResNet,
    ResNetConfig,
    thaw_frozen_norm,
)

# torchvision's counts, without the classifier of 1000 classes.
PARAMETERS = {
    "resnet18": 11_689_512 - (512 * 1000 + 1000),
    "resnet34": 21_797_672 - (512 * 1000 + 1000),
    "resnet50": 25_557_032 - (2048 * 1000 + 1000),
    "resnet101": 44_549_160 - (2048 * 1000 + 1000),
}
BLOCKS: list[Any] = ["basic", "bottleneck"]
SIZES = st.tuples(st.integers(1, 70), st.integers(1, 70))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(layers: tuple[int, ...] = (1, 1, 2), **settings: Any) -> ResNet:
    """A narrow network as after training: its norms do not map zero to zero."""
    network = ResNet(ResNetConfig(layers, 8, **settings)).eval()
    randomise_norms(network)
    return network


def randomise_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.5)
                module.running_mean.normal_(std=0.5)
                module.running_var.uniform_(0.5, 1.5)


def padded(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images [3, H, W] as a batch, and their sizes."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = sizes.amax(dim=0).tolist()
    batch = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    return torch.stack(batch), sizes


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_has_its_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        network = ResNet(VARIANTS[name])
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]
    assert network.channels[-1] == (512 if VARIANTS[name].block == "basic" else 2048)


def test_every_published_number_belongs_to_a_variant() -> None:
    assert VARIANTS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dilation", [False, True])
@pytest.mark.parametrize(("layers", "stride"), [((1, 1), 8), ((2, 1, 1), 16), ((1, 1, 1, 1), 32)])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 71)])
def test_stride_and_width(
    layers: tuple[int, ...], stride: int, height: int, width: int, block: Any, dilation: bool
) -> None:
    config = ResNetConfig(layers, 8, block, dilation=dilation)
    assert config.stride == (stride // 2 if dilation else stride)
    network = ResNet(config).eval()
    features = network(torch.randn(2, 3, height, width), torch.tensor([[height, width]] * 2))[-1]
    assert network.channels[-1] == 8 * 2 ** (len(layers) - 1) * (4 if block == "bottleneck" else 1)
    grid = math.ceil(height / config.stride), math.ceil(width / config.stride)
    assert features.shape == (2, network.channels[-1], *grid)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize(("channels", "stride", "projected"), [(4, 1, False), (8, 1, True), (4, 2, True)])
def test_shortcut_is_projected_where_the_shape_changes(norm: Any, channels: int, stride: int, projected: bool) -> None:
    block = BasicBlock(4, channels, stride, (1, 1), norm).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the branch is zero: only the shortcut remains
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(block(x, None, None), block.downsample(x).relu())
    assert isinstance(block.downsample, torch.nn.Identity) is not projected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_basic_block_is_figure_5_left(stride: int, dilation: int) -> None:
    block, x = BasicBlock(4, 8, stride, (dilation, 2), "frozen"), torch.randn(2, 4, 7, 9)
    randomise_norms(block)
    out = F.conv2d(x, block.conv1.weight, stride=stride, padding=dilation, dilation=dilation)
    out = block.bn2(F.conv2d(F.relu(block.bn1(out)), block.conv2.weight, padding=2, dilation=2))
    convolution, norm = block.downsample
    expected = F.relu(out + norm(F.conv2d(x, convolution.weight, stride=stride)))
    torch.testing.assert_close(block(x, None, None), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_bottleneck_is_figure_5_right_with_the_stride_in_its_middle(stride: int, dilation: int) -> None:
    block, x = Bottleneck(4, 3, stride, (dilation, 2), "frozen"), torch.randn(2, 4, 7, 9)
    randomise_norms(block)
    out = F.relu(block.bn1(F.conv2d(x, block.conv1.weight)))
    out = F.conv2d(out, block.conv2.weight, stride=stride, padding=dilation, dilation=dilation)
    out = block.bn3(F.conv2d(F.relu(block.bn2(out)), block.conv3.weight))
    convolution, norm = block.downsample
    expected = F.relu(out + norm(F.conv2d(x, convolution.weight, stride=stride)))
    assert expected.shape[1] == 12
    torch.testing.assert_close(block(x, None, None), expected)


def test_frozen_norm_is_batch_norm_in_evaluation_with_the_same_numbers() -> None:
    batch, x = nn.BatchNorm2d(5).eval(), 3 * torch.randn(4, 5, 6, 7) + 1
    randomise_norms(batch)
    frozen = FrozenBatchNorm(5)
    state = batch.state_dict()
    del state["num_batches_tracked"]
    frozen.load_state_dict(state)
    torch.testing.assert_close(frozen(x), batch(x), atol=1e-5, rtol=1e-5)


def test_frozen_norm_does_not_change_in_training() -> None:
    network = make(norm="frozen").train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    x = torch.randn(2, 3, 32, 32)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    expected = network(x)[-1]
    assert torch.equal(expected, network.eval()(x)[-1])  # nor does it depend on the mode
    expected.square().sum().backward()
    optimiser.step()
    assert not torch.equal(network(x)[-1], expected)  # the convolutions do learn
    assert {"bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"} <= before.keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def test_batch_norm_and_frozen_norm_have_the_same_names() -> None:
    batch, frozen = (ResNet(ResNetConfig((1, 1), 8, norm=norm)).state_dict().keys() for norm in ("batch", "frozen"))
    assert {name for name in batch if "num_batches_tracked" not in name} == set(frozen)


@pytest.mark.parametrize("block", BLOCKS)
def test_dilation_changes_no_parameters_name_or_shape(block: Any) -> None:
    shapes = [
        {
            name: value.shape
            for name, value in ResNet(ResNetConfig((1, 1, 2), 8, block, dilation=dilation)).state_dict().items()
        }
        for dilation in (False, True)
    ]
    assert shapes[0] == shapes[1]


@settings(deadline=None, max_examples=15)
@given(block=st.sampled_from(BLOCKS), size=SIZES, other=SIZES)
def test_every_second_cell_of_dilated_features_is_that_of_strided_ones(
    block: Any, size: tuple[int, int], other: tuple[int, int]
) -> None:
    """With dilation, the same weights see the same pixels on a grid twice as fine."""
    torch.manual_seed(0)
    strided, dilated = (make(block=block, dilation=dilation) for dilation in (False, True))
    dilated.load_state_dict(strided.state_dict())
    batch, sizes = padded([torch.randn(3, *size), torch.randn(3, *other)])
    for argument in (None, sizes):
        found, expected = dilated(batch, argument)[-1][..., ::2, ::2], strided(batch, argument)[-1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    block=st.sampled_from(BLOCKS),
    dilation=st.booleans(),
    norm=st.sampled_from(["batch", "frozen"]),
    layers=st.sampled_from([(1,), (2, 1), (1, 1, 2)]),
    edges=st.lists(SIZES, min_size=2, max_size=3),
)
def test_features_of_a_padded_image_equal_those_without_padding(
    block: Any, dilation: bool, norm: Any, layers: tuple[int, ...], edges: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    network = make(layers, block=block, dilation=dilation and len(layers) > 1, norm=norm)
    images = [torch.randn(3, *edge) for edge in edges]
    together = network(*padded(images))[-1]
    for image, features in zip(images, together, strict=True):
        alone = network(image[None])[-1][0]
        height, width = alone.shape[1:]
        torch.testing.assert_close(features[:, :height, :width], alone, atol=1e-4, rtol=1e-4)
        assert (features[:, height:] == 0).all()
        assert (features[:, :, width:] == 0).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dilation", [False, True])
def test_without_sizes_padding_leaks(block: Any, dilation: bool) -> None:
    network = make(block=block, dilation=dilation)
    image = torch.randn(3, 33, 47)
    batch, sizes = padded([image, torch.randn(3, 64, 64)])
    alone = network(image[None])[-1][0]
    cells = (slice(None), slice(alone.shape[1]), slice(alone.shape[2]))
    torch.testing.assert_close(network(batch, sizes)[-1][0][cells], alone, atol=1e-4, rtol=1e-4)
    leaked = network(batch)[-1][0]
    assert (leaked[cells] - alone).abs().max() > 0.01
    assert leaked[:, alone.shape[1] :].abs().max() > 0.01


@settings(deadline=None, max_examples=15)
@given(block=st.sampled_from(BLOCKS), dilation=st.booleans(), size=SIZES)
def test_sizes_of_whole_images_change_nothing(block: Any, dilation: bool, size: tuple[int, int]) -> None:
    network, x = make(block=block, dilation=dilation), torch.randn(2, 3, *size)
    assert torch.equal(network(x, torch.tensor([size] * 2))[-1], network(x)[-1])


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_learns(block: Any) -> None:
    network = make(block=block).train()
    network(*padded([torch.randn(3, 64, 64), torch.randn(3, 33, 47)]))[-1].square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_thawed_norm_equals_frozen_norm() -> None:
    network = ResNet(ResNetConfig((1, 1), 8, norm="frozen")).eval()
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm):
            for buffer in module.buffers():
                buffer.uniform_(0.5, 2)
    x = torch.randn(2, 3, 33, 47)
    expected = network(x)[-1]
    thaw_frozen_norm(network)
    assert not any(isinstance(module, FrozenBatchNorm) for module in network.modules())
    torch.testing.assert_close(network(x)[-1], expected, atol=1e-4, rtol=1e-4)


def test_a_network_too_narrow_to_train_everywhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^width of a ResNet: expected at least 8, found 7$"):
        ResNet(ResNetConfig((1, 1), width=7))
