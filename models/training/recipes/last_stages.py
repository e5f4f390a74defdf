"""Fine-tune the last stages of a run's backbone, and all behind them: what `--finetune` does after a recipe.

    vitrine train photos --data DATA --finetune
    vitrine train last_stages --from runs/photos --data DATA

Data: that of the run. One stage of a classifier, two of a detector, whose boxes need finer maps. The features before
them are computed once; layers nearer to the image learn more slowly. The weights of the best epoch are kept, or those
of the run if none is better: on the images that the run held out. The augmentation is that of `photos` or `detr_voc`.
"""

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.models.training.checkpoint import Checkpoint
from vitrine.models.training.recipe import ClassificationRecipe, DetectionRecipe, Recipe
from vitrine.models.training.recipes.detr_voc import RECIPE as VOC
from vitrine.models.training.recipes.photos import AUGMENTATION


def recipe(start: Checkpoint) -> Recipe:
    """Return the recipe for a run's network."""
    preprocessing = start.read_preprocessing()
    trained = None if start.progress is None else start.progress.read_recipe()
    held_out, fraction, seed = (trained.held_out, trained.train_fraction, trained.seed) if trained else (None, 1.0, 0)
    edges = trained.training_edges if isinstance(trained, DetectionRecipe) else None
    if isinstance(preprocessing, ClassificationPreprocessing):
        return ClassificationRecipe(
            name="last_stages",
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
            held_out=held_out,
            train_fraction=fraction,
            seed=seed,
        )
    return DetectionRecipe(
        name="last_stages",
        architecture=start.architecture,
        model=start.settings,
        preprocessing=preprocessing,
        augmentation=VOC.augmentation,
        training_edges=edges,
        trainable="last_two_stages",
        layer_decay=0.95,
        views=8,
        epochs=20,
        keep="best",
        batch_size=24,
        optimizer="muon",
        lr=5e-4,
        weight_decay=0.02,
        clip_grad=0.5,
        ema=0.999,
        held_out=held_out,
        train_fraction=fraction,
        seed=seed,
    )
