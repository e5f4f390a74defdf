"""Fine-tune the last stage of a run's backbone, and all behind it: what `--finetune` does after a recipe.

    vitrine train photos --data DATA --finetune
    vitrine train last_stage --from runs/photos --data DATA

Data: that of the run. The features before the last stage are computed once; layers nearer to the image learn more
slowly. The weights of the best epoch are kept, or those of the run if none is better. The augmentation is that of
`photos` or `detr_voc`.
"""

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.recipe import ClassificationRecipe, DetectionRecipe, Recipe
from vitrine.models.training.recipes.detr_voc import RECIPE as VOC
from vitrine.models.training.recipes.photos import AUGMENTATION


def recipe(start: Checkpoint) -> Recipe:
    """Return the recipe for a run's network."""
    preprocessing = start.read_preprocessing()
    if isinstance(preprocessing, ClassificationPreprocessing):
        return ClassificationRecipe(
            name="last_stage",
            architecture=start.architecture,
            model=start.settings,
            preprocessing=preprocessing,
            augmentation=AUGMENTATION,
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
        augmentation=VOC.augmentation,
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
