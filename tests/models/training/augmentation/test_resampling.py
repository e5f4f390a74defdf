import pytest
import torch
from torch import Tensor

from vitrine.models.training.augmentation.resampling import (
    GREY,
    clamp_positions,
    flip_valid_region,
    pixel_centres,
    resample,
    shift_and_flip,
    valid_pixels,
)

CPU = torch.device("cpu")


def images(*shape: int) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 256).to(torch.uint8)


def test_identity_positions_return_the_image() -> None:
    source = images(5, 300, 1333, 3)
    x, y = pixel_centres(1333, CPU).expand(5, 1, -1), pixel_centres(300, CPU)[:, None].expand(5, -1, 1)
    assert torch.equal(resample(source, x, y), source)


def test_between_two_pixels_is_their_mean() -> None:
    source = torch.tensor([10, 20, 41], dtype=torch.uint8)[None, None, :, None].expand(1, 2, 3, 3)
    x, y = torch.tensor([[[1.0, 1.75, 2.0, 1e6]]]), torch.tensor([[[1.0]]])
    assert resample(source, x, y)[0, 0, :, 0].tolist() == [15, 25, 31, GREY]  # halves are rounded up


@pytest.mark.parametrize("fill", [False, True])
def test_positions_are_clamped_to_the_image(fill: bool) -> None:
    edge = torch.tensor([[4], [1]])
    position = torch.tensor([[-0.1, 0.0, 0.3, 2.0, 3.9, 4.1]]).expand(2, -1)
    outside = [1e6] if fill else [0.5], [1e6] if fill else [3.5]
    four, one = clamp_positions(position, edge, fill=fill).tolist()
    assert four == [*outside[0], 0.5, 0.5, 2.0, 3.5, *outside[1]]
    assert one[1:3] == [0.5, 0.5]
    assert one[3] == (1e6 if fill else 0.5)


def test_valid_pixels() -> None:
    valid = valid_pixels(torch.tensor([[2, 3], [4, 1]]), 4, 5)
    assert valid.sum(dim=(1, 2)).tolist() == [6, 4]
    assert valid[0, :2, :3].all()
    assert valid[1, :4, :1].all()


def test_shift_goes_down_and_right_before_the_flip() -> None:
    source = images(2, 3, 4, 3)
    moved = shift_and_flip(source, torch.tensor([[1, 2], [-1, 0]]), torch.tensor([True, False]))
    assert torch.equal(moved[0, 1:, :2], source[0, :-1, :2].flip(1))
    assert (moved[0, 0] == GREY).all()
    assert (moved[0, :, 2:] == GREY).all()
    assert torch.equal(moved[1, :2], source[1, 1:])
    assert (moved[1, 2] == GREY).all()


def test_flip_leaves_padding_in_place() -> None:
    source, sizes = images(3, 6, 8, 3), torch.tensor([[6, 8], [4, 5], [1, 2]])
    flip = torch.tensor([[False, True], [True, True], [False, False]])
    moved = flip_valid_region(source, sizes, flip)
    assert torch.equal(moved[0], source[0].flip(1))
    assert torch.equal(moved[1, :4, :5], source[1, :4, :5].flip(0, 1))
    assert torch.equal(moved[1, 4:, 5:], source[1, 4:, 5:])
    assert torch.equal(moved[2], source[2])
