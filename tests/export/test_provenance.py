"""Provenance: enough to reproduce the bundle."""

from dataclasses import replace
from pathlib import Path

from vitrine.export.provenance import describe, provenance
from vitrine.models.training.checkpoint import Origin, checkpoint_sha256, load_checkpoint

ORIGIN = Origin("vit.safetensors", "0" * 64, "timm", ["--labels", "imagenet-1k"], [])


def test_a_trained_run(classifier_run: Path, tiny_vit: tuple[str, ...]) -> None:
    checkpoint = load_checkpoint(classifier_run)
    assert describe(checkpoint, "colours") == "Vision Transformer trained by Vitrine's recipe vit_cifar10 on colours."
    found = provenance(classifier_run, checkpoint, 1000)
    assert found.training is not None
    assert found.imported is None
    assert found.training.recipe_settings == dict(setting.split("=", 1) for setting in tiny_vit)
    assert found.checkpoint_sha256 == checkpoint_sha256(classifier_run)
    assert (found.parameters, found.training.epochs, found.training.seed) == (1000, 6, 1)
    assert found.git_commit


def test_the_folder_of_cached_features_is_not_part_of_it(classifier_run: Path) -> None:
    checkpoint = load_checkpoint(classifier_run)
    assert checkpoint.progress is not None
    progress = replace(checkpoint.progress, changes=["features=/home/me/features", "epochs=6"])
    found = provenance(classifier_run, replace(checkpoint, progress=progress), 1000)
    assert found.training is not None
    assert found.training.recipe_settings == {"epochs": "6"}


def test_an_imported_run(classifier_run: Path) -> None:
    checkpoint = replace(load_checkpoint(classifier_run), progress=None, origin=ORIGIN)
    assert describe(checkpoint, None) == "Vision Transformer with the weights of vit.safetensors."
    found = provenance(classifier_run, checkpoint, 1000)
    assert found.training is None
    assert found.imported is not None
    assert found.imported.arguments == ("--labels", "imagenet-1k")
