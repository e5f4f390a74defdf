"""A recipe: all that decides what a training run does, except the data."""

import importlib
import json
import pkgutil
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from bundle.errors import unknown
from bundle.manifest import ClassificationPreprocessing, Preprocessing, Task
from models.training import recipes
from models.training.errors import RecipeError

Positive = Annotated[int, Field(ge=1)]
Setting = int | float | str | bool | tuple[int, ...]


class Recipe(BaseModel):
    """What to train and how. Written in `models/training/recipes/`, changed by `key=value` on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    architecture: str
    model: dict[str, Setting] = {}  # settings of the architecture, without num_classes
    preprocessing: Preprocessing
    epochs: Positive
    batch_size: Positive
    lr: Annotated[float, Field(gt=0)]  # peak learning rate of AdamW
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0  # linear, then cosine to zero
    clip_grad: Annotated[float, Field(gt=0)] = 1.0  # largest gradient norm
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # classification only
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.04  # of train, where the data has no split "val"
    evaluate_every: Positive = 1  # epochs
    seed: int = 0

    @model_validator(mode="after")
    def _settings_exist(self) -> "Recipe":
        from models.build import ARCHITECTURES, setting_names  # imports torch

        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, found {self.architecture!r}")
        known = setting_names(self.architecture)
        for key in self.model:
            if key not in known:
                raise ValueError(unknown(f"model.{key}", [f"model.{name}" for name in known]))
        try:
            config = ARCHITECTURES[self.architecture][1]
            settings = TypeAdapter(config).validate_python({"num_classes": 1, **self.model})
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"model.{first['loc'][0]}: {first['msg']}, found {first['input']!r}") from error
        if isinstance(self.preprocessing, ClassificationPreprocessing):
            size = settings.image_size
            if self.preprocessing.input_size != (size if isinstance(size, tuple) else (size, size)):
                found = f"{size} and {self.preprocessing.input_size}"
                raise ValueError(f"model.image_size and preprocessing.input_size have to agree, found {found}")
        return self

    @property
    def task(self) -> Task:
        return self.preprocessing.task

    def changed_settings(self) -> dict[str, Any]:
        """What was changed on the command line: dotted keys and values that differ from the recipe as shipped."""
        shipped = _flat(load_recipe(self.name).model_dump(mode="json"))
        return {key: value for key, value in _flat(self.model_dump(mode="json")).items() if shipped.get(key) != value}


def recipe_names() -> list[str]:
    """The recipes that come with Vitrine."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by name, with `key=value` overrides; nested keys are dotted (`model.depth=4`), values are JSON or text.

    Raises:
        RecipeError: the recipe, a key or a value is unknown.
    """
    if name not in recipe_names():
        raise RecipeError(unknown(name, recipe_names()))
    base: Recipe = importlib.import_module(f"{recipes.__name__}.{name}").RECIPE
    document = base.model_dump(mode="json")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"{override!r}: expected key=value")
        _set(document, key, text, base)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # from a validator of the whole recipe, whose sentence is complete
            raise RecipeError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from error
        place = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{name}: {place}: {first['msg']}, found {first['input']!r}") from error


def _set(document: dict[str, Any], key: str, text: str, recipe: Recipe) -> None:
    from models.build import setting_names

    section, _, leaf = key.rpartition(".")
    names = {
        "": [field for field in Recipe.model_fields if field not in ("name", "model", "preprocessing")],
        "model": setting_names(recipe.architecture),
        "preprocessing": [field for field in type(recipe.preprocessing).model_fields if field != "task"],
    }
    if leaf not in names.get(section, []):
        known = [f"{part}.{name}".lstrip(".") for part, fields in names.items() for name in fields]
        raise RecipeError(unknown(key, known))
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    (document[section] if section else document)[leaf] = value


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        nested = value if isinstance(value, dict) else {"": value}
        flat.update({f"{key}.{leaf}".rstrip("."): item for leaf, item in nested.items()})
    return flat
