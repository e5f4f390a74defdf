"""Your own photographs: a new head on the frozen features of a pretrained ConvNet, in about two minutes.

    vitrine train photos --data DATA
    vitrine train photos --data DATA model.head=vit
    vitrine train photos --data DATA pretrained=efficientnet-lite2
    vitrine train photos --data DATA --finetune

Data: DATA/<label>/*.jpg, or any other layout of labelled images; validation on `val` if there is one, else on a part of
`train`.
Each photograph is shown in two views, whose features are computed once. The weights of the best epoch are kept.
"""

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.models.training.augmentation.augment import ClassificationAugmentation
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.recipe import ClassificationRecipe, Recipe

PRETRAINED = "efficientnet-lite0"
AUGMENTATION = ClassificationAugmentation(
    crop="resized", scale=(0.4, 1.0), flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2
)


def recipe(start: Checkpoint) -> Recipe:
    """Return the recipe for a run's network.

    Raises:
        RecipeError: it is a detector.
    """
    preprocessing = start.read_preprocessing()
    if not isinstance(preprocessing, ClassificationPreprocessing):
        raise RecipeError(f"photos: expected a run that classifies, found a {start.architecture}; use objects")
    return ClassificationRecipe(
        name="photos",
        architecture=start.architecture,
        model=start.settings,
        preprocessing=preprocessing,
        augmentation=AUGMENTATION,
        pretrained=PRETRAINED,
        trainable="head",
        views=2,
        epochs=60,
        patience=15,
        keep="best",
        batch_size=64,
        lr=2e-3,
        weight_decay=0.02,
        label_smoothing=0.1,
        class_weights="auto",
    )
