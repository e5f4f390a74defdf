import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from models.training.augment import shift_and_flip, window_and_flip
from models.training.matcher import Target

BACKGROUND, PAINT = torch.tensor([60, 90, 120], dtype=torch.uint8), torch.tensor([240, 90, 20], dtype=torch.uint8)
NOTHING = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(0))


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (5, 8, 20, 3), (2, 3, 3, 3)])
def test_shift_and_flip_keeps_shape_and_follows_the_seed(shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    moved = shift_and_flip(pixels, seeded(1))
    assert (moved.shape, moved.dtype) == (pixels.shape, torch.uint8)
    assert torch.equal(moved, shift_and_flip(pixels, seeded(1)))


def test_shift_and_flip_differs_between_seeds_and_images() -> None:
    pixels = noise(1, 16, 16, 3).expand(8, -1, -1, -1)
    moved = shift_and_flip(pixels, seeded(1))
    assert not torch.equal(moved, shift_and_flip(pixels, seeded(2)))
    assert len(moved.flatten(1).unique(dim=0)) > 2


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_shift_and_flip_moves_by_at_most_an_eighth(seed: int) -> None:
    pixels = noise(1, 16, 24, 3).clamp(min=1)  # black is what comes in
    moved = shift_and_flip(pixels, seeded(seed))[0]
    candidates = []
    for flipped in (moved, moved.flip(1)):
        for dy in range(-2, 3):
            for dx in range(-3, 4):
                shifted = torch.zeros_like(moved)
                rows, columns = slice(max(0, dy), 16 + min(0, dy)), slice(max(0, dx), 24 + min(0, dx))
                sources = slice(max(0, -dy), 16 + min(0, -dy)), slice(max(0, -dx), 24 + min(0, -dx))
                shifted[rows, columns] = pixels[0][sources]
                candidates.append(torch.equal(flipped, shifted))
    assert sum(candidates) == 1


def test_no_padding_only_mirrors() -> None:
    pixels = noise(20, 6, 6, 3)
    moved = shift_and_flip(pixels, seeded(0), padding=0.0)
    same = (moved == pixels).flatten(1).all(dim=1)
    mirrored = (moved == pixels.flip(2)).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()


def painted(height: int, width: int, canvas: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[Tensor, Target]:
    """An image with a painted rectangle (xyxy in pixels) on a black canvas, and its target."""
    pixels = torch.zeros(*canvas, 3, dtype=torch.uint8)
    pixels[:height, :width] = BACKGROUND
    pixels[box[1] : box[3], box[0] : box[2]] = PAINT
    edges = torch.tensor([width, height, width, height])
    return pixels, Target(torch.tensor([4]), xyxy_to_cxcywh(torch.tensor([box]) / edges))


@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(40, 64), st.integers(40, 64)),
    corner=st.tuples(st.floats(0, 0.6), st.floats(0, 0.6)),
    edges=st.tuples(st.integers(8, 20), st.integers(8, 20)),
    jitter=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=120, deadline=None)
def test_target_follows_the_pixels(
    seed: int, size: tuple[int, int], corner: tuple[float, float], edges: tuple[int, int], jitter: float
) -> None:
    height, width = size
    left, top = int(corner[0] * width), int(corner[1] * height)
    box = (left, top, min(width, left + edges[0]), min(height, top + edges[1]))
    pixels, target = painted(height, width, (64, 64), box)
    sizes = torch.tensor([[height, width]])
    moved, valid, (found,) = window_and_flip(pixels[None], sizes, [target], seeded(seed), jitter=jitter)
    assert valid[0, 0].nonzero().max(dim=0).values.tolist() == [height - 1, width - 1]
    assert valid.sum() == height * width
    assume(len(found.class_ids))
    assert found.class_ids.tolist() == [4]
    image = moved[0, :height, :width].float()
    redness = image[..., 0] - image[..., 2]  # -60 on the background, 220 on the paint, but for the contrast
    rows, columns = (redness > 80).nonzero(as_tuple=True)
    seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    expected = cxcywh_to_xyxy(found.boxes_cxcywh)[0] * torch.tensor([width, height, width, height])
    assert (seen - expected).abs().max() <= 1.5


def test_box_whose_centre_leaves_the_window_goes() -> None:
    pixels, target = painted(64, 64, (64, 64), (0, 0, 10, 10))
    counts, cut = set(), 0
    for seed in range(60):
        _, _, (found,) = window_and_flip(pixels[None], torch.tensor([[64, 64]]), [target], seeded(seed))
        counts.add(len(found.class_ids))
        assert ((found.boxes_cxcywh > 0) & (found.boxes_cxcywh <= 1)).all()
        corners = cxcywh_to_xyxy(found.boxes_cxcywh)
        assert ((corners > -1e-6) & (corners < 1 + 1e-6)).all()
        cut += int((corners < 1e-6).any())
    assert counts == {0, 1}
    assert cut


def test_padding_stays_out_of_the_valid_region() -> None:
    pixels = noise(4, 40, 40, 3) // 4 + 90
    sizes = torch.tensor([[40, 40], [30, 20], [17, 40], [25, 31]])
    other = pixels.clone()
    for image, (height, width) in zip(other, sizes.tolist(), strict=True):
        image[height:], image[:, width:] = 255, 0
    moved, valid, _ = window_and_flip(pixels, sizes, [NOTHING] * 4, seeded(0))
    other_moved, _, _ = window_and_flip(other, sizes, [NOTHING] * 4, seeded(0))
    assert torch.equal(moved * valid.permute(0, 2, 3, 1), other_moved * valid.permute(0, 2, 3, 1))


def test_window_and_flip_follows_the_seed_and_keeps_the_order_of_images() -> None:
    pixels, sizes = noise(3, 20, 24, 3), torch.tensor([[20, 24], [10, 24], [20, 12]])
    targets = [Target(torch.tensor([i]), torch.tensor([[0.5, 0.5, 0.9, 0.9]])) for i in range(3)]
    first, second = (window_and_flip(pixels, sizes, targets, seeded(5)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert (first[0].shape, first[0].dtype) == (pixels.shape, torch.uint8)
    assert all(torch.equal(a.boxes_cxcywh, b.boxes_cxcywh) for a, b in zip(first[2], second[2], strict=True))
    for i, target in enumerate(first[2]):
        assert target.class_ids.tolist() in ([i], [])
