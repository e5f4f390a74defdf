"""Padded targets of a batch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vitrine.models.training.targets import Target, pad_targets

CLASSES = 3
COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


def objects(count: int, generator: torch.Generator) -> Target:
    boxes = 0.1 + 0.8 * torch.rand(count, 4, generator=generator)
    return Target(torch.randint(CLASSES, (count,), generator=generator), boxes)


@given(counts=COUNTS)
def test_padded_targets_hold_every_object_once(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = [objects(count, generator) for count in counts]
    class_ids, boxes, valid = pad_targets(targets)
    assert class_ids.shape == valid.shape == boxes.shape[:2] == (len(counts), max(1, *counts))
    for image, target in enumerate(targets):
        assert torch.equal(class_ids[image][valid[image]], target.class_ids)
        assert torch.equal(boxes[image][valid[image]], target.boxes_cxcywh)
    assert (class_ids[~valid] == 0).all()
    assert (boxes[~valid] == 0).all()
