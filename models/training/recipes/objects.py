"""Objects in your own photographs: a DETR on the frozen features of a pretrained ConvNet.

    vitrine train objects --data DATA
    vitrine train objects --data DATA model.backbone=efficientnet_lite2

Data: COCO's JSON, Pascal VOC's XML or YOLO's text files; validation on `val` if there is one, else on a part of
`train`.
Each photograph is shown in four views, whose features are computed once. The weights of the best epoch are kept.
Inherited from `detr_voc`: the network but for its backbone, the optimiser, and the augmentation. Trained on at the size
that is served: objects that always have the same size, such as cells, are missed at another one (docs/training.md).
"""

from vitrine.models.training.recipes.detr_voc import RECIPE as VOC

RECIPE = VOC.derive(
    name="objects",
    model={**VOC.model, "backbone": "efficientnet_lite0"},
    pretrained="efficientnet-lite0",
    training_edges=None,
    views=4,
    epochs=60,
    patience=20,
    keep="best",
    held_out=None,
    evaluate_every=5,
)
