"""Load recipes by name or from a file, with `KEY=VALUE` overrides."""

import importlib.util
import json
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from pydantic import ValidationError

from vitrine.bundle.errors import unknown
from vitrine.models.training import recipes
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.recipe import Recipe, flatten, read_recipe

_SETTINGS_SUFFIXES = (".yaml", ".yml")


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with Vitrine."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def describe_recipes() -> dict[str, str]:
    """Return the first line of each recipe's description, by name."""
    modules = {name: importlib.import_module(f"{recipes.__name__}.{name}") for name in recipe_names()}
    return {name: (module.__doc__ or "").partition("\n")[0] for name, module in modules.items()}


def recipe_description(recipe: str) -> str:
    """Return the whole description of a recipe.

    Raises:
        RecipeError: there is no such recipe.
    """
    return (_source(recipe)[0].__doc__ or "").strip()


def needs_start(recipe: str) -> bool:
    """Return whether a recipe's settings depend on the run to start from.

    Raises:
        RecipeError: there is no such recipe.
    """
    return not hasattr(_source(recipe)[0], "RECIPE")


def recipe_name(recipe: str) -> str:
    """Return the name of a recipe, or of the file that has it, for folders."""
    return Path(recipe).stem if _is_file(recipe) else recipe


def pretrained_weights(recipe: str, overrides: Iterable[str] = ()) -> str | None:
    """Return the name of the published weights that a recipe starts from without `--from`; None for random weights.

    They follow `model.backbone` unless `pretrained` is set, too.

    Raises:
        RecipeError: there is no such recipe.
    """
    module, settings = _source(recipe)
    base = getattr(module, "RECIPE", None)
    name: str | None = getattr(module, "PRETRAINED", None) if base is None else base.pretrained
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()] + list(overrides)
    chosen = dict(change.split("=", 1) for change in changes if "=" in change)
    if "pretrained" in chosen:
        return None if chosen["pretrained"] == "null" else chosen["pretrained"].strip('"')
    if name is not None and "model.backbone" in chosen:
        return chosen["model.backbone"].strip('"').replace("_", "-")
    return name


def load_recipe(name: str, overrides: Iterable[str] = (), start: Checkpoint | None = None) -> Recipe:
    """Load a recipe by name; keys of overrides are dotted (`model.depth=4`), values are JSON or text.

    Args:
        name: a module of `models/training/recipes/` with a `RECIPE`, or `recipe(start)` for a run's network; or a file:
            such a module (`.py`), or settings (`.yaml`) with the name of the recipe that they change as `recipe`.
        overrides: `key=value`.
        start: checkpoint of the run to start from.

    Raises:
        RecipeError: the recipe, a key or a value is invalid, or the recipe needs a run to start from.
    """
    module, settings = _source(name)
    base: Recipe
    if hasattr(module, "RECIPE"):
        base = module.RECIPE
    elif start is not None:
        base = _checked(name, lambda: module.recipe(start))
    else:
        raise RecipeError(f"{name}: expected --from RUN, the run to start from, found none")
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()] + list(overrides)
    document = base.model_dump(mode="json")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"{override!r}: expected key=value")
        _set(document, key, text, base)
    size = document["model"].get("image_size")
    if isinstance(size, int) and not any(override.startswith("preprocessing.input_size=") for override in overrides):
        document["preprocessing"]["input_size"] = [size, size]
    return _checked(name, lambda: read_recipe(document))


def _checked(name: str, make: Callable[[], Recipe]) -> Recipe:
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # from a validator of the whole recipe, whose message is complete
            raise RecipeError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from error
        place = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{name}: {place}: {first['msg']}, found {first['input']!r}") from error


def _is_file(recipe: str) -> bool:
    return Path(recipe).suffix in (".py", *_SETTINGS_SUFFIXES)


def _source(recipe: str) -> tuple[ModuleType, dict[str, Any]]:
    """Return the module of a recipe, and the settings that a file changes."""
    if not _is_file(recipe):
        if recipe not in recipe_names():
            raise RecipeError(f"{unknown(recipe, recipe_names())}; or a .py or .yaml file")
        return importlib.import_module(f"{recipes.__name__}.{recipe}"), {}
    path = Path(recipe)
    try:
        if path.suffix in _SETTINGS_SUFFIXES:
            document = yaml.safe_load(path.read_text())
            base = document.pop("recipe", None) if isinstance(document, dict) else None
            if not isinstance(base, str) or _is_file(base):
                raise RecipeError(f"{path}: recipe: expected the name of the recipe that it changes, found {base!r}")
            return _source(base)[0], flatten(document)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except RecipeError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise RecipeError(f"{path}: cannot be read as a recipe: {type(error).__name__}: {error}") from error
    if not hasattr(module, "RECIPE") and not hasattr(module, "recipe"):
        raise RecipeError(f"{path}: expected RECIPE or recipe(start), found neither")
    return module, {}


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
