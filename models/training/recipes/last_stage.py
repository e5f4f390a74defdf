"""Fine-tune the last stage of a run's backbone, and all behind it: what `--finetune` does after a recipe.

    vitrine train photos --data DATA --finetune
    vitrine train last_stage --from runs/photos --data DATA

Data: that of the run. The features before the last stage are computed once; layers nearer to the image learn more
slowly. The weights of the best epoch are kept, or those of the run if none is better.
"""

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.models.training.augmentation.augment import ClassificationAugmentation, DetectionAugmentation
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.recipe import ClassificationRecipe, DetectionRecipe, Recipe


def recipe(start: Checkpoint) -> Recipe:
    """Return the recipe for a run's network."""
    preprocessing = start.read_preprocessing()
    if isinstance(preprocessing, ClassificationPreprocessing):
        return ClassificationRecipe(
            name="last_stage",
            architecture=start.architecture,
            model=start.settings,
            preprocessing=preprocessing,
            augmentation=ClassificationAugmentation(
                crop="resized", scale=(0.4, 1.0), flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2
            ),
            trainable="last_stage",
            layer_decay=0.8,
            views=4,
            epochs=8,
            keep="best",
            batch_size=32,
            lr=3e-4,
            weight_decay=0.02,
            label_smoothing=0.1,
            class_weights="auto",
        )
    return DetectionRecipe(
        name="last_stage",
        architecture=start.architecture,
        model=start.settings,
        preprocessing=preprocessing,
        augmentation=DetectionAugmentation(
            flip=0.5, zoom=(0.7, 1.7), brightness=0.2, contrast=0.2, saturation=0.2, feature_paste=0.4
        ),
        trainable="last_stage",
        layer_decay=0.9,
        views=4,
        epochs=10,
        keep="best",
        batch_size=16,
        optimizer="muon",
        lr=4e-4,
        weight_decay=0.02,
        clip_grad=0.5,
        ema=0.999,
    )
