from dataclasses import fields
from typing import Any

import pytest
import torch

from models.build import ARCHITECTURES, build_model, setting_names

TINY: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
    "mlp_mixer": {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1},
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
