"""An MLP-Mixer of 27 MFLOP an image on CIFAR-10, one of three networks that `docs/claims.md` compares.

    vitrine train claim_mixer --data DATA/cifar10 train_fraction=0.1 epochs=20

Result: docs/claims.md.
Inherited from `claim_vit`: all settings but the model.
"""

from vitrine.models.training.recipes.claim_vit import RECIPE as VIT

RECIPE = VIT.derive(
    name="claim_mixer",
    architecture="mlp_mixer",
    model={
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 5,
        "tokens_mlp_dim": 64,
        "channels_mlp_dim": 256,
    },
)
