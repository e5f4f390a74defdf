"""Detection targets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """The objects of one image."""

    class_ids: Tensor  # int64 [n]
    boxes_cxcywh: Tensor  # float [n, 4], fractions of the image


def pad_targets(targets: Sequence[Target]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad targets to the largest number of objects per image, at least one.

    Returns:
        class_ids int64 [B, n] and boxes_cxcywh float [B, n, 4], zero where there is no object; valid bool [B, n].
    """
    class_ids = F.pad(torch.cat([target.class_ids for target in targets]), (0, 1))
    boxes = F.pad(torch.cat([target.boxes_cxcywh for target in targets]), (0, 0, 0, 1))
    counts = torch.tensor([len(target.class_ids) for target in targets])[:, None]
    positions = torch.arange(max(1, int(counts.max())))
    valid = positions < counts
    rows = (counts.cumsum(dim=0) - counts + positions).where(valid, len(boxes) - 1).to(boxes.device)
    return class_ids[rows], boxes[rows], valid.to(boxes.device)
