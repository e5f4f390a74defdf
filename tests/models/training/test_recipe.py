"""Recipe validation and differences."""

import pytest
from pydantic import ValidationError

from vitrine.models.training.recipe import read_recipe
from vitrine.models.training.registry import load_recipe

CLASSIFIER = load_recipe("vit_cifar10")
DETECTOR = load_recipe("detr_bccd")


def test_derived_recipes_are_validated() -> None:
    derived = CLASSIFIER.derive(epochs=3, preprocessing={**CLASSIFIER.preprocessing.model_dump(), "crop_pct": 0.9})
    assert derived == load_recipe("vit_cifar10", ["epochs=3", "preprocessing.crop_pct=0.9"])
    with pytest.raises(ValidationError, match="epoch\n  Extra inputs are not permitted"):
        CLASSIFIER.derive(epoch=3)
    with pytest.raises(ValidationError, match=r"augmentation\.flips\n  Extra inputs are not permitted"):
        CLASSIFIER.derive(augmentation={"flips": 0.5})
    with pytest.raises(ValidationError, match=r"unknown 'model\.dept': did you mean 'model\.depth'"):
        CLASSIFIER.derive(model={**CLASSIFIER.model, "dept": 3})


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
