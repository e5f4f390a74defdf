"""A BiT (ResNetV2, 26 layers at half width) on CIFAR-10, from random weights.

    vitrine train bit_cifar10 --data DATA/cifar10

Data: 32 x 32 pixels, 10 classes, 48,000 images to train on and 2,000 held out.
Time: 61 minutes on one core of an AMD EPYC with bfloat16 instructions.
Result: 87.5 % top-1 on the test set (of the JPEG copy of CIFAR-10, measured on the shipped bundle).
Inherited from `vit_cifar10`: all settings but the model, augmentation, epochs and learning rate.
"""

from vitrine.models.training.augmentation.augment import ClassificationAugmentation
from vitrine.models.training.recipes.vit_cifar10 import RECIPE as VIT

RECIPE = VIT.derive(
    name="bit_cifar10",
    architecture="resnetv2",
    model={"image_size": 32, "layers": (2, 2, 2, 2), "width_factor": 0.5, "stem": "small", "num_groups": 8},
    augmentation=ClassificationAugmentation(crop="shift", flip=0.5),
    epochs=9,
    lr=5e-3,
)
