from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrine.models.resnetv2 import (
    VARIANTS,
    PreActBottleneck,
    ResNetV2,
    ResNetV2Config,
    StdConv2d,
    fold_weight_standardisation,
    std_conv,
)

TINY = ResNetV2Config(num_classes=5, layers=(2, 1), width_factor=0.5)
STEMS: list[Any] = ["large", "small"]

# timm's counts for 1000 classes; the two for 32 x 32 pixels are this project's.
PARAMETERS = {
    "resnetv2_50x1": 25_549_352,
    "resnetv2_50x3": 217_319_080,
    "resnetv2_101x1": 44_541_480,
    "resnetv2_101x3": 387_934_888,
    "resnetv2_152x2": 236_335_208,
    "resnetv2_152x4": 936_533_224,
    "resnetv2_26x1_32": 15_979_816,
    "resnetv2_26x05_32": 4_513_928,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(**changes: Any) -> ResNetV2:
    """A narrow network as after training: its head is not zero, and its norms are not the identity."""
    network = ResNetV2(replace(TINY, **changes)).eval()
    nn.init.normal_(network.head.weight)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return network


def standardised(weight: Tensor) -> Tensor:
    """Standardised filters, computed explicitly in double precision."""
    rows = weight.double().flatten(1)
    rows = (rows - rows.mean(dim=1, keepdim=True)) / rows.std(dim=1, keepdim=True, correction=0)
    return rows.reshape(weight.shape).float()


def count_by_formula(settings: dict[str, Any], classes: int = 1000) -> int:
    width = int(64 * settings["width_factor"])
    kernel = 3 if settings.get("stem") == "small" else 7
    total, channels = 3 * kernel**2 * width, width
    for index, units in enumerate(settings["layers"]):
        narrow = width * 2**index
        wide = 4 * narrow
        total += channels * wide  # the projection shortcut of a stage's first unit
        for _ in range(units):
            total += 2 * channels + 2 * narrow + 2 * narrow  # norms
            total += channels * narrow + 9 * narrow * narrow + narrow * wide
            channels = wide
    return total + 2 * channels + channels * classes + classes


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_has_its_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        network = ResNetV2(ResNetV2Config(num_classes=1000, **VARIANTS[name]))
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_number_of_parameters_is_the_formula(name: str) -> None:
    assert count_by_formula(VARIANTS[name]) == PARAMETERS[name]


def test_every_published_number_belongs_to_a_variant() -> None:
    assert VARIANTS.keys() == PARAMETERS.keys()


@settings(deadline=None, max_examples=30)
@given(
    in_channels=st.integers(8, 16),
    out_channels=st.integers(1, 8),
    kernel=st.sampled_from([1, 3, 7]),
    scale=st.floats(0.1, 10),
    shift=st.floats(-5, 5),
)
def test_filters_have_mean_zero_and_variance_one(
    in_channels: int, out_channels: int, kernel: int, scale: float, shift: float
) -> None:
    torch.manual_seed(0)
    convolution = std_conv(in_channels, out_channels, kernel)
    nn.init.normal_(convolution.weight, mean=shift, std=scale)
    filters = convolution.standardised().flatten(1)
    torch.testing.assert_close(filters.mean(dim=1), torch.zeros(out_channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(filters.var(dim=1, correction=0), torch.ones(out_channels), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_applies_the_standardised_filters(kernel: int, stride: int) -> None:
    convolution, x = std_conv(4, 6, kernel, stride), torch.randn(2, 4, 9, 10)
    expected = F.conv2d(x, standardised(convolution.weight), stride=stride, padding=kernel // 2)
    torch.testing.assert_close(convolution(x), expected, atol=1e-4, rtol=1e-4)


def test_a_filter_of_equal_weights_does_not_divide_by_zero() -> None:
    convolution = std_conv(4, 6, 3)
    nn.init.constant_(convolution.weight, 0.25)
    assert (convolution(torch.randn(2, 4, 5, 5)) == 0).all()


@pytest.mark.parametrize("stem", STEMS)
@settings(deadline=None, max_examples=5)
@given(scale=st.floats(0.5, 4), shift=st.floats(-0.5, 0.5))
def test_scaling_and_shifting_the_filters_changes_no_logit(stem: Any, scale: float, shift: float) -> None:
    torch.manual_seed(0)
    network, x = make(stem=stem), torch.randn(2, 3, 24, 24)
    expected = network(x)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, StdConv2d):
                module.weight.mul_(scale).add_(shift)
    torch.testing.assert_close(network(x), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("stride", "projected"), [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize("groups", [32, 8])
def test_unit_norms_before_each_convolution_and_projects_what_is_normed(
    stride: int, projected: bool, groups: int
) -> None:
    in_channels = 64 if projected else 128
    unit, x = PreActBottleneck(in_channels, 128, stride, groups, 0.0), torch.randn(2, in_channels, 7, 9)
    for norm in (unit.norm1, unit.norm2, unit.norm3):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def normed(x: Tensor, norm: nn.GroupNorm) -> Tensor:
        return F.relu(F.group_norm(x, groups, norm.weight, norm.bias, 1e-5))

    first = normed(x, unit.norm1)
    out = F.conv2d(first, standardised(unit.conv1.weight))
    out = F.conv2d(normed(out, unit.norm2), standardised(unit.conv2.weight), stride=stride, padding=1)
    out = F.conv2d(normed(out, unit.norm3), standardised(unit.conv3.weight))
    shortcut = F.conv2d(first, standardised(unit.downsample.weight), stride=stride) if projected else x
    torch.testing.assert_close(unit(x), shortcut + out, atol=1e-3, rtol=1e-4)


def test_zeros_around_the_map_win_against_negative_values_before_pooling() -> None:
    pooled = ResNetV2(TINY).pool(torch.full((1, 1, 4, 6), -1.0))
    assert pooled.tolist() == [[[[0.0, 0.0, 0.0], [0.0, -1.0, -1.0]]]]


def test_logits_depend_on_the_zeros_before_pooling() -> None:
    network, x = make(), torch.randn(2, 3, 32, 32)
    padded = network(x)
    network.pool = nn.MaxPool2d(3, 2, padding=1)  # its padding is minus infinity
    assert (network(x) - padded).abs().max() > 1e-3


@pytest.mark.parametrize(("stem", "stride"), [("large", 4), ("small", 1)])
@settings(deadline=None, max_examples=10)
@given(height=st.integers(5, 70), width=st.integers(5, 70))
def test_any_image_size_can_be_given_and_edges_are_rounded_up(stem: Any, stride: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    network, x = make(stem=stem, layers=(1, 1)), torch.randn(2, 3, height, width)
    features = network.pool(network.stem(x))
    assert features.shape == (2, 32, -(-height // stride), -(-width // stride))
    for stage in network.stages:
        features = stage(features)
    assert features.shape == (2, 256, -(-height // (2 * stride)), -(-width // (2 * stride)))
    features = F.relu(F.group_norm(features, 32, network.norm.weight, network.norm.bias))
    expected = F.linear(features.mean(dim=(2, 3)), network.head.weight, network.head.bias)
    torch.testing.assert_close(network(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stem", STEMS)
def test_every_parameter_learns(stem: Any) -> None:
    network = make(stem=stem).train()
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_initial_network_predicts_all_classes_equally() -> None:
    assert (ResNetV2(TINY)(torch.randn(2, 3, 32, 32)) == 0).all()


def test_images_of_a_batch_are_independent_even_in_training() -> None:
    network, x = make().train(), torch.randn(3, 3, 32, 40)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]), atol=1e-4, rtol=1e-4)


def test_drop_path_rises_with_depth() -> None:
    network = make(layers=(2, 1, 2), drop_path=0.4)
    rates = [unit.drop_path.probability for stage in network.stages for unit in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(("in_channels", "stride"), [(128, 1), (128, 2), (64, 1)])
def test_unit_whose_branch_is_dropped_is_its_shortcut(in_channels: int, stride: int) -> None:
    unit, x = PreActBottleneck(in_channels, 128, stride, 32, 0.999999).train(), torch.randn(2, in_channels, 6, 6)
    shortcut = x if unit.downsample is None else unit.downsample(F.relu(unit.norm1(x)))
    torch.testing.assert_close(unit(x), shortcut)
    assert not torch.allclose(unit.eval()(x), shortcut, atol=0.1)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_folding_standardisation_preserves_the_outputs(stem: Any, wrapped: bool) -> None:
    network, x = make(stem=stem), torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        expected = network(x)
    names = network.state_dict().keys()
    fold_weight_standardisation(nn.Sequential(network) if wrapped else network)
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, StdConv2d) for module in network.modules())
    assert network.state_dict().keys() == names


def test_folding_does_not_change_other_networks() -> None:
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), torch.randn(1, 3, 5, 5)
    expected = network(x)
    fold_weight_standardisation(network)
    assert torch.equal(network(x), expected)
    assert network[0].weight.requires_grad
