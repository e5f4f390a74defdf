"""Build a network from its architecture name and settings, as stored in checkpoints and manifests."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from vitrine.models import detr, efficientnet, mlp_mixer, resnet_classifier, resnetv2, vit

ARCHITECTURES: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "vit": (vit.ViT, vit.ViTConfig),
    "mlp_mixer": (mlp_mixer.MlpMixer, mlp_mixer.MlpMixerConfig),
    "resnetv2": (resnetv2.ResNetV2, resnetv2.ResNetV2Config),
    "efficientnet": (efficientnet.EfficientNet, efficientnet.EfficientNetConfig),
    "resnet": (resnet_classifier.ResNetClassifier, resnet_classifier.ResNetClassifierConfig),
    "detr": (detr.Detr, detr.DetrConfig),
}

# Standard sizes: variant name to (architecture, settings).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (architecture, settings)
    for architecture, variants in (
        ("vit", vit.VARIANTS),
        ("mlp_mixer", mlp_mixer.VARIANTS),
        ("resnetv2", resnetv2.VARIANTS),
        ("efficientnet", efficientnet.VARIANTS),
        ("resnet", resnet_classifier.VARIANTS),
        ("detr", detr.VARIANTS),
    )
    for name, settings in variants.items()
}


def accepts_any_size(network: nn.Module) -> bool:
    """Return whether a network takes images of any size, at least 32 x 32 pixels: with no weights for each position."""
    if isinstance(network, efficientnet.EfficientNet):
        return isinstance(network.head, nn.Linear)
    return isinstance(network, detr.Detr | resnet_classifier.ResNetClassifier | resnetv2.ResNetV2)


def setting_names(architecture: str) -> list[str]:
    """Return the names of an architecture's settings, without `num_classes`."""
    return [field.name for field in fields(ARCHITECTURES[architecture][1]) if field.name != "num_classes"]


def build_model(architecture: str, settings: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Return a freshly initialised network.

    Args:
        architecture: a key of `ARCHITECTURES`.
        settings: fields of its config class, without `num_classes`; lists are converted to tuples.
    """
    network, config = ARCHITECTURES[architecture]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return network(config(num_classes=num_classes, **values))
