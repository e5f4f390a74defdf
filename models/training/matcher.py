"""Hungarian matching: which query is responsible for which object (Carion et al. 2020, sec. 3.1, eq. 1)."""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.boxes import cxcywh_to_xyxy, generalised_iou
from models.detr import SetPrediction


@dataclass(frozen=True)
class Target:
    """The objects of one image."""

    class_ids: Tensor  # int64 [n]
    boxes_cxcywh: Tensor  # float [n, 4], fractions of the image


@dataclass(frozen=True)
class HungarianMatcher:
    """The cheapest one-to-one assignment; the weights of its cost are DETR's."""

    class_cost: float = 1.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0

    @torch.no_grad()
    def __call__(
        self, prediction: SetPrediction, targets: list[Target], groups: int = 1
    ) -> list[tuple[Tensor, Tensor]]:
        """Match each group of queries with all objects of its image.

        Args:
            prediction: of N queries, `groups` equal parts of which are matched independently.
            targets: one per image.

        Returns:
            Per image, the indices of matched queries and of their objects, int64 [groups * min(n, N / groups)] each.
        """
        logits, boxes = prediction["pred_logits"], prediction["pred_boxes"]
        per_group = logits.shape[1] // groups
        counts = [len(target.class_ids) for target in targets]
        class_ids = torch.cat([target.class_ids for target in targets])
        boxes_target = torch.cat([target.boxes_cxcywh for target in targets])
        # One cost matrix of all queries of the batch against all objects of the batch: [B, N, sum of n]
        class_cost = -logits.softmax(dim=-1)[..., class_ids]
        l1_cost = torch.cdist(boxes, boxes_target.expand(len(targets), -1, -1), p=1)
        giou_cost = -generalised_iou(cxcywh_to_xyxy(boxes)[:, :, None], cxcywh_to_xyxy(boxes_target))
        cost = self.class_cost * class_cost + self.l1_cost * l1_cost + self.giou_cost * giou_cost
        cost = cost.nan_to_num()  # a diverged network: let the loss, not the matching, say so
        matches = []
        for image_cost, own in zip(cost.cpu(), torch.arange(len(class_ids)).split(counts), strict=True):
            queries, objects = [], []
            for group, group_cost in enumerate(image_cost[:, own].split(per_group)):
                rows, columns = linear_sum_assignment(group_cost.numpy())
                queries.append(torch.from_numpy(rows) + group * per_group)
                objects.append(torch.from_numpy(columns))
            matches.append((torch.cat(queries).to(logits.device), torch.cat(objects).to(logits.device)))
        return matches
