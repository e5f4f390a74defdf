"""Pasting columns of feature maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrine.models.training.augmentation.augment import NOISE
from vitrine.models.training.objectives.feature_batch import FeatureBatch, paste_columns
from vitrine.models.training.targets import Target


def batch(size: tuple[int, int] = (64, 96)) -> FeatureBatch:
    """Two images, 1 and 2 everywhere, at strides 16 and 32."""
    maps = [torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 4 // step, 6 // step) for step in (1, 2)]
    return FeatureBatch([level.clone() for level in maps], torch.tensor([size] * 2))


WIDE = Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 1.0, 0.5]]))
LEFT = Target(torch.tensor([1]), torch.tensor([[0.1, 0.5, 0.2, 0.5]]))


def paste(features: FeatureBatch, place: float, targets: list[Target], probability: float = 1.0) -> tuple:
    noise = torch.zeros(2, NOISE)
    noise[:, 2] = place
    return paste_columns(features, targets, noise, 32, probability, 0.3)


@settings(deadline=None)
@given(place=st.floats(0, 0.999))
def test_features_and_boxes_are_cut_at_the_same_column(place: float) -> None:
    pasted, targets = paste(batch(), place, [WIDE, LEFT])
    fine, coarse = pasted.maps
    column = int((coarse[0, 0, 0] == 1).sum())
    assert column in (1, 2)
    assert (fine[0, 0, 0] == 1).sum() == 2 * column
    assert (coarse[1, 0, :, :column] == 2).all()
    assert (coarse[1, 0, :, column:] == 1).all()
    cut = column / 3
    # The first image keeps the left part of its wide box, and gets nothing of the other's, which is left of the cut.
    assert targets[0].class_ids.tolist() == [0]
    assert targets[0].boxes_cxcywh[0].tolist() == pytest.approx([cut / 2, 0.5, cut, 0.5])
    assert targets[1].class_ids.tolist() == ([1, 0] if 1 - cut >= 0.3 else [1])


def test_maps_without_the_coarsest_are_cut_between_its_columns() -> None:
    fine = FeatureBatch(batch().maps[:1], batch().sizes)
    pasted, targets = paste(fine, 0.9, [WIDE, LEFT])
    assert pasted.maps[0][0, 0, 0].tolist() == [1, 1, 1, 1, 2, 2]
    assert targets[0].boxes_cxcywh[0].tolist() == pytest.approx([1 / 3, 0.5, 2 / 3, 0.5])


def test_images_of_other_sizes_and_unchosen_ones_stay() -> None:
    features = batch()
    features.sizes[1] = torch.tensor([96, 64])
    for pasted, targets in (paste(features, 0.5, [WIDE, LEFT]), paste(batch(), 0.5, [WIDE, LEFT], probability=0.0)):
        assert all(torch.equal(level, other) for level, other in zip(pasted.maps, features.maps, strict=True))
        assert targets[0] is WIDE
        assert targets[1] is LEFT


def test_the_batch_itself_is_not_changed() -> None:
    features = batch()
    paste(features, 0.5, [WIDE, LEFT])
    assert all((level[0] == 1).all() for level in features.maps)
