"""What a recipe may say, and when two recipes say the same."""

import pytest

from vitrine.models.training.recipe import read_recipe
from vitrine.models.training.registry import load_recipe

CLASSIFIER = load_recipe("vit_cifar10")
DETECTOR = load_recipe("detr_bccd")


def test_differences_ignore_execution_settings() -> None:
    assert CLASSIFIER.differences(load_recipe("vit_cifar10", ["workers=0", "cache=disk"])) == []
    other = load_recipe("vit_cifar10", ["lr=0.1", "model.depth=2", "augmentation.flip=0.25"])
    assert CLASSIFIER.differences(other) == [
        "augmentation.flip: expected 0.5, found 0.25",
        "lr: expected 0.003, found 0.1",
        "model.depth: expected 6, found 2",
    ]


def test_tasks_and_architectures_belong_together() -> None:
    with pytest.raises(ValueError, match="architecture: expected detr, found 'vit'"):
        read_recipe({**DETECTOR.model_dump(mode="json"), "architecture": "vit"})
    with pytest.raises(ValueError, match=r"architecture: expected vit or .* found 'detr'"):
        read_recipe({**CLASSIFIER.model_dump(mode="json"), "architecture": "detr"})
