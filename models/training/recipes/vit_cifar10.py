"""A small ViT with a convolutional stem on CIFAR-10, from random weights.

    vitrine train vit_cifar10 --data DATA/cifar10

Data: 32 x 32 pixels, 10 classes, 48,000 images to train on and 2,000 held out.
Time: 122 minutes on one core of a shared two-core AVX2 machine.
Result: 85.6 % top-1 on the test set (of the JPEG copy of CIFAR-10, measured on the shipped bundle).
"""

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.models.training.augmentation.augment import ClassificationAugmentation
from vitrine.models.training.recipe import ClassificationRecipe

RECIPE = ClassificationRecipe(
    name="vit_cifar10",
    architecture="vit",
    model={
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "stem": "conv",
        "global_pool": "avg",
    },
    preprocessing=ClassificationPreprocessing(
        input_size=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    augmentation=ClassificationAugmentation(crop="shift", flip=0.5, randaugment_ops=1),
    epochs=30,
    batch_size=128,
    optimizer="muon",
    lr=3e-3,
    weight_decay=0.05,
    warmup_epochs=1.0,
    label_smoothing=0.1,
    precision="bfloat16",
)
