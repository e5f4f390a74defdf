"""Losses as sums divided by given totals: those of micro-batches add up to that of the joint batch, but for rounding.

Classification: cross entropy or, per class, binary cross entropy. DETR's set loss: classes, L1 and generalised IoU of
matched boxes, for each layer (Carion et al. 2020, sec. 3.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrine.models.boxes import cxcywh_to_xyxy, generalised_iou
from vitrine.models.detr import DetrConfig, DetrOutput, SetPrediction
from vitrine.models.training.objectives.matcher import HungarianMatcher, Match
from vitrine.models.training.targets import Target


@dataclass(frozen=True)
class ClassificationLoss:
    """Cross entropy over the classes ("softmax"), or for each class on its own ("sigmoid"), with smoothed labels.

    Smoothing takes this part of each target and spreads it over all classes (Szegedy et al. 2016, sec. 7).
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor, total: float | Tensor) -> Tensor:
        """The loss as a scalar: the sum over the images ("sigmoid": of the classes' mean), divided by `total`.

        Args:
            logits: [B, K].
            targets: probabilities [B, K], not smoothed yet.
            total: images of the joint batch.
        """
        classes = logits.shape[-1]
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.kind == "softmax":
            return -(targets * logits.float().log_softmax(dim=-1)).sum() / total
        return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum") / (classes * total)


@dataclass(frozen=True)
class SetCriterion:
    """The weights are DETR's; `eos_coef` is the weight of "no object", which most queries have to answer."""

    matcher: HungarianMatcher = field(default_factory=HungarianMatcher)
    eos_coef: float = 0.1
    l1_weight: float = 5.0
    giou_weight: float = 2.0

    def totals(self, targets: Sequence[Target], config: DetrConfig) -> Tensor:
        """What the sums are divided by, known before the network has answered.

        Returns:
            float32 [3], to be added up over the joint batch: boxes to find, weights of the queries' cross entropies,
            and boxes to restore.
        """
        counts = [len(target.class_ids) for target in targets]
        matched = sum(min(count, config.num_queries) for count in counts)
        others = len(counts) * config.num_queries - matched
        return torch.tensor(
            [
                config.query_groups * sum(counts),
                config.query_groups * (matched + self.eos_coef * others),
                config.denoising * sum(counts),
            ],
            dtype=torch.float32,
        )

    def __call__(
        self, output: DetrOutput, targets: Sequence[Target], totals: Tensor, groups: int = 1
    ) -> dict[str, Tensor]:
        """The loss of all layers, as this batch's part of the joint batch's.

        Args:
            output: of N queries in `groups` independently matched parts.
            targets: one per image.
            totals: those of the joint batch.

        Returns:
            Scalars: "loss" to minimise; of the last layer the unweighted "class", "l1" and "giou" and, where objects
            were restored, the weighted "denoising".
        """
        boxes, weights, restored = totals.to(output["pred_logits"].device)
        boxes, restored = boxes.clamp(min=1), restored.clamp(min=1)
        layers: list[SetPrediction] = [*output["aux_outputs"], output]
        together = _together(layers)
        matches = self.matcher(together, [*targets] * len(layers), groups)
        parts = self._parts(together, targets, matches, self.eos_coef, boxes, weights)
        loss = self._weighted(parts).sum()
        last = {name: part[-1] for name, part in parts.items()}
        if output["denoising"]:
            together = _together(output["denoising"])
            matches = _noised_objects(targets, together["pred_boxes"].shape[1]) * len(output["denoising"])
            denoising = self._weighted(self._parts(together, targets, matches, 0.0, restored, restored))
            loss = loss + denoising.sum()
            last["denoising"] = denoising[-1]
        return {"loss": loss, **last}

    def _weighted(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["class"] + self.l1_weight * parts["l1"] + self.giou_weight * parts["giou"]

    def _parts(
        self,
        prediction: SetPrediction,
        targets: Sequence[Target],
        matches: Sequence[Match],
        eos_coef: float,
        total_boxes: Tensor,
        total_weight: Tensor,
    ) -> dict[str, Tensor]:
        """The parts of the loss, [L] each, of L layers' predictions for B images, [L B, N, ...]; one match for each."""
        logits, boxes = prediction["pred_logits"].float(), prediction["pred_boxes"].float()
        layers, no_object = len(matches) // len(targets), logits.shape[-1] - 1
        counts = [len(target.class_ids) for target in targets]
        starts = list(accumulate(counts, initial=0))[:-1] * layers  # of an image's objects among those of all images
        pairs = [
            torch.stack((torch.full_like(queries, index), queries, objects + start))
            for index, ((queries, objects), start) in enumerate(zip(matches, starts, strict=True))
        ]
        images, queries, objects = torch.cat(pairs, dim=1).to(logits.device)  # [pairs] each
        class_ids = torch.full(logits.shape[:2], no_object, device=logits.device)
        class_ids[images, queries] = torch.cat([target.class_ids for target in targets])[objects]
        weight = torch.ones(no_object + 1, device=logits.device)
        weight[no_object] = eos_coef
        entropies = F.cross_entropy(logits.flatten(0, 1), class_ids.flatten(), weight, reduction="none")  # [L B N]
        found = boxes[images, queries]
        wanted = torch.cat([target.boxes_cxcywh for target in targets])[objects]
        misses = {
            "l1": (found - wanted).abs().sum(dim=-1),
            "giou": 1 - generalised_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted)),
        }
        return {
            "class": entropies.unflatten(0, (layers, -1)).sum(dim=1) / total_weight,
            **{
                name: miss.unflatten(0, (layers, len(miss) // layers)).sum(dim=1) / total_boxes
                for name, miss in misses.items()
            },
        }


def _together(layers: Sequence[SetPrediction]) -> SetPrediction:
    """The predictions of L layers as one of L B images."""
    return {
        "pred_logits": torch.cat([layer["pred_logits"] for layer in layers]),
        "pred_boxes": torch.cat([layer["pred_boxes"] for layer in layers]),
    }


def _noised_objects(targets: Sequence[Target], queries: int) -> list[Match]:
    """Which object each query of `models.detr.Denoising` restores; those that are padding restore none."""
    counts = [len(target.class_ids) for target in targets]
    length = max(1, *counts)
    starts = torch.arange(0, queries, length)[:, None]  # of each group
    return [((starts + torch.arange(count)).flatten(), torch.arange(count).repeat(len(starts))) for count in counts]
