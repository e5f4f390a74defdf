"""Recipes: all settings of a training run except its data and initial weights."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from vitrine.bundle.errors import unknown
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Task
from vitrine.models.training.augmentation.augment import ClassificationAugmentation, DetectionAugmentation

Positive = Annotated[int, Field(ge=1)]
Setting = int | float | str | bool | tuple[int, ...] | None
# Settings that affect the speed of a run but not its result: they may change on resume.
_EXECUTION = {"cache", "workers", "features"}


class _Recipe(BaseModel):
    """Settings of every task. Recipes are defined in `models/training/recipes/` and overridden by `key=value`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    architecture: str
    model: dict[str, Setting] = {}  # of the architecture, without num_classes
    epochs: Positive
    batch_size: Positive  # images per step, over all processes and micro-batches
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for hidden matrices, with AdamW for the rest
    lr: Annotated[float, Field(gt=0)]  # peak learning rate
    backbone_lr: Annotated[float, Field(gt=0)] | None = None  # peak for the backbone; null: `lr`
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0  # linear, then cosine to zero
    clip_grad: Annotated[float, Field(gt=0)] = 1.0  # largest gradient norm
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay per step of the moving average that is saved; 0: off
    # "head": a linear probe; "all_but_backbone": of a detector; "last_stage", "last_two_stages": those of the backbone
    # (an EfficientNet or ResNet), and all behind them. Unless it is "all", a backbone keeps its batch norm statistics.
    trainable: Literal["all", "last_two_stages", "last_stage", "all_but_backbone", "head"] = "all"
    # Learning rate of a layer (a block, or what is not in one) over that of the next one (Bao et al. 2022, "BEiT").
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Name of `vitrine import --list` whose weights the network starts from, without --from; null: random ones.
    pretrained: str | None = None
    # The features of the frozen part are computed once, for so many augmented views of each image; 0: in each epoch.
    views: Annotated[int, Field(ge=0)] = 0
    features: str | None = None  # folder for them, to share by runs; null: in the run's, removed when it is finished
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward pass (autocast)
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the training images, stratified by class
    # Fraction of train to validate on; null: the split "val" if there is one, else 4 %, at least 300 images or a fifth.
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    evaluate_every: Positive = 1  # epochs
    patience: Positive | None = None  # epochs after the best one until training stops early; null: never
    keep: Literal["last", "best"] = "last"  # weights of the last epoch, or of the best on the validation images
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    deterministic: bool = False  # only bitwise reproducible kernels, also on a GPU
    accumulate: Positive = 1  # micro-batches per step and process
    compile: bool = False  # torch.compile
    cache: Literal["auto", "memory", "disk"] = "auto"  # of decoded images; auto: memory up to 2 GiB
    workers: Annotated[int, Field(ge=0)] = 4  # processes that decode images, without memory cache

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
        if self.views and self.trainable == "all":
            raise ValueError(f"views={self.views} needs a frozen part, found trainable=all")
        if self.backbone_stages and self.architecture not in ("efficientnet", "resnet", "detr"):
            raise ValueError(
                f"trainable={self.trainable} needs an efficientnet, resnet or detr, found {self.architecture}"
            )
        if self.trainable == "all_but_backbone" and self.task is not Task.DETECTION:
            raise ValueError("trainable=all_but_backbone is for detectors, trainable=head for classifiers")
        if self.views and self.task is Task.DETECTION and self.trainable == "head":
            expected = "all_but_backbone, last_stage or last_two_stages"
            raise ValueError(f"views={self.views}: expected trainable={expected}, found head")
        if self.views and self.augmentation.group > 1:
            raise ValueError(f"views={self.views}: expected no mixing of images (mixup, cutmix, mosaic), found some")
        if isinstance(self, ClassificationRecipe):
            size = settings.image_size
            if self.preprocessing.input_size != (size if isinstance(size, tuple) else (size, size)):
                found = f"{size} and {self.preprocessing.input_size}"
                raise ValueError(f"model.image_size and preprocessing.input_size have to agree, found {found}")
        return self

    @property
    def backbone_stages(self) -> int:
        """How many of a backbone's last stages are trained, while those before them are frozen."""
        return {"last_stage": 1, "last_two_stages": 2}.get(self.trainable, 0)

    def derive(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, validated."""
        return type(self).model_validate({**self.model_dump(), **changes})

    def differences(self, other: "Recipe") -> list[str]:
        """List the differences that affect the result: "key: expected ..., found ..."."""
        expected, found = (flatten(recipe.model_dump(mode="json", exclude=_EXECUTION)) for recipe in (self, other))
        return [
            f"{key}: expected {expected.get(key)}, found {found.get(key)}"
            for key in sorted({*expected, *found})
            if expected.get(key) != found.get(key)
        ]


class ClassificationRecipe(_Recipe):
    """A recipe for image classification."""

    preprocessing: ClassificationPreprocessing  # in training, evaluation and service
    augmentation: ClassificationAugmentation = ClassificationAugmentation()
    loss: Literal["softmax", "sigmoid"] = "softmax"  # softmax cross entropy, or binary cross entropy per class
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # "balanced": the loss of an image is divided by the frequency of its class; "auto": if `data check` would warn that
    # the classes are unbalanced.
    class_weights: Literal["none", "balanced", "auto"] = "none"

    @property
    def task(self) -> Task:
        return Task.CLASSIFICATION

    @property
    def training_preprocessing(self) -> ClassificationPreprocessing:
        """The preprocessing of training images."""
        return self.preprocessing


class DetectionRecipe(_Recipe):
    """A recipe for object detection."""

    preprocessing: DetectionPreprocessing  # in evaluation and service
    # Shortest and longest edge in training, if they differ: smaller images train faster, and random zoom shows objects
    # larger there than they are in evaluation (Touvron et al. 2019, "Fixing the train-test resolution discrepancy").
    training_edges: tuple[Positive, Positive] | None = None
    augmentation: DetectionAugmentation = DetectionAugmentation()
    eos_coef: Annotated[float, Field(gt=0)] = 0.1  # weight of "no object" in the class loss

    @property
    def task(self) -> Task:
        return Task.DETECTION

    @property
    def training_preprocessing(self) -> DetectionPreprocessing:
        """The preprocessing of training images."""
        if self.training_edges is None:
            return self.preprocessing
        shortest, longest = self.training_edges
        return self.preprocessing.model_copy(update={"shortest_edge": shortest, "longest_edge": longest})


Recipe = ClassificationRecipe | DetectionRecipe


def read_recipe(document: dict[str, Any]) -> Recipe:
    """Parse a recipe from its JSON values.

    Raises:
        pydantic.ValidationError: it is invalid.
    """
    preprocessing = document.get("preprocessing")
    detection = isinstance(preprocessing, dict) and preprocessing.get("task") == Task.DETECTION
    return (DetectionRecipe if detection else ClassificationRecipe).model_validate(document)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to the keys of `vitrine train`: {"model.depth": 6}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
