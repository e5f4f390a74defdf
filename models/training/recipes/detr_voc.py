"""A small DETR on VOC 2007, with a backbone pretrained on the objects of the same images.

    vitrine data crops DATA/voc2007 --out data/voc-objects
    vitrine train resnet_voc --data data/voc-objects
    vitrine train detr_voc --data DATA/voc2007 --from runs/resnet_voc

Data: 4,006 photographs of at most 384 pixels, 20 classes, at 256 x 192; validation on 4 % of `train` (whose objects the
backbone has seen); `val` is the test set.
Time: 26 minutes on one core of an AMD EPYC with bfloat16 instructions, far from convergence.
Result: 4.3 % AP, 11.0 % AP50 on `val` (measured on the shipped bundle).
Inherited from `detr_bccd`: all settings but the number of queries, image size, augmentation, epochs, batch size,
optimizer, learning rate, precision and `held_out`.
"""

from vitrine.models.training.augmentation.augment import DetectionAugmentation
from vitrine.models.training.recipes.detr_bccd import RECIPE as BCCD

RECIPE = BCCD.derive(
    name="detr_voc",
    model={**BCCD.model, "num_queries": 50},
    preprocessing={**BCCD.preprocessing.model_dump(), "shortest_edge": 192, "longest_edge": 256},
    augmentation=DetectionAugmentation(flip=0.5, zoom=(0.8, 1.6), brightness=0.2, contrast=0.2, saturation=0.2),
    epochs=10,
    batch_size=8,
    optimizer="muon",
    lr=1.5e-3,
    precision="bfloat16",
    held_out=0.04,
)
