"""DETR's set loss: classes, L1 and generalised IoU of matched boxes, for each layer (Carion et al. 2020, sec. 3.1)."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models.boxes import cxcywh_to_xyxy, generalised_iou
from models.detr import DetrOutput, SetPrediction
from models.training.matcher import HungarianMatcher, Target


@dataclass(frozen=True)
class SetCriterion:
    """The weights are DETR's; `eos_coef` is the weight of "no object", which most queries have to answer."""

    matcher: HungarianMatcher = field(default_factory=HungarianMatcher)
    eos_coef: float = 0.1
    l1_weight: float = 5.0
    giou_weight: float = 2.0

    def __call__(self, output: DetrOutput, targets: list[Target], groups: int = 1) -> dict[str, Tensor]:
        """The summed loss of all layers.

        Args:
            output: of N queries in `groups` independently matched parts.
            targets: one per image.

        Returns:
            Scalars: "loss" to minimise, and its parts "class", "l1" and "giou" (unweighted, of the last layer).
        """
        last = self._layer(output, targets, groups)
        total = self._weighted(last)
        for layer in output["aux_outputs"]:
            total = total + self._weighted(self._layer(layer, targets, groups))
        return {"loss": total, **last}

    def _weighted(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["class"] + self.l1_weight * parts["l1"] + self.giou_weight * parts["giou"]

    def _layer(self, prediction: SetPrediction, targets: list[Target], groups: int) -> dict[str, Tensor]:
        logits, boxes = prediction["pred_logits"], prediction["pred_boxes"]
        no_object = logits.shape[-1] - 1
        matches = self.matcher(prediction, targets, groups)
        images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(matches)])
        queries = torch.cat([queries for queries, _ in matches])
        class_ids = torch.full(logits.shape[:2], no_object, device=logits.device)
        class_ids[images, queries] = torch.cat(
            [target.class_ids[objects] for target, (_, objects) in zip(targets, matches, strict=True)]
        )
        weight = torch.ones(no_object + 1, device=logits.device)
        weight[no_object] = self.eos_coef
        matched = boxes[images, queries]  # [matches, 4]
        wanted = torch.cat(
            [target.boxes_cxcywh[objects] for target, (_, objects) in zip(targets, matches, strict=True)]
        )
        count = max(1, len(wanted))
        giou = generalised_iou(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(wanted))
        return {
            "class": F.cross_entropy(logits.transpose(1, 2), class_ids, weight),
            "l1": (matched - wanted).abs().sum() / count,
            "giou": (1 - giou).sum() / count,
        }
