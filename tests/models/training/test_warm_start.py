"""Initialising a network from another run."""

from pathlib import Path

import pytest
import torch

from vitrine.models.build import build_model
from vitrine.models.position import interpolate_positions
from vitrine.models.training.checkpoint import Checkpoint, checkpoint_sha256, save_checkpoint
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.registry import load_recipe
from vitrine.models.training.warm_start import load_initial_weights

VIT = ("model.embed_dim=16", "model.depth=2", "model.num_heads=2")
DETR = ("model.embed_dim=16", "model.num_heads=2", "model.backbone_width=8", "model.backbone_layers=[1, 1]")
SELECTED = (*DETR, "model.queries=selected", "model.query_groups=1", "model.scores=sigmoid", "model.denoising=1")


def saved(run: Path, name: str, labels: list[str], *changes: str) -> Checkpoint:
    recipe = load_recipe(name, changes)
    document = recipe.model_dump(mode="json")
    weights = build_model(recipe.architecture, recipe.model, len(labels)).state_dict()
    checkpoint = Checkpoint(recipe.architecture, document["model"], document["preprocessing"], labels, weights)
    run.mkdir()
    save_checkpoint(checkpoint, run)
    return checkpoint


@pytest.mark.parametrize(("name", "changes"), [("vit_cifar10", VIT), ("detr_bccd", DETR)])
def test_same_labels_take_everything(tmp_path: Path, name: str, changes: tuple[str, ...]) -> None:
    source = saved(tmp_path / "run", name, ["a", "b"], *changes)
    recipe = load_recipe(name, changes)
    network = build_model(recipe.architecture, recipe.model, 2)
    start = load_initial_weights(network, recipe, ["a", "b"], tmp_path / "run")
    assert (start.run, start.sha256, start.fresh) == ("run", checkpoint_sha256(tmp_path / "run"), [])
    assert all(torch.equal(value, source.weights[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "changes", "heads"),
    [
        ("vit_cifar10", VIT, ["head"]),
        ("detr_bccd", DETR, ["class_embed"]),
        ("detr_bccd", SELECTED, ["class_embed", "label_embed", "proposals.class_embed"]),
    ],
)
@pytest.mark.parametrize("labels", [["b", "a"], ["a", "b", "c"]], ids=["other order", "more"])
def test_other_labels_start_a_new_head(
    tmp_path: Path, name: str, changes: tuple[str, ...], heads: list[str], labels: list[str]
) -> None:
    source = saved(tmp_path / "run", name, ["a", "b"], *changes)
    recipe = load_recipe(name, changes)
    network = build_model(recipe.architecture, recipe.model, len(labels))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    start = load_initial_weights(network, recipe, labels, tmp_path / "run")
    assert {key.rpartition(".")[0] for key in start.fresh} == set(heads)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key] if key in start.fresh else source.weights[key])


def test_positions_are_interpolated(tmp_path: Path) -> None:
    source = saved(tmp_path / "run", "vit_cifar10", ["a", "b"], *VIT)
    recipe = load_recipe("vit_cifar10", [*VIT, "model.image_size=64"])
    network = build_model(recipe.architecture, recipe.model, 2)
    assert load_initial_weights(network, recipe, ["a", "b"], tmp_path / "run").fresh == []
    expected = interpolate_positions(source.weights["pos_embed.embedding"], (8, 8), (16, 16))
    assert torch.equal(network.pos_embed.embedding, expected)


def test_detector_takes_a_classifiers_backbone(tmp_path: Path) -> None:
    changes = ("model.layers=[1, 1]", "model.width=8", "model.image_size=32")
    source = saved(tmp_path / "run", "resnet_imagenette", ["a", "b"], *changes)
    recipe = load_recipe("detr_bccd", DETR)
    network = build_model(recipe.architecture, recipe.model, 3)
    start = load_initial_weights(network, recipe, ["x", "y", "z"], tmp_path / "run")
    assert not any(name.startswith("backbone.") for name in start.fresh)
    for key, value in network.backbone.state_dict().items():
        assert torch.equal(value, source.weights[f"backbone.{key}"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "vit_cifar10",
            ("model.embed_dim=24", *VIT[1:]),
            r"expected shape \(12, 3, 3, 3\) for vit_cifar10, found \(8,",
        ),
        ("vit_cifar10", (*VIT, "model.depth=3"), "blocks.2.*: expected shape .*, found none"),
        ("vit_cifar10", (*VIT, "model.depth=1"), "blocks.1.*: expected shape none for vit_cifar10, found"),
        ("mixer_cifar10", (), "a vit has no backbone that a mlp_mixer can use"),
    ],
)
def test_networks_that_do_not_fit(tmp_path: Path, name: str, changes: tuple[str, ...], message: str) -> None:
    saved(tmp_path / "run", "vit_cifar10", ["a", "b"], *VIT)
    recipe = load_recipe(name, changes)
    with pytest.raises(RecipeError, match=message):
        load_initial_weights(build_model(recipe.architecture, recipe.model, 2), recipe, ["a", "b"], tmp_path / "run")
