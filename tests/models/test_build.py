import json
from dataclasses import fields
from typing import Any

import pytest
import torch

from vitrine.models import detr, efficientnet, mlp_mixer, resnet_classifier, resnetv2, vit
from vitrine.models.build import ARCHITECTURES, VARIANTS, build_model, setting_names

TINY: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
    "mlp_mixer": {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1},
    "resnetv2": {"image_size": 8, "layers": [1], "width_factor": 0.5, "stem": "small"},
    "efficientnet": {"image_size": 32, "width_factor": 0.2, "depth_factor": 0.5},
    "resnet": {"image_size": 8, "layers": [1], "width": 8},
    "detr": {"embed_dim": 16, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "backbone_layers": [1, 1]},
}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_builds_what_the_settings_say(architecture: str) -> None:
    network = build_model(architecture, TINY[architecture], 4)
    assert type(network) is ARCHITECTURES[architecture][0]
    assert network.config.num_classes == 4
    for key, value in TINY[architecture].items():
        assert getattr(network.config, key) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_same_seed_same_weights(architecture: str) -> None:
    torch.manual_seed(3)
    first = build_model(architecture, TINY[architecture], 4).state_dict()
    torch.manual_seed(3)
    second = build_model(architecture, TINY[architecture], 4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_setting_names(architecture: str) -> None:
    names = setting_names(architecture)
    assert "num_classes" not in names
    assert {*names, "num_classes"} == {field.name for field in fields(ARCHITECTURES[architecture][1])}
    assert TINY[architecture].keys() <= set(names)


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        build_model("vit", {"colour": 1}, 2)


def test_lists_stand_for_tuples() -> None:
    network = build_model("vit", {**TINY["vit"], "image_size": [8, 12]}, 2)
    assert network.config.image_size == (8, 12)
    assert network(torch.randn(1, 3, 8, 12)).shape == (1, 2)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_builds_from_settings_as_a_checkpoint_holds_them(name: str) -> None:
    architecture, settings = VARIANTS[name]
    with torch.device("meta"):
        network = build_model(architecture, json.loads(json.dumps(settings)), 7)
    network_class, config_class = ARCHITECTURES[architecture]
    assert type(network) is network_class
    assert network.config == config_class(num_classes=7, **settings)


def test_no_two_variants_share_a_name() -> None:
    modules = (vit, mlp_mixer, resnetv2, efficientnet, resnet_classifier, detr)
    assert len(VARIANTS) == sum(len(module.VARIANTS) for module in modules)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_no_two_variants_are_the_same_network(architecture: str) -> None:
    configs = [ARCHITECTURES[found][1](num_classes=2, **settings) for found, settings in VARIANTS.values()]
    configs = [config for config in configs if type(config) is ARCHITECTURES[architecture][1]]
    assert len(configs) > 1
    assert len(set(configs)) == len(configs)
