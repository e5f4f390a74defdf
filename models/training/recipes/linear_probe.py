"""A linear probe: a new head on the frozen features of a trained or imported run.

    vitrine import vit_base_patch16_224.safetensors --out runs/vit-b
    vitrine train linear_probe --from runs/vit-b --data DATA

Data: labelled images. Everything but the head is frozen, including batch norm statistics; the features of four views of
each image are computed once.
"""

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.models.training.augmentation.augment import ClassificationAugmentation
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.recipe import ClassificationRecipe, Recipe


def recipe(start: Checkpoint) -> Recipe:
    """Return the recipe for a run's network.

    Raises:
        RecipeError: it is a detector.
    """
    preprocessing = start.read_preprocessing()
    if not isinstance(preprocessing, ClassificationPreprocessing):
        raise RecipeError(f"linear_probe: expected a run that classifies, found a {start.architecture}; use finetune")
    return ClassificationRecipe(
        name="linear_probe",
        architecture=start.architecture,
        model=start.settings,
        preprocessing=preprocessing,
        augmentation=ClassificationAugmentation(crop="resized", scale=(0.5, 1.0), flip=0.5),
        trainable="head",
        views=4,
        epochs=10,
        batch_size=64,
        lr=1e-3,
        weight_decay=1e-4,
    )
