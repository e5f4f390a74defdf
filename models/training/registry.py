"""Load recipes by name, with `KEY=VALUE` overrides."""

import importlib
import json
import pkgutil
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from vitrine.bundle.errors import unknown
from vitrine.models.training import recipes
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.recipe import Recipe, read_recipe


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with Vitrine."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def load_recipe(name: str, overrides: Iterable[str] = (), start: Checkpoint | None = None) -> Recipe:
    """Load a recipe by name; keys of overrides are dotted (`model.depth=4`), values are JSON or text.

    Args:
        name: a module of `models/training/recipes/` with a `RECIPE`, or `recipe(start)` for a run's network.
        overrides: `key=value`.
        start: checkpoint of the run to start from.

    Raises:
        RecipeError: the recipe, a key or a value is invalid, or the recipe needs a run to start from.
    """
    if name not in recipe_names():
        raise RecipeError(unknown(name, recipe_names()))
    module = importlib.import_module(f"{recipes.__name__}.{name}")
    base: Recipe
    if hasattr(module, "RECIPE"):
        base = module.RECIPE
    elif start is not None:
        base = module.recipe(start)
    else:
        raise RecipeError(f"{name}: expected --from RUN, the run to start from, found none")
    document = base.model_dump(mode="json")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"{override!r}: expected key=value")
        _set(document, key, text, base)
    size = document["model"].get("image_size")
    if isinstance(size, int) and not any(override.startswith("preprocessing.input_size=") for override in overrides):
        document["preprocessing"]["input_size"] = [size, size]
    try:
        return read_recipe(document)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # from a validator of the whole recipe, whose message is complete
            raise RecipeError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from error
        place = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{name}: {place}: {first['msg']}, found {first['input']!r}") from error


def _set(document: dict[str, Any], key: str, text: str, recipe: Recipe) -> None:
    from vitrine.models.build import setting_names

    section, _, leaf = key.rpartition(".")
    sections = ("model", "preprocessing", "augmentation")
    names = {
        "": [name for name in type(recipe).model_fields if name not in ("name", "architecture", *sections)],
        "model": setting_names(recipe.architecture),
        "preprocessing": [name for name in type(recipe.preprocessing).model_fields if name != "task"],
        "augmentation": list(type(recipe.augmentation).model_fields),
    }
    if leaf not in names.get(section, []):
        known = [f"{part}.{name}".lstrip(".") for part, fields in names.items() for name in fields]
        raise RecipeError(unknown(key, known))
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    (document[section] if section else document)[leaf] = value
