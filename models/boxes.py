"""Box formats and generalised IoU. cxcywh is centre and size, xyxy the two corners; both in fractions of the image."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] -> [..., 4]."""
    centre, size = boxes_cxcywh.split(2, dim=-1)
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] -> [..., 4]."""
    low, high = boxes_xyxy.split(2, dim=-1)
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes as xyxy, [..., 4] each, broadcast over leading axes: [...], in 0..1."""
    return _intersection_over_union(a, b)[0]


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al. 2019, algorithm 1), broadcast over leading axes.

    Args:
        a, b: boxes as xyxy, [..., 4] each.

    Returns:
        [...], in -1..1; 0 for two boxes of zero size at the same point.
    """
    plain, union = _intersection_over_union(a, b)
    hull_low = torch.minimum(a[..., :2], b[..., :2])
    hull_high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = (hull_high - hull_low).prod(dim=-1)
    return plain - (hull - union) / hull.clamp(min=torch.finfo(hull.dtype).tiny)


def _intersection_over_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU and the area of the union."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(dim=-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(dim=-1)
    union = area_a + area_b - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny), union
