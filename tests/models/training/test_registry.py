"""Shipped recipes and command-line overrides."""

import pytest
import torch

from vitrine.models.build import build_model
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.recipe import ClassificationRecipe, DetectionRecipe, Recipe, read_recipe
from vitrine.models.training.registry import load_recipe, recipe_names

CLASSIFIER = load_recipe("vit_cifar10")
DETECTOR = load_recipe("detr_bccd")
FROM_A_RUN = ("finetune", "linear_probe")


def run_of(recipe: Recipe) -> Checkpoint:
    document = recipe.model_dump(mode="json")
    return Checkpoint(
        recipe.architecture,
        document["model"],
        document["preprocessing"],
        labels=["cat", "dog"],
        weights=dict[str, torch.Tensor](),
    )


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("start", [CLASSIFIER, DETECTOR], ids=["classifier", "detector"])
def test_shipped_recipe(name: str, start: Recipe) -> None:
    if name in ("linear_probe", "photos") and start is DETECTOR:
        with pytest.raises(RecipeError, match="expected a run that classifies, found a detr"):
            load_recipe(name, [], run_of(start))
        return
    recipe = load_recipe(name, [], run_of(start))
    assert recipe.name == name
    assert read_recipe(recipe.model_dump(mode="json")) == recipe
    assert isinstance(recipe, ClassificationRecipe if recipe.architecture != "detr" else DetectionRecipe)
    if name in FROM_A_RUN:
        assert (recipe.architecture, recipe.model) == (start.architecture, start.model)
        assert recipe.preprocessing == start.preprocessing
    build_model(recipe.architecture, recipe.model, 3)


@pytest.mark.parametrize("name", FROM_A_RUN)
def test_recipe_that_needs_a_run(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: expected --from RUN, the run to start from, found none"):
        load_recipe(name)


def test_overrides() -> None:
    changes = ["epochs=3", "lr=1e-4", "model.depth=2", "model.stem=patch", "preprocessing.crop_pct=0.9"]
    recipe = load_recipe("vit_cifar10", [*changes, "augmentation.flip=0"])
    assert (recipe.epochs, recipe.lr, recipe.model["depth"], recipe.model["stem"]) == (3, 1e-4, 2, "patch")
    assert recipe.preprocessing.crop_pct == 0.9
    assert recipe.augmentation.flip == 0
    assert load_recipe("vit_cifar10") == CLASSIFIER  # the shipped one is as it was


def test_setting_that_the_recipe_leaves_at_its_default() -> None:
    assert load_recipe("vit_cifar10", ["model.drop_path=0.1"]).model["drop_path"] == 0.1
    assert load_recipe("vit_cifar10", ["model.representation_size=null"]).model["representation_size"] is None


def test_input_size_follows_image_size() -> None:
    assert load_recipe("vit_cifar10", ["model.image_size=64"]).preprocessing.input_size == (64, 64)


def test_last_override_wins() -> None:
    assert load_recipe("vit_cifar10", ["epochs=3", "epochs=5"]).epochs == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "unknown 'epoch': did you mean 'epochs'"),
        ("learning_rate=3", "unknown 'learning_rate': did you mean"),
        ("model.dept=3", "unknown 'model.dept': did you mean 'model.depth'"),
        ("model.num_classes=3", "unknown 'model.num_classes': did you mean"),
        ("preprocessing.crop=1", "unknown 'preprocessing.crop': did you mean 'preprocessing.crop_"),
        ("preprocessing.task=object-detection", "unknown 'preprocessing.task'"),
        ("name=other", "unknown 'name'"),
        ("model={}", "unknown 'model'"),
        ("epochs", "'epochs': expected key=value"),
        ("epochs=0", "vit_cifar10: epochs: Input should be greater than or equal to 1, found 0"),
        ("epochs=many", "vit_cifar10: epochs: .*found 'many'"),
        ("epochs=", "vit_cifar10: epochs: .*found ''"),
        ("lr=-1", "vit_cifar10: lr: Input should be greater than 0, found -1"),
        ("lr=NaN", "vit_cifar10: lr: Input should be a finite number"),
        ("lr=Infinity", "vit_cifar10: lr: Input should be a finite number"),
        ("seed=9223372036854775808", "vit_cifar10: seed: "),
        ("label_smoothing=1", "label_smoothing: Input should be less than 1"),
        ("model.depth=null", "vit_cifar10: model.depth"),
        ("architecture=resnetv2", "unknown 'architecture'"),
        ("eos_coef=1", "unknown 'eos_coef'"),
        ("augmentation.flips=1", "unknown 'augmentation.flips': did you mean 'augmentation.flip'"),
        ("augmentation.flip=2", "vit_cifar10: augmentation.flip: .*found 2"),
        ("seed=-1", "vit_cifar10: seed: "),
        ("ema=1", "vit_cifar10: ema: "),
        ("model.depth=deep", "model.depth: .*found 'deep'"),
        ("model.stem=foo", "model.stem: Input should be 'patch' or 'conv', found 'foo'"),
        ("preprocessing.input_size=[16, 16]", "model.image_size and preprocessing.input_size have to agree"),
        ("preprocessing.crop_pct=2", "crop_pct: Input should be less than or equal to 1, found 2"),
    ],
)
def test_refused_override(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("vit_cifar10", [override])


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="unknown 'vit_cifar': did you mean 'vit_cifar10'"):
        load_recipe("vit_cifar")
