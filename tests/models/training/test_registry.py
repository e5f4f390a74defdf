"""Shipped recipes and command-line overrides."""

from pathlib import Path

import pytest
import torch

from vitrine.models.build import build_model
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.recipe import ClassificationRecipe, DetectionRecipe, Recipe, read_recipe
from vitrine.models.training.registry import load_recipe, pretrained_weights, recipe_name, recipe_names

CLASSIFIER = load_recipe("vit_cifar10")
DETECTOR = load_recipe("detr_bccd")
FROM_A_RUN = ("finetune", "last_stages", "linear_probe", "photos")


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
    if name == "last_stages" and start is CLASSIFIER:
        with pytest.raises(RecipeError, match="last_stage needs an efficientnet, resnet or detr, found vit"):
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


def test_recipe_of_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: vit_cifar10\nepochs: 3\nmodel:\n  depth: 2\naugmentation:\n  scale: [0.5, 1.0]\n")
    recipe = load_recipe(str(file), ["epochs=5"])
    assert (recipe.epochs, recipe.model["depth"]) == (5, 2)  # the command line comes last
    assert recipe.augmentation.scale == (0.5, 1.0)
    assert recipe_name(str(file)) == "mine"


def test_recipe_of_a_python_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from vitrine.models.training.recipes.vit_cifar10 import RECIPE as BASE\nRECIPE = BASE.derive(epochs=2)\n"
    )
    assert load_recipe(str(file)).epochs == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "epochs: 3", "recipe: expected the name of the recipe that it changes, found None"),
        ("a.yaml", "- 3", "recipe: expected the name of the recipe that it changes, found None"),
        ("a.yaml", "recipe: b.yaml", "recipe: expected the name of the recipe that it changes, found 'b.yaml'"),
        ("a.yaml", "recipe: [", "cannot be read as a recipe: ParserError"),
        ("a.yaml", "recipe: vit_cifar10\nepoch: 3", "epoch"),
        ("a.yml", "recipe: vit_cifar1", "vit_cifar10"),
        ("a.py", "1 / 0", "cannot be read as a recipe: ZeroDivisionError"),
        ("a.py", "x = 1", r"expected RECIPE or recipe\(start\), found neither"),
    ],
)
def test_recipe_file_that_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / name))


def test_missing_recipe_file() -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read as a recipe: FileNotFoundError"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize(
    ("recipe", "changes", "expected"),
    [
        ("photos", [], "efficientnet-lite0"),
        ("photos", ["pretrained=efficientnet-lite2"], "efficientnet-lite2"),
        ("photos", ["pretrained=null"], None),
        ("objects", [], "efficientnet-lite0"),
        ("objects", ["model.backbone=efficientnet_lite1"], "efficientnet-lite1"),
        ("objects", ["model.backbone=resnet18"], "resnet18"),
        ("objects", ["model.backbone=resnet18", "pretrained=null"], None),
        ("vit_cifar10", [], None),
        ("finetune", [], None),
    ],
)
def test_pretrained_weights_of_a_recipe(recipe: str, changes: list[str], expected: str | None) -> None:
    assert pretrained_weights(recipe, changes) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("views=2", "views=2 needs a frozen part, found trainable=all"),
        ("trainable=last_stage", "trainable=last_stage needs an efficientnet, resnet or detr, found vit"),
        ("trainable=all_but_backbone", "trainable=all_but_backbone is for detectors"),
    ],
)
def test_what_is_frozen_fits_the_network(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("vit_cifar10", [change])


def test_views_are_not_mixed() -> None:
    changes = ["trainable=head", "views=2", "augmentation.mixup=0.2"]
    with pytest.raises(RecipeError, match="views=2: expected no mixing of images"):
        load_recipe("vit_cifar10", changes)
