"""Batches of the features of a network's frozen part, and their augmentation for detection.

Shapes: B batch, C channels, h x w cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrine.models.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from vitrine.models.training.targets import Target

_CHOICE, _COLUMN = 1, 2  # columns of `noise`; 0 chose the view


@dataclass(frozen=True)
class FeatureBatch:
    """Outputs of a network's frozen part."""

    maps: list[Tensor]  # of its `forward_features`, from fine to coarse
    sizes: Tensor  # int64 [B, 2], height and width in pixels of each image's valid region

    def edges(self, stride: int) -> list[int]:
        """Return the height and width in pixels that the batch is padded to: multiples of the largest stride."""
        return [-(-edge // stride) * stride for edge in self.sizes.amax(dim=0).tolist()]

    def to(self, device: torch.device) -> "FeatureBatch":
        """Return the batch on a device."""
        return FeatureBatch([level.to(device, non_blocking=True) for level in self.maps], self.sizes.to(device))


def paste_columns(
    features: FeatureBatch,
    targets: Sequence[Target],
    noise: Tensor,
    stride: int,
    probability: float,
    min_visible: float,
) -> tuple[FeatureBatch, list[Target]]:
    """Replace the right part of some images by that of their neighbour in the batch, if both are of one size.

    CutMix (Yun et al. 2019) for detection, on feature maps [B, C, h, w].

    Args:
        noise: float [B, NOISE], uniform in [0, 1).
        stride: pixels per cell of the network's coarsest map, between whose columns is cut.
        probability: of each image.
        min_visible: a box is dropped if less than this fraction of its area is left.
    """
    maps, pasted = [level.clone() for level in features.maps], list(targets)
    coarse = features.edges(stride)[1] // stride
    for row, (choice, place) in enumerate(noise[:, [_CHOICE, _COLUMN]].tolist()):
        other = row - 1
        columns = -(-int(features.sizes[row, 1]) // stride)
        if choice >= probability or columns < 2 or not torch.equal(features.sizes[row], features.sizes[other]):
            continue
        column = 1 + int(place * (columns - 1))
        for level, source in zip(maps, features.maps, strict=True):
            start = column * (level.shape[-1] // coarse)
            level[row, ..., start:] = source[other, ..., start:]
        cut = column * stride / float(features.sizes[row, 1])
        kept = [
            _clipped(target, low, high, min_visible)
            for target, low, high in ((targets[row], 0.0, cut), (targets[other], cut, 1.0))
        ]
        pasted[row] = Target(*(torch.cat(parts) for parts in zip(*kept, strict=True)))
    return FeatureBatch(maps, features.sizes), pasted


def _clipped(target: Target, low: float, high: float, min_visible: float) -> tuple[Tensor, Tensor]:
    """Return the class ids and boxes of the objects between two places x of the image, as fractions of its width."""
    boxes = cxcywh_to_xyxy(target.boxes_cxcywh)
    edges = boxes[:, 2] - boxes[:, 0]
    boxes = torch.cat((boxes[:, :1].clamp(low, high), boxes[:, 1:2], boxes[:, 2:3].clamp(low, high), boxes[:, 3:]), 1)
    visible = boxes[:, 2] - boxes[:, 0] >= min_visible * edges.clamp(min=1e-6)
    return target.class_ids[visible], xyxy_to_cxcywh(boxes[visible])
