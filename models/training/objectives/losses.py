"""Losses as sums divided by given totals, so that those of micro-batches add up to the whole batch's, up to rounding.

Classification: cross entropy or, per class, binary cross entropy. DETR's set loss: cross entropy of the classes, L1 and
generalised IoU loss of the matched boxes, for each decoder layer (Carion et al. 2020, sec. 3.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrine.models.boxes import cxcywh_to_xyxy, generalised_iou, iou
from vitrine.models.detr import DetrConfig, DetrOutput, SetPrediction
from vitrine.models.training.objectives.matcher import HungarianMatcher, Match
from vitrine.models.training.targets import Target

# Cells of the memory that learn to predict an object: more supervision than one (Jia et al. 2023, "DETRs with Hybrid
# Matching"); the decoder's queries, matched one to one, remove the duplicates.
_CELLS_PER_OBJECT = 4
_ALPHA, _GAMMA = 0.75, 2.0  # of the varifocal loss of absent classes


@dataclass(frozen=True)
class ClassificationLoss:
    """Softmax cross entropy ("softmax") or binary cross entropy per class ("sigmoid"), with label smoothing.

    Smoothing spreads this fraction of each target over all classes (Szegedy et al. 2016, sec. 7).
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor, total: float | Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the sum over the images ("sigmoid": of the mean over classes), divided by `total`, as a scalar.

        Args:
            logits: [B, K].
            targets: probabilities [B, K], before smoothing.
            total: number of images in the whole batch, or the sum of their weights.
            weights: of each image's loss, [B]; None for 1.
        """
        classes = logits.shape[-1]
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.kind == "softmax":
            losses = -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1)
        else:
            losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(dim=-1)
        return (losses if weights is None else losses * weights).sum() / total


@dataclass(frozen=True)
class SetCriterion:
    """DETR's set loss with its default weights; `eos_coef` down-weights "no object", the target of most queries.

    For sigmoid scores, the class loss is varifocal (Zhang et al. 2021, "VarifocalNet", eq. 2): the target of an
    object's class is the IoU of its box, so that scores rank boxes by their quality.
    """

    matcher: HungarianMatcher = field(default_factory=HungarianMatcher)
    scores: Literal["softmax", "sigmoid"] = "softmax"
    eos_coef: float = 0.1
    l1_weight: float = 5.0
    giou_weight: float = 2.0

    @classmethod
    def of(cls, config: DetrConfig, eos_coef: float) -> "SetCriterion":
        """Return the loss for a network's scores."""
        sigmoid = config.scores == "sigmoid"
        matcher = HungarianMatcher("sigmoid", class_cost=2.0) if sigmoid else HungarianMatcher()
        return cls(matcher, config.scores, eos_coef)

    def totals(self, targets: Sequence[Target], config: DetrConfig) -> Tensor:
        """Return the divisors of the loss, known before the forward pass.

        Returns:
            float32 [3], to be summed over the whole batch: number of boxes to match, total weight of the queries' cross
            entropies (of varifocal losses: number of boxes), and number of boxes to denoise.
        """
        counts = [len(target.class_ids) for target in targets]
        matched = sum(min(count, config.num_queries) for count in counts)
        unmatched = len(counts) * config.num_queries - matched
        weight = sum(counts) if self.scores == "sigmoid" else matched + self.eos_coef * unmatched
        return torch.tensor(
            [
                config.query_groups * sum(counts),
                config.query_groups * weight,
                config.denoising * sum(counts),
            ],
            dtype=torch.float32,
        )

    def __call__(
        self, output: DetrOutput, targets: Sequence[Target], totals: Tensor, groups: int = 1
    ) -> dict[str, Tensor]:
        """Return this batch's share of the loss, summed over all layers.

        Args:
            output: of N queries in `groups` groups that are matched independently.
            targets: one per image.
            totals: of the whole batch.

        Returns:
            Scalars: "loss" to minimise; the unweighted "class", "l1" and "giou" of the last layer; its weighted
            "denoising", and the weighted "proposals" of the memory's cells, if the output has them.
        """
        boxes, weights, denoised = totals.to(output["pred_logits"].device)
        boxes, denoised, weights = boxes.clamp(min=1), denoised.clamp(min=1), weights.clamp(min=1e-6)
        layers: list[SetPrediction] = [*output["aux_outputs"], output]
        stacked = _stack_layers(layers)
        matches = self.matcher(stacked, [*targets] * len(layers), groups)
        parts = self._parts(stacked, targets, matches, self.eos_coef, boxes, weights)
        loss = self._weighted(parts).sum()
        last = {name: part[-1] for name, part in parts.items()}
        if output["denoising"]:
            stacked = _stack_layers(output["denoising"])
            matches = _denoising_matches(targets, stacked["pred_boxes"].shape[1]) * len(output["denoising"])
            denoising = self._weighted(self._parts(stacked, targets, matches, 0.0, denoised, denoised))
            loss = loss + denoising.sum()
            last["denoising"] = denoising[-1]
        if output["proposals"] is not None:
            several = [
                Target(t.class_ids.repeat(_CELLS_PER_OBJECT), t.boxes_cxcywh.repeat(_CELLS_PER_OBJECT, 1))
                for t in targets
            ]
            matches = self.matcher(output["proposals"], several)
            total = boxes * _CELLS_PER_OBJECT
            weight = total
            if self.scores == "softmax":  # the share of this batch in the weight of all cells
                cells = output["proposals"]["pred_boxes"].shape[:2].numel()
                weight = total * (1 + self.eos_coef * cells / max(1, sum(len(t.class_ids) for t in several)))
            proposals = self._weighted(self._parts(output["proposals"], several, matches, self.eos_coef, total, weight))
            loss = loss + proposals.sum()
            last["proposals"] = proposals[-1]
        return {"loss": loss, **last}

    def _weighted(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["class"] + self.l1_weight * parts["l1"] + self.giou_weight * parts["giou"]

    def _parts(
        self,
        prediction: SetPrediction,
        targets: Sequence[Target],
        matches: Sequence[Match],
        unmatched: float,
        total_boxes: Tensor,
        total_weight: Tensor,
    ) -> dict[str, Tensor]:
        """Loss terms, [L] each, of L layers' predictions for B images, [L B, N, ...], with one match each.

        `unmatched` is the weight of queries without an object; with sigmoid scores only zero makes a difference.
        """
        logits, boxes = prediction["pred_logits"].float(), prediction["pred_boxes"].float()
        layers, no_object = len(matches) // len(targets), logits.shape[-1] - 1
        counts = [len(target.class_ids) for target in targets]
        starts = list(accumulate(counts, initial=0))[:-1] * layers  # offset of each image's objects among all objects
        pairs = [
            torch.stack((torch.full_like(queries, index), queries, objects + start))
            for index, ((queries, objects), start) in enumerate(zip(matches, starts, strict=True))
        ]
        images, queries, objects = torch.cat(pairs, dim=1).to(logits.device)  # [pairs] each
        predicted = boxes[images, queries]
        expected = torch.cat([target.boxes_cxcywh for target in targets])[objects]
        giou = generalised_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected))
        target_ids = torch.cat([target.class_ids for target in targets])[objects]
        if self.scores == "softmax":
            class_ids = torch.full(logits.shape[:2], no_object, device=logits.device)
            class_ids[images, queries] = target_ids
            weight = torch.ones(no_object + 1, device=logits.device)
            weight[no_object] = unmatched
            losses = F.cross_entropy(logits.flatten(0, 1), class_ids.flatten(), weight, reduction="none")  # [L B N]
        else:
            quality = torch.zeros_like(logits)
            quality[images, queries, target_ids] = iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected)).detach()
            weight = _ALPHA * logits.detach().sigmoid() ** _GAMMA
            if unmatched == 0:  # padding
                weight = weight * torch.zeros_like(logits[..., :1]).index_put((images, queries), logits.new_ones(1))
            weight = torch.where(quality > 0, quality, weight)
            losses = F.binary_cross_entropy_with_logits(logits, quality, weight, reduction="none").sum(-1).flatten()
        errors = {
            "l1": (predicted - expected).abs().sum(dim=-1),
            "giou": 1 - giou,
        }
        return {
            "class": losses.unflatten(0, (layers, -1)).sum(dim=1) / total_weight,
            **{
                name: error.unflatten(0, (layers, len(error) // layers)).sum(dim=1) / total_boxes
                for name, error in errors.items()
            },
        }


def _stack_layers(layers: Sequence[SetPrediction]) -> SetPrediction:
    """Concatenate the predictions of L layers along the batch: [L B, ...]."""
    return {
        "pred_logits": torch.cat([layer["pred_logits"] for layer in layers]),
        "pred_boxes": torch.cat([layer["pred_boxes"] for layer in layers]),
    }


def _denoising_matches(targets: Sequence[Target], queries: int) -> list[Match]:
    """Match each query of `models.detr.Denoising` with its object; padding is unmatched."""
    counts = [len(target.class_ids) for target in targets]
    length = max(1, *counts)
    starts = torch.arange(0, queries, length)[:, None]  # first query of each group
    return [((starts + torch.arange(count)).flatten(), torch.arange(count).repeat(len(starts))) for count in counts]
