"""Imported BiTs compute the same as the published networks.

Compared with a public implementation: Hugging Face's (transformers, also at full size). Compared with a forward pass
written here in the layout's own conventions: Google's .npz (kernels standardised over height, width and input channels,
NHWC between the convolutions), timm's (functions of torch over its key names).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from vitrine.models.published.errors import ImportSettingError, MismatchError, UnsupportedNetworkError
from vitrine.models.training.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("forward_only")

State = dict[str, Tensor]
Import, Agree, Randomise = Callable[..., Checkpoint], Callable[..., None], Callable[..., nn.Module]
Save = Callable[..., Path]
WIDTH, CLASSES = 128, 5  # wide enough for 32 groups in a unit's bottleneck
LAYERS = (2, 1, 3, 1)
FAINT = 1e-2  # scale of images at which the norms' epsilon matters

transformers.logging.set_verbosity_error()


def images(size: int = 48, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size + 7) + 2 * torch.randn(count, 3, 1, 1)


def units(layers: tuple[int, ...]) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Stage and number of each unit, with kernel size, inputs and outputs of its three convolutions."""
    channels = 32
    for stage, count in enumerate(layers):
        wide, narrow = WIDTH * 2**stage, WIDTH * 2**stage // 4
        for unit in range(count):
            yield stage, unit, [(1, channels, narrow), (3, narrow, narrow), (1, narrow, wide)]
            channels = wide


# Google ---------------------------------------------------------------------------------------------------------------


def google_arrays(layers: tuple[int, ...] = LAYERS) -> State:
    arrays: State = {}

    def conv(name: str, side: int, inputs: int, outputs: int) -> None:
        arrays[f"resnet/{name}/standardized_conv2d/kernel"] = torch.randn(side, side, inputs, outputs) * 0.05 + 0.02

    def norm(name: str, channels: int) -> None:
        arrays[f"resnet/{name}group_norm/gamma"] = torch.rand(channels) + 0.5
        arrays[f"resnet/{name}group_norm/beta"] = torch.randn(channels) * 0.3

    conv("root_block", 7, 3, 32)
    for stage, unit, convolutions in units(layers):
        name = f"block{stage + 1}/unit{unit + 1:02d}"
        channels = convolutions[-1][2]
        if unit == 0:
            conv(f"{name}/a/proj", 1, convolutions[0][1], channels)
        for part, (side, inputs, outputs) in zip("abc", convolutions, strict=True):
            norm(f"{name}/{part}/", inputs)
            conv(f"{name}/{part}", side, inputs, outputs)
    norm("", channels)
    arrays["resnet/head/conv2d/kernel"] = torch.randn(1, 1, channels, CLASSES) * 0.1
    arrays["resnet/head/conv2d/bias"] = torch.randn(CLASSES) * 0.3
    return arrays


def google_forward(arrays: State, pixels: Tensor, layers: tuple[int, ...] = LAYERS) -> Tensor:
    """Logits, as the BiT paper's code computes them from images [B, H, W, 3]."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = arrays[f"resnet/{name}/standardized_conv2d/kernel"].double()
        kernel = kernel - kernel.mean(dim=(0, 1, 2), keepdim=True)
        kernel = (kernel / (kernel.square().mean(dim=(0, 1, 2), keepdim=True) + 1e-10).sqrt()).float()
        side = (kernel.shape[0] - 1) // 2
        padded = F.pad(x, (0, 0, side, side, side, side))
        windows = padded.unfold(1, kernel.shape[0], stride).unfold(2, kernel.shape[1], stride)  # [B, h, w, C, i, j]
        return torch.einsum("nhwcij,ijco->nhwo", windows, kernel)

    def norm_relu(x: Tensor, name: str) -> Tensor:
        groups = x.reshape(*x.shape[:3], 32, -1)
        centred = groups - groups.mean(dim=(1, 2, 4), keepdim=True)
        normed = centred / (centred.square().mean(dim=(1, 2, 4), keepdim=True) + 1e-5).sqrt()
        return (
            normed.reshape(x.shape) * arrays[f"resnet/{name}group_norm/gamma"] + arrays[f"resnet/{name}group_norm/beta"]
        ).relu()

    x = conv(pixels, "root_block", stride=2)
    windows = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 2).unfold(2, 3, 2)
    x = windows.amax(dim=(-1, -2))
    for stage, unit, _ in units(layers):
        name = f"block{stage + 1}/unit{unit + 1:02d}"
        stride = 2 if unit == 0 and stage > 0 else 1
        out = norm_relu(x, f"{name}/a/")
        shortcut = conv(out, f"{name}/a/proj", stride) if unit == 0 else x
        out = conv(out, f"{name}/a")
        out = conv(norm_relu(out, f"{name}/b/"), f"{name}/b", stride)
        x = shortcut + conv(norm_relu(out, f"{name}/c/"), f"{name}/c")
    x = norm_relu(x, "").mean(dim=(1, 2))
    return x @ arrays["resnet/head/conv2d/kernel"][0, 0] + arrays["resnet/head/conv2d/bias"]


def numbered(arrays: State) -> State:
    """Rename as in files in which TensorFlow numbered every convolution."""
    renamed: State = {}
    for number, (key, array) in enumerate(arrays.items()):
        renamed[key.replace("/standardized_conv2d/", f"/standardized_conv2d_{number}/")] = array
    return renamed


def norms_for_nhwc(arrays: State) -> State:
    return {key: array[None, None, None] if "group_norm" in key else array for key, array in arrays.items()}


GOOGLE: dict[str, Callable[[State], State]] = {
    "plain": dict,
    "standardized_conv2d_{n}": numbered,
    "norms [1, 1, 1, C]": norms_for_nhwc,
}


@pytest.mark.parametrize("scale", [1.0, FAINT])
@pytest.mark.parametrize("variant", GOOGLE)
def test_google_bit(variant: str, scale: float, import_file: Import, agree: Agree) -> None:
    arrays, pixels = google_arrays(), images() * scale
    run = import_file(GOOGLE[variant](arrays), CLASSES, form="npz")
    assert run.settings["layers"] == list(LAYERS)
    assert run.settings["width_factor"] == 0.5
    expected = google_forward(arrays, pixels.permute(0, 2, 3, 1))
    agree(f"Google BiT, {variant}, images times {scale}", run.build()(pixels), expected)


def test_google_bit_with_more_than_nine_units_in_a_stage(import_file: Import, agree: Agree) -> None:
    layers = (1, 11)
    arrays, pixels = google_arrays(layers), images(32)
    assert "resnet/block2/unit11/a/group_norm/gamma" in arrays
    run = import_file(arrays, CLASSES, form="npz")
    assert run.settings["layers"] == [1, 11]
    expected = google_forward(arrays, pixels.permute(0, 2, 3, 1), layers)
    agree("Google BiT, 11 units in a stage", run.build()(pixels), expected)


def test_big_visions_own_bit_is_refused(import_file: Import) -> None:
    arrays = {"conv_root/kernel": torch.zeros(7, 7, 3, 64), "gn_root/scale": torch.ones(64)}
    with pytest.raises(UnsupportedNetworkError, match="normalises after each convolution"):
        import_file(arrays, CLASSES, form="npz")


def test_google_bit_with_a_unit_out_of_place_names_what_is_missing(import_file: Import) -> None:
    arrays = google_arrays()
    arrays["resnet/block4/unit07/a/group_norm/gamma"] = torch.ones(8)
    with pytest.raises(MismatchError, match=r"missing in the file: .*resnet/block4/unit06/a/group_norm/gamma"):
        import_file(arrays, CLASSES, form="npz")


# timm -----------------------------------------------------------------------------------------------------------------


def timm_state() -> State:
    state: State = {}

    def conv(name: str, side: int, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, side, side) * 0.05 + 0.02

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = torch.rand(channels) + 0.5
        state[f"{name}.bias"] = torch.randn(channels) * 0.3

    conv("stem.conv", 7, 3, 32)
    for stage, unit, convolutions in units(LAYERS):
        name = f"stages.{stage}.blocks.{unit}"
        channels = convolutions[-1][2]
        if unit == 0:
            conv(f"{name}.downsample.conv", 1, convolutions[0][1], channels)
        for number, (side, inputs, outputs) in enumerate(convolutions, start=1):
            norm(f"{name}.norm{number}", inputs)
            conv(f"{name}.conv{number}", side, inputs, outputs)
    norm("norm", channels)
    state["head.fc.weight"] = torch.randn(CLASSES, channels, 1, 1) * 0.1
    state["head.fc.bias"] = torch.randn(CLASSES) * 0.3
    return state


def timm_forward(state: State, pixels: Tensor) -> Tensor:
    """Logits, as timm's ResNetV2 with "fixed" stem and StdConv2d computes them."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        rows = F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True, momentum=0.0, eps=1e-8)
        return F.conv2d(x, rows.reshape_as(weight), stride=stride, padding=(weight.shape[-1] - 1) // 2)

    def norm_relu(x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"]).relu()

    x = F.max_pool2d(F.pad(conv(pixels, "stem.conv", 2), (1, 1, 1, 1)), 3, 2)
    for stage, unit, _ in units(LAYERS):
        name = f"stages.{stage}.blocks.{unit}"
        stride = 2 if unit == 0 and stage > 0 else 1
        active = norm_relu(x, f"{name}.norm1")
        shortcut = conv(active, f"{name}.downsample.conv", stride) if unit == 0 else x
        out = conv(norm_relu(conv(active, f"{name}.conv1"), f"{name}.norm2"), f"{name}.conv2", stride)
        x = shortcut + conv(norm_relu(out, f"{name}.norm3"), f"{name}.conv3")
    pooled = F.adaptive_avg_pool2d(norm_relu(x, "norm"), 1)
    return F.conv2d(pooled, state["head.fc.weight"], state["head.fc.bias"]).flatten(1)


@pytest.mark.parametrize("form", ["safetensors", "pth"])
@pytest.mark.parametrize("scale", [1.0, FAINT])
def test_timm_bit(form: str, scale: float, import_file: Import, agree: Agree) -> None:
    state, pixels = timm_state(), images() * scale
    run = import_file(state, CLASSES, form=form)
    agree(f"timm BiT, {form}, images times {scale}", run.build()(pixels), timm_forward(state, pixels))


def test_timm_bit_without_a_head_takes_a_new_one(import_file: Import) -> None:
    state = {key: tensor for key, tensor in timm_state().items() if not key.startswith("head.")}
    run = import_file(state, 7, reset_head=True)
    assert run.origin is not None
    assert run.origin.untrained == ["head"]
    assert run.build()(images()).shape == (4, 7)


# Hugging Face ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize(
    "config",
    [
        {"embedding_size": 32, "hidden_sizes": [128, 256, 512, 1024], "depths": [1, 2, 1, 1]},
        {"embedding_size": 32, "hidden_sizes": [128, 256], "depths": [3, 1]},
        {"embedding_size": 64, "hidden_sizes": [256, 512, 1024], "depths": [1, 1, 1]},
        {"embedding_size": 96, "hidden_sizes": [384, 768], "depths": [1, 1]},
    ],
    ids=str,
)
def test_hugging_face_bit(
    config: dict[str, Any], names: str, randomise: Randomise, import_file: Import, agree: Agree
) -> None:
    config = {**config, "output_stride": 32, "num_labels": CLASSES}
    network: Any = randomise(transformers.BitForImageClassification(transformers.BitConfig(**config)), gain=2)
    run = import_file(network, CLASSES, names=names)
    pixels = images() * FAINT
    shape = f"{config['depths']} x {config['embedding_size']}"
    agree(f"Hugging Face BiT, {names} names, {shape}", run.build()(pixels), network(pixels).logits)


def test_hugging_face_bit_50x1_at_full_size(randomise: Randomise, import_file: Import, agree: Agree) -> None:
    network: Any = randomise(transformers.BitForImageClassification(transformers.BitConfig(num_labels=1000)), gain=1.5)
    run = import_file(network)
    assert run.settings["layers"] == [3, 4, 6, 3]
    assert len(run.labels) == 1000
    pixels = images(128, count=2)
    agree("Hugging Face BiT, 50x1 at full size", run.build()(pixels), network(pixels).logits)


def test_hugging_face_bit_without_a_head_takes_a_new_one(
    randomise: Randomise, import_file: Import, agree: Agree
) -> None:
    config = transformers.BitConfig(embedding_size=32, hidden_sizes=[128, 256], depths=[1, 1])
    network: Any = randomise(transformers.BitModel(config))
    run = import_file(network, 7, reset_head=True)
    built, pixels = run.build(), images()
    assert built(pixels).shape == (4, 7)
    built.head = nn.Identity()
    agree("Hugging Face BitModel, features", built(pixels), network(pixels).pooler_output.flatten(1), spread=0.05)


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_type", "bottleneck"), ("global_padding", "SAME"), ("num_groups", 16), ("output_stride", 16)],
)
def test_hugging_face_bit_of_another_kind_is_refused(
    key: str, value: object, randomise: Randomise, save_pretrained: Save, import_file: Import
) -> None:
    config = transformers.BitConfig(embedding_size=32, hidden_sizes=[128, 256], depths=[1, 1], num_labels=CLASSES)
    network: Any = randomise(transformers.BitForImageClassification(config))
    source = save_pretrained(network)
    document = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**document, key: value}))
    with pytest.raises(ImportSettingError, match=f"config.json: {key}: expected .*, found {value!r}"):
        import_file(source, CLASSES)
