"""A small ViT with a convolutional stem on CIFAR-10, from random weights.

    vitrine train vit_cifar10 --data DATA/cifar10

Data: 32 x 32 pixels, 10 classes, 48,000 images to train on and 2,000 held out.
Time: 52 minutes on one core of a shared two-core AVX2 machine.
Result: 71.5 % top-1 on the test set (of the JPEG copy of CIFAR-10, measured on the bundle that ships, made
before the trainer's augmentation was rewritten).
"""

from bundle.manifest import ClassificationPreprocessing
from models.training.augment import ClassificationAugmentation
from models.training.recipe import ClassificationRecipe

RECIPE = ClassificationRecipe(
    name="vit_cifar10",
    architecture="vit",
    model={
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 96,
        "depth": 6,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "stem": "conv",
        "global_pool": "avg",
    },
    preprocessing=ClassificationPreprocessing(
        input_size=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    augmentation=ClassificationAugmentation(crop="shift", flip=0.5),
    epochs=13,
    batch_size=100,
    lr=2e-3,
    weight_decay=0.05,
    warmup_epochs=1.0,
    label_smoothing=0.1,
)
