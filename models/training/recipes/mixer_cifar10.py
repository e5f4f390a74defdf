"""x"""

from bundle.manifest import ClassificationPreprocessing
from models.training.recipe import Recipe

RECIPE = Recipe(
    name="mixer_cifar10",
    architecture="mlp_mixer",
    model={
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 6,
        "tokens_mlp_dim": 64,
        "channels_mlp_dim": 256,
    },
    preprocessing=ClassificationPreprocessing(
        input_size=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    epochs=11,
    batch_size=100,
    lr=2e-3,
    weight_decay=0.05,
    warmup_epochs=1.0,
    label_smoothing=0.1,
)
