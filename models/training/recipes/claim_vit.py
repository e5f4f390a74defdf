"""A ViT of 30 MFLOP an image on CIFAR-10, one of three networks that `docs/claims.md` compares.

    vitrine train claim_vit --data DATA/cifar10 train_fraction=0.1 epochs=20

The other two are `claim_mixer` and `claim_bit`; `python -m benchmarks.claims` runs them all.
Inherited from `vit_cifar10`: preprocessing.
"""

from vitrine.models.training.augmentation.augment import ClassificationAugmentation
from vitrine.models.training.recipe import ClassificationRecipe
from vitrine.models.training.recipes.vit_cifar10 import RECIPE as VIT_CIFAR10

RECIPE = ClassificationRecipe(
    name="claim_vit",
    architecture="vit",
    model={
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 2,
        "global_pool": "avg",
    },
    preprocessing=VIT_CIFAR10.preprocessing,
    augmentation=ClassificationAugmentation(crop="none", flip=0.0),
    epochs=10,
    batch_size=64,
    optimizer="muon",
    lr=8e-3,
    precision="bfloat16",
)
