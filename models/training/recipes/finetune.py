"""Fine-tune all weights of a trained or imported run, with other labels or at another resolution.

    vitrine import vit_base_patch16_224.safetensors --out runs/vit-b
    vitrine train finetune --from runs/vit-b --data DATA
    vitrine train finetune --from runs/vit-b --data DATA model.image_size=384

Data: of the run's task. The head for other labels is new; a ViT's position embeddings are interpolated.
"""

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.models.training.augmentation.augment import ClassificationAugmentation
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.recipe import ClassificationRecipe, DetectionRecipe, Recipe


def recipe(start: Checkpoint) -> Recipe:
    """Return the recipe for a run's network."""
    preprocessing = start.read_preprocessing()
    if isinstance(preprocessing, ClassificationPreprocessing):
        return ClassificationRecipe(
            name="finetune",
            architecture=start.architecture,
            model=start.settings,
            preprocessing=preprocessing,
            augmentation=ClassificationAugmentation(crop="resized", scale=(0.35, 1.0), flip=0.5),
            epochs=10,
            batch_size=32,
            lr=5e-5,
            label_smoothing=0.1,
            ema=0.998,
        )
    return DetectionRecipe(
        name="finetune",
        architecture=start.architecture,
        model=start.settings,
        preprocessing=preprocessing,
        epochs=30,
        batch_size=4,
        lr=1e-4,
        backbone_lr=1e-5,
        weight_decay=1e-4,
        clip_grad=0.1,
        evaluate_every=2,
    )
