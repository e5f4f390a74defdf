"""A small MLP-Mixer on CIFAR-10, from random weights.

    vitrine train mixer_cifar10 --data DATA/cifar10

Data: 32 x 32 pixels, 10 classes, 48,000 images to train on and 2,000 held out.
Time: 95 minutes on one core of a shared two-core AVX2 machine.
Result: 82.6 % top-1 on the test set (of the JPEG copy of CIFAR-10, measured on the shipped bundle).
Inherited from `vit_cifar10`: all settings but the model, epochs and `compile`.
"""

from vitrine.models.training.recipes.vit_cifar10 import RECIPE as VIT

RECIPE = VIT.derive(
    name="mixer_cifar10",
    architecture="mlp_mixer",
    model={
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 8,
        "tokens_mlp_dim": 64,
        "channels_mlp_dim": 384,
    },
    epochs=28,
    compile=True,
)
