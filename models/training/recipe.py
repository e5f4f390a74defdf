"""A recipe: all that decides what a training run does, except the data and the weights that it starts from."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from vitrine.bundle.errors import unknown
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Task
from vitrine.models.training.augmentation.augment import ClassificationAugmentation, DetectionAugmentation

Positive = Annotated[int, Field(ge=1)]
Setting = int | float | str | bool | tuple[int, ...] | None
# Settings that change how long a run takes, not what comes out of it: they may differ when it is resumed.
_EXECUTION = ("cache", "workers")


class _Recipe(BaseModel):
    """What every task's recipe says. Written in `models/training/recipes/`, changed by `key=value`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    architecture: str
    model: dict[str, Setting] = {}  # settings of the architecture, without num_classes
    epochs: Positive
    batch_size: Positive  # images per step, of all processes and micro-batches together
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of hidden layers, beside AdamW
    lr: Annotated[float, Field(gt=0)]  # peak learning rate
    backbone_lr: Annotated[float, Field(gt=0)] | None = None  # peak of the backbone's; null: `lr`
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0  # linear, then cosine to zero
    clip_grad: Annotated[float, Field(gt=0)] = 1.0  # largest gradient norm
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay per step of the averaged weights that are kept; 0: none
    trainable: Literal["all", "head"] = "all"  # "head": a linear probe
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward pass (autocast)
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the training images, alike for every class
    # Part of train that progress is watched with; null: the split "val" if there is one, else 4 %.
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    evaluate_every: Positive = 1  # epochs
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    deterministic: bool = False  # only kernels that repeat to the last bit, on a GPU too
    accumulate: Positive = 1  # micro-batches per step and process
    compile: bool = False  # torch.compile
    cache: Literal["auto", "memory", "disk"] = "auto"  # where images wait; auto: in memory if they take 2 GiB or less
    workers: Annotated[int, Field(ge=0)] = 4  # processes that decode images from disk

    @model_validator(mode="after")
    def _settings_exist(self) -> "_Recipe":
        from vitrine.models.build import ARCHITECTURES, setting_names  # imports torch

        assert isinstance(self, ClassificationRecipe | DetectionRecipe)
        names = [name for name in ARCHITECTURES if (name == "detr") == (self.task is Task.DETECTION)]
        if self.architecture not in names:
            raise ValueError(f"architecture: expected {' or '.join(names)}, found {self.architecture!r}")
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
        if isinstance(self, ClassificationRecipe):
            size = settings.image_size
            if self.preprocessing.input_size != (size if isinstance(size, tuple) else (size, size)):
                found = f"{size} and {self.preprocessing.input_size}"
                raise ValueError(f"model.image_size and preprocessing.input_size have to agree, found {found}")
        return self

    def differences(self, other: "Recipe") -> list[str]:
        """What another recipe says that would change this one's run: "key: expected ..., found ..."."""
        ours, theirs = (_flat(recipe.model_dump(mode="json", exclude=set(_EXECUTION))) for recipe in (self, other))
        return [
            f"{key}: expected {ours.get(key)}, found {theirs.get(key)}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]


class ClassificationRecipe(_Recipe):
    """A recipe for image classification."""

    preprocessing: ClassificationPreprocessing
    augmentation: ClassificationAugmentation = ClassificationAugmentation()
    loss: Literal["softmax", "sigmoid"] = "softmax"  # cross entropy over the classes, or for each class on its own
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def task(self) -> Task:
        return Task.CLASSIFICATION


class DetectionRecipe(_Recipe):
    """A recipe for object detection."""

    preprocessing: DetectionPreprocessing
    augmentation: DetectionAugmentation = DetectionAugmentation()
    eos_coef: Annotated[float, Field(gt=0)] = 0.1  # weight of "no object" in the class loss

    @property
    def task(self) -> Task:
        return Task.DETECTION


Recipe = ClassificationRecipe | DetectionRecipe


def read_recipe(document: dict[str, Any]) -> Recipe:
    """A recipe of its JSON values.

    Raises:
        pydantic.ValidationError: it is none.
    """
    preprocessing = document.get("preprocessing")
    detection = isinstance(preprocessing, dict) and preprocessing.get("task") == Task.DETECTION
    return (DetectionRecipe if detection else ClassificationRecipe).model_validate(document)


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        nested = value if isinstance(value, dict) else {"": value}
        flat.update({f"{key}.{leaf}".rstrip("."): item for leaf, item in nested.items()})
    return flat
