"""A small DETR (half-width ResNet of three stages, 2 + 3 layers) on BCCD, from random weights.

    vitrine train detr_bccd --data DATA/bccd

Data: 205 microscope images of 640 x 480 pixels, 3 classes, at 320 x 240; validation on `val` (87 images).
Time: 65 minutes on one core of a shared two-core AVX2 machine.
Result: 50.7 % AP, 83.1 % AP50 on `test` (72 images, measured on the shipped bundle, which predates the rewrite of
augmentation). With `epochs=20`: 30.4 % AP, 62.8 % AP50 on `val`; docs/training.md compares the options.
"""

from vitrine.bundle.manifest import DetectionPreprocessing
from vitrine.models.training.augmentation.augment import DetectionAugmentation
from vitrine.models.training.recipe import DetectionRecipe

RECIPE = DetectionRecipe(
    name="detr_bccd",
    architecture="detr",
    model={
        "num_queries": 60,
        "queries": "boxes",
        "query_groups": 3,
        "embed_dim": 128,
        "num_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "feedforward_dim": 256,
        "dropout": 0.0,
        "backbone_layers": (2, 2, 2),
        "backbone_width": 32,
    },
    preprocessing=DetectionPreprocessing(
        shortest_edge=240, longest_edge=320, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    augmentation=DetectionAugmentation(flip=0.5, flip_vertical=0.5, zoom=(1.0, 1.67), brightness=0.2, contrast=0.2),
    epochs=150,
    batch_size=4,
    lr=5e-4,
    weight_decay=1e-4,
    warmup_epochs=1.0,
    clip_grad=0.5,
    evaluate_every=5,
)
