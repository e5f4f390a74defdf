"""A half-width ResNet of three stages on Imagenette: a pretrained backbone for `detr_bccd`.

    vitrine train resnet_imagenette --data DATA/imagenette144
    vitrine train detr_bccd --data DATA/bccd --from runs/resnet_imagenette

Data: 144 x 144 pixels, 10 classes, 9,469 images to train on; validation on `val` (3,925).
Time: 11 minutes on one core of a shared two-core AVX2 machine that other programs used as well.
Result: 70.2 % top-1 on `val`.
"""

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.models.training.augmentation.augment import ClassificationAugmentation
from vitrine.models.training.recipe import ClassificationRecipe

RECIPE = ClassificationRecipe(
    name="resnet_imagenette",
    architecture="resnet",
    model={"image_size": 112, "layers": (2, 2, 2), "width": 32, "norm": "batch"},
    preprocessing=ClassificationPreprocessing(
        input_size=(112, 112), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    augmentation=ClassificationAugmentation(crop="resized", scale=(0.35, 1.0), flip=0.5),
    epochs=4,
    batch_size=64,
    lr=2e-3,
    weight_decay=0.05,
    label_smoothing=0.1,
)
