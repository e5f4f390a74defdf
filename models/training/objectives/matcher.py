"""Hungarian matching of queries and objects (Carion et al. 2020, sec. 3.1, eq. 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vitrine.models.boxes import cxcywh_to_xyxy, generalised_iou
from vitrine.models.detr import SetPrediction
from vitrine.models.training.targets import Target, pad_targets

_ALPHA, _GAMMA = 0.25, 2.0  # Lin et al. 2017, "Focal Loss for Dense Object Detection"

# Indices of the matched queries and of their objects in one image: int64 on the CPU, of the same length.
Match = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HungarianMatcher:
    """Minimum-cost bipartite matching with DETR's cost weights.

    For sigmoid scores, the cost of a class is its focal loss less that of its absence (Zhu et al. 2021, "Deformable
    DETR").
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    class_cost: float = 1.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0

    @torch.no_grad()
    def __call__(self, prediction: SetPrediction, targets: Sequence[Target], groups: int = 1) -> list[Match]:
        """Match each group of queries with all objects of its image.

        Args:
            prediction: of N queries in `groups` equal groups that are matched independently.
            targets: one per image.

        Returns:
            For each image, groups * min(n, N / groups) pairs.
        """
        boxes = prediction["pred_boxes"].float()
        class_ids, target_boxes, _ = pad_targets(targets)
        logits = prediction["pred_logits"].float()
        if self.scores == "softmax":
            costs = -logits.softmax(dim=-1)
        else:
            score = logits.sigmoid()
            present = _ALPHA * (1 - score) ** _GAMMA * F.softplus(-logits)
            costs = present - (1 - _ALPHA) * score**_GAMMA * F.softplus(logits)
        class_cost = costs.gather(2, class_ids[:, None].expand(-1, boxes.shape[1], -1))  # [B, N, n]
        l1_cost = torch.cdist(boxes, target_boxes, p=1)
        giou_cost = -generalised_iou(cxcywh_to_xyxy(boxes)[:, :, None], cxcywh_to_xyxy(target_boxes)[:, None])
        cost = self.class_cost * class_cost + self.l1_cost * l1_cost + self.giou_cost * giou_cost
        largest = torch.finfo(cost.dtype).max
        cost = cost.nan_to_num(nan=largest, neginf=largest)  # diverged network: the loss reports it
        group_cost = cost.unflatten(1, (groups, -1)).cpu().numpy()  # [B, groups, N / groups, n]
        return [_match(image[..., : len(target.class_ids)]) for image, target in zip(group_cost, targets, strict=True)]


def _match(cost: NDArray[np.float32]) -> Match:
    """Match each group of one image, from costs [groups, N / groups, n]."""
    pairs = [linear_sum_assignment(group) for group in cost]
    queries = np.concatenate([rows + index * cost.shape[1] for index, (rows, _) in enumerate(pairs)])
    return torch.from_numpy(queries), torch.from_numpy(np.concatenate([columns for _, columns in pairs]))
