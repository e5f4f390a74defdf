import pytest

from models.build import build_model
from models.training.errors import RecipeError
from models.training.recipe import Recipe, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.changed_settings() == {}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    build_model(recipe.architecture, recipe.model, 3)


def test_overrides() -> None:
    changes = ["epochs=3", "lr=1e-4", "model.depth=2", "model.stem=patch", "preprocessing.crop_pct=0.9"]
    recipe = load_recipe("vit_cifar10", changes)
    assert (recipe.epochs, recipe.lr, recipe.model["depth"], recipe.model["stem"]) == (3, 1e-4, 2, "patch")
    assert recipe.preprocessing.model_dump()["crop_pct"] == 0.9
    assert recipe.changed_settings() == {
        "epochs": 3,
        "lr": 1e-4,
        "model.depth": 2,
        "model.stem": "patch",
        "preprocessing.crop_pct": 0.9,
    }
    assert load_recipe("vit_cifar10").changed_settings() == {}  # the shipped one is as it was


def test_setting_that_the_recipe_leaves_at_its_default() -> None:
    recipe = load_recipe("vit_cifar10", ["model.drop_path=0.1"])
    assert recipe.model["drop_path"] == 0.1
    assert recipe.changed_settings() == {"model.drop_path": 0.1}


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
        ("lr=NaN", "vit_cifar10: lr: Input should be greater than 0"),
        ("label_smoothing=1", "label_smoothing: Input should be less than 1"),
        ("model.depth=null", "vit_cifar10: model.depth"),
        ("architecture=resnet", "architecture: expected one of vit, mlp_mixer, resnetv2, detr, found 'resnet'"),
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
