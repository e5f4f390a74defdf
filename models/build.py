"""From an architecture's name and settings, as checkpoints and manifests hold them, to a network."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from vitrine.models import detr, mlp_mixer, resnet_classifier, resnetv2, vit

ARCHITECTURES: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "vit": (vit.ViT, vit.ViTConfig),
    "mlp_mixer": (mlp_mixer.MlpMixer, mlp_mixer.MlpMixerConfig),
    "resnetv2": (resnetv2.ResNetV2, resnetv2.ResNetV2Config),
    "resnet": (resnet_classifier.ResNetClassifier, resnet_classifier.ResNetClassifierConfig),
    "detr": (detr.Detr, detr.DetrConfig),
}

# The standard sizes: by name, settings of an architecture.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (architecture, settings)
    for architecture, variants in (
        ("vit", vit.VARIANTS),
        ("mlp_mixer", mlp_mixer.VARIANTS),
        ("resnetv2", resnetv2.VARIANTS),
        ("resnet", resnet_classifier.VARIANTS),
        ("detr", detr.VARIANTS),
    )
    for name, settings in variants.items()
}


def setting_names(architecture: str) -> list[str]:
    """The names of the settings that an architecture takes, beside `num_classes`."""
    return [field.name for field in fields(ARCHITECTURES[architecture][1]) if field.name != "num_classes"]


def build_model(architecture: str, settings: Mapping[str, Any], num_classes: int) -> nn.Module:
    """A freshly initialised network.

    Args:
        architecture: a key of `ARCHITECTURES`.
        settings: fields of its config class, without `num_classes`; lists stand for tuples.
    """
    network, config = ARCHITECTURES[architecture]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return network(config(num_classes=num_classes, **values))
