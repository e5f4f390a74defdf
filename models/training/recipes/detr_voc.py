"""A DETR on VOC 2007 with a frozen, pretrained EfficientNet-Lite2 as backbone.

    vitrine train detr_voc --data DATA/voc2007

Data: 4,006 photographs of at most 384 pixels, 20 classes; trained on at 320 x 256, served at full size; validation on
4 % of `train`; `val` is the test set.
"""

from vitrine.bundle.manifest import DetectionPreprocessing
from vitrine.models.training.augmentation.augment import DetectionAugmentation
from vitrine.models.training.recipe import DetectionRecipe

RECIPE = DetectionRecipe(
    name="detr_voc",
    architecture="detr",
    model={
        "backbone": "efficientnet_lite2",
        "neck": "fusion",
        "queries": "selected",
        "scores": "sigmoid",
        "num_queries": 60,
        "denoising": 2,
        "embed_dim": 192,
        "num_heads": 6,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "feedforward_dim": 512,
        "dropout": 0.0,
    },
    preprocessing=DetectionPreprocessing(
        shortest_edge=320, longest_edge=384, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic"
    ),
    training_edges=(256, 320),
    pretrained="efficientnet-lite2",
    trainable="all_but_backbone",
    views=6,
    augmentation=DetectionAugmentation(
        flip=0.5, zoom=(0.7, 1.7), brightness=0.2, contrast=0.2, saturation=0.2, feature_paste=0.4
    ),
    epochs=40,
    batch_size=16,
    optimizer="muon",
    lr=1.5e-3,
    weight_decay=0.02,
    warmup_epochs=0.5,
    clip_grad=0.5,
    ema=0.999,
    held_out=0.04,
    evaluate_every=4,
)
