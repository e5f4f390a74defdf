"""Query denoising for DETR (Li et al. 2022, "DN-DETR: Accelerate DETR Training by Query DeNoising").

The object behind each noised query is known, so the decoder learns to refine boxes long before bipartite matching
becomes stable.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrine.models.detr import Denoising, DetrConfig
from vitrine.models.training.targets import Target, pad_targets

# Sec. 4.3 and 5.1 of the paper.
CENTRE_NOISE = 0.4  # largest shift of a centre, relative to half the box's edges
SIZE_NOISE = 0.4  # largest change of an edge, relative to it
LABEL_NOISE = 0.2  # fraction of labels that are replaced by random ones


def make_denoising(targets: Sequence[Target], config: DetrConfig, noise: Tensor) -> Denoising | None:
    """Return `config.denoising` groups of noised copies of each image's objects; None if that is zero.

    Args:
        targets: one per image.
        config: of the network that is to restore the objects.
        noise: float32 [B], a random number in [0, 1) per image, on the CPU. It seeds all of the image's noise, so that
            this does not depend on the batch.
    """
    if not config.denoising:
        return None
    class_ids, boxes, valid = pad_targets(targets)
    random = torch.zeros(len(targets), config.denoising, valid.shape[1], 6)
    for row, number, target in zip(random, noise.tolist(), targets, strict=True):
        generator = torch.Generator().manual_seed(int(number * 2**24))
        count = len(target.class_ids)
        row[:, :count] = torch.rand(config.denoising, count, 6, generator=generator)
    random = random.to(boxes.device)
    shift, stretch = (2 * random[..., :4] - 1).split(2, dim=-1)  # [B, G, n, 2] each, -1 to 1
    centres, edges = boxes[:, None].split(2, dim=-1)  # [B, 1, n, 2] each
    noised = torch.cat((centres + shift * CENTRE_NOISE * edges / 2, edges + stretch * SIZE_NOISE * edges), dim=-1)
    random_ids = (random[..., 4] * config.num_classes).long()
    noised_ids = torch.where(random[..., 5] < LABEL_NOISE, random_ids, class_ids[:, None])
    return Denoising(noised.clamp(0, 1), noised_ids, valid)
