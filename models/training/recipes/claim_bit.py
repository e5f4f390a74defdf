"""A BiT (ResNetV2) of 28 MFLOP an image on CIFAR-10, one of three networks that `docs/claims.md` compares.

    vitrine train claim_bit --data DATA/cifar10 train_fraction=0.1 epochs=20

Result: docs/claims.md.
Inherited from `claim_vit`: all settings but the model.
"""

from vitrine.models.training.recipes.claim_vit import RECIPE as VIT

RECIPE = VIT.derive(
    name="claim_bit",
    architecture="resnetv2",
    model={"image_size": 32, "layers": (1, 1, 2), "width_factor": 0.1875, "stem": "small", "num_groups": 4},
)
