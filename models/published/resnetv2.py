"""Layouts of published BiTs: Google's `.npz`, timm, Hugging Face."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrine.models.published import flax
from vitrine.models.published.errors import ImportSettingError
from vitrine.models.published.files import Tensors
from vitrine.models.published.layout import INCEPTION, Layout, Rule, Settings, count, rule, rules


def _linear(kernel: Tensor) -> Tensor:
    """[1, 1, in, out] -> [out, in]: the head is a 1x1 convolution."""
    return kernel.flatten(0, -2).T


def _settings(tensors: Tensors, stem_channels: int, unit: str, image_size: int) -> Settings:
    """Infer the settings; `unit` is the key of a tensor in each unit, with stage {s} and unit {n}."""
    layers: list[int] = []
    while units := count(tensors, unit, s=len(layers), s1=len(layers) + 1):
        layers.append(units)
    factor = stem_channels / 64
    return {"image_size": image_size, "layers": layers, "width_factor": int(factor) if factor.is_integer() else factor}


# Google ---------------------------------------------------------------------------------------------------------------

_UNIT = "resnet/block{i1}/unit{j1:02d}"


def _group_norm(target: str, source: str) -> tuple[Rule, ...]:
    """Parameters are [C], in some files [1, 1, 1, C]."""
    return (
        rule(f"{target}.weight", f"{source}/gamma", transform=Tensor.flatten),
        rule(f"{target}.bias", f"{source}/beta", transform=Tensor.flatten),
    )


def _conv(target: str, source: str) -> Rule:
    return rule(f"{target}.weight", f"{source}/standardized_conv2d/kernel", transform=flax.conv_kernel)


GOOGLE = Layout(
    name="Google's BiT (.npz)",
    architecture="resnetv2",
    signature=("resnet/root_block/standardized_conv2d/kernel", "resnet/block1/unit01/a/standardized_conv2d/kernel"),
    prefixes={"": ()},
    aliases=((r"standardized_conv2d_\d+/", "standardized_conv2d/"),),
    rules=(
        _conv("stem", "resnet/root_block"),
        _conv("stages.{i}.{j}.downsample", f"{_UNIT}/a/proj"),
        *(
            entry
            for number, part in enumerate("abc", start=1)
            for entry in (
                *_group_norm(f"stages.{{i}}.{{j}}.norm{number}", f"{_UNIT}/{part}/group_norm"),
                _conv(f"stages.{{i}}.{{j}}.conv{number}", f"{_UNIT}/{part}"),
            )
        ),
        *_group_norm("norm", "resnet/group_norm"),
        rule("head.weight", "resnet/head/conv2d/kernel", transform=_linear),
        rule("head.bias", "resnet/head/conv2d/bias"),
    ),
    settings=lambda tensors, _: _settings(
        tensors,
        tensors["resnet/root_block/standardized_conv2d/kernel"].shape[3],
        "resnet/block{s1}/unit{n1:02d}/a/group_norm/gamma",
        480,
    ),
    preprocessing={"crop_mode": "squash", **INCEPTION},
)

# timm -----------------------------------------------------------------------------------------------------------------


def _pytorch_rules(stem: str, unit: str, norm: str) -> tuple[Rule, ...]:
    """timm and Hugging Face use the same names within a unit."""
    return (
        rule("stem.weight", f"{stem}.weight"),
        rule("stages.{i}.{j}.downsample.weight", f"{unit}.downsample.conv.weight"),
        *(
            entry
            for number in (1, 2, 3)
            for entry in (
                *rules(f"stages.{{i}}.{{j}}.norm{number}", f"{unit}.norm{number}"),
                rule(f"stages.{{i}}.{{j}}.conv{number}.weight", f"{unit}.conv{number}.weight"),
            )
        ),
        *rules("norm", norm),
    )


TIMM = Layout(
    name="timm's BiT (resnetv2_*_bit)",
    timm_names=("resnetv2_",),
    architecture="resnetv2",
    signature=("stem.conv.weight", "stages.0.blocks.0.norm1.weight", "stages.0.blocks.0.conv3.weight", "norm.weight"),
    rules=(
        *_pytorch_rules("stem.conv", "stages.{i}.blocks.{j}", "norm"),
        rule("head.weight", "head.fc.weight", transform=lambda weight: weight.flatten(1)),
        rule("head.bias", "head.fc.bias"),
    ),
    settings=lambda tensors, _: _settings(
        tensors, tensors["stem.conv.weight"].shape[0], "stages.{s}.blocks.{n}.norm1.weight", 448
    ),
    preprocessing=INCEPTION,
)

# Hugging Face ---------------------------------------------------------------------------------------------------------

# The only supported values in config.json.
_SUPPORTED = {
    "layer_type": "preactivation",
    "num_groups": 32,
    "global_padding": None,
    "embedding_dynamic_padding": False,
    "hidden_act": "relu",
    "output_stride": 32,
}


def _hugging_face_settings(tensors: Tensors, config: Mapping[str, Any]) -> Settings:
    for key, expected in _SUPPORTED.items():
        if config.get(key, expected) != expected:
            raise ImportSettingError(f"config.json: {key}: expected {expected!r}, found {config[key]!r}")
    return _settings(
        tensors,
        tensors["bit.embedder.convolution.weight"].shape[0],
        "bit.encoder.stages.{s}.layers.{n}.norm1.weight",
        448,
    )


HUGGING_FACE = Layout(
    name="Hugging Face's BiT",
    architecture="resnetv2",
    model_type="bit",
    signature=("bit.embedder.convolution.weight", "bit.encoder.stages.0.layers.0.conv3.weight", "bit.norm.weight"),
    aliases=((r"^(embedder|encoder|norm)\.", r"bit.\1."),),  # BitModel, without a head
    rules=(
        *_pytorch_rules("bit.embedder.convolution", "bit.encoder.stages.{i}.layers.{j}", "bit.norm"),
        *rules("head", "classifier.1"),
    ),
    settings=_hugging_face_settings,
    preprocessing={"interpolation": "bicubic", **INCEPTION},
)

LAYOUTS = (GOOGLE, TIMM, HUGGING_FACE)
