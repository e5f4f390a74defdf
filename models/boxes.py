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


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al. 2019, algorithm 1), broadcast over leading axes.

    Args:
        a, b: boxes as xyxy, [..., 4] each.

    Returns:
        [...], in -1..1; 0 for two boxes of zero size at the same point.
    """
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(dim=-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(dim=-1)
    union = area_a + area_b - intersection
    hull_low = torch.minimum(a[..., :2], b[..., :2])
    hull_high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = (hull_high - hull_low).prod(dim=-1)
    tiny = torch.finfo(hull.dtype).tiny
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
