import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrine.models.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from vitrine.models.training.augmentation.augment import NOISE, DetectionAugmentation
from vitrine.models.training.targets import Target

BACKGROUND = torch.tensor([60, 60, 60], dtype=torch.uint8)
PAINTS = torch.tensor([[255, 60, 60], [60, 255, 60], [60, 60, 255], [255, 255, 60]], dtype=torch.uint8)
GREY = 128
NOTHING = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
QUIET = {"brightness": 0.0, "contrast": 0.0}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def painted(sizes: list[tuple[int, int]], seed: int) -> tuple[Tensor, Tensor, list[Target]]:
    """Images with one rectangle each, with a color and class unique in its group of four, on a red background."""
    source = torch.zeros(len(sizes), 72, 72, 3, dtype=torch.uint8)
    source[..., 0] = 255
    targets = []
    for i, ((height, width), number) in enumerate(zip(sizes, uniform(len(sizes), 4, seed=seed), strict=True)):
        box_width, box_height = (int(14 + 20 * float(part)) for part in number[:2])
        left, top = int((width - box_width) * float(number[2])), int((height - box_height) * float(number[3]))
        source[i, :height, :width] = BACKGROUND
        source[i, top : top + box_height, left : left + box_width] = PAINTS[i % 4]
        edges = torch.tensor([[left, top, left + box_width, top + box_height]]) / torch.tensor([width, height] * 2)
        targets.append(Target(torch.tensor([i % 4]), xyxy_to_cxcywh(edges)))
    return source, torch.tensor(sizes), targets


def seen(image: Tensor, paint: Tensor) -> list[int] | None:
    """The rectangle (left, top, right, bottom) around the pixels that are nearer to a paint than to the background."""
    distance = (image.float() - paint.float()).norm(dim=-1)
    rows, columns = (distance < 97.5).nonzero(as_tuple=True)
    if not len(rows):
        return None
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@given(
    seed=st.integers(0, 100_000),
    sizes=st.lists(st.tuples(st.integers(40, 72), st.integers(40, 72)), min_size=1, max_size=6),
    zoom=st.sampled_from([(1.0, 1.0), (1.0, 2.0), (0.5, 1.0), (0.5, 2.0)]),
    mosaic=st.sampled_from([0.0, 0.5, 1.0]),
    flips=st.sampled_from([(0.0, 0.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]),
)
@settings(max_examples=150, deadline=None)
def test_targets_are_where_the_pixels_are(
    seed: int,
    sizes: list[tuple[int, int]],
    zoom: tuple[float, float],
    mosaic: float,
    flips: tuple[float, float],
) -> None:
    augmentation = DetectionAugmentation(
        flip=flips[0], flip_vertical=flips[1], zoom=zoom, mosaic=mosaic, min_visible=0.0, **QUIET
    )
    source, given_sizes, targets = painted(sizes, seed)
    pixels, new_sizes, valid, moved = augmentation(source, given_sizes, targets, uniform(len(sizes), NOISE, seed=seed))
    assert (pixels.shape, pixels.dtype) == (source.shape, torch.uint8)
    assert torch.equal(new_sizes, given_sizes)
    for i, (image, (height, width), own, target) in enumerate(zip(pixels, sizes, valid, moved, strict=True)):
        assert own.sum() == height * width
        assert own[0, :height, :width].all()
        if mosaic and i // 4 * 4 + 4 > len(sizes):  # the last image may be repeated
            continue
        boxes = cxcywh_to_xyxy(target.boxes_cxcywh) * torch.tensor([width, height, width, height])
        found = dict(zip(target.class_ids.tolist(), boxes, strict=True))
        assert len(found) == len(boxes)
        for class_id, paint in enumerate(PAINTS):
            place = seen(image[:height, :width], paint)
            box = found.get(class_id)
            if place is None:
                assert box is None or (box[2:] - box[:2]).min() < 2
            elif box is None:
                assert min(place[2] - place[0], place[3] - place[1]) <= 2
            else:
                assert (torch.tensor(place) - box).abs().max() <= 1.5


@given(seed=st.integers(0, 100_000), min_visible=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@settings(max_examples=60, deadline=None)
def test_boxes_that_are_visible_enough_stay(seed: int, min_visible: float) -> None:
    source, sizes, targets = painted([(64, 64)] * 4, seed)
    settings_ = {"flip": 0.0, "zoom": (1.5, 1.5), **QUIET}
    noise = uniform(4, NOISE, seed=seed)
    _, _, _, every = DetectionAugmentation(min_visible=0.0, **settings_)(source, sizes, targets, noise)
    _, _, _, some = DetectionAugmentation(min_visible=min_visible, **settings_)(source, sizes, targets, noise)
    for before, all_of_them, kept in zip(targets, every, some, strict=True):
        whole = before.boxes_cxcywh[:, 2:].prod() * 1.5**2
        share = float(all_of_them.boxes_cxcywh[:, 2:].prod() / whole) if len(all_of_them.class_ids) else 0.0
        if abs(share - min_visible) > 1e-4:
            assert len(kept.class_ids) == (len(all_of_them.class_ids) if share > min_visible else 0)
        corners = cxcywh_to_xyxy(kept.boxes_cxcywh)
        assert ((corners >= -1e-6) & (corners <= 1 + 1e-6)).all()
        assert (kept.boxes_cxcywh[:, 2:] >= 1 / 64 - 1e-6).all()


@pytest.mark.parametrize("mosaic", [0.0, 0.6])
@pytest.mark.parametrize("zoom", [(1.0, 1.0), (1.0, 1.6), (0.5, 1.6)])
def test_padding_never_reaches_the_valid_regions(zoom: tuple[float, float], mosaic: float) -> None:
    augmentation = DetectionAugmentation(flip_vertical=0.5, zoom=zoom, mosaic=mosaic, saturation=0.5, hue=0.1)
    pixels = (uniform(6, 40, 40, 3) * 255).to(torch.uint8)
    sizes = torch.tensor([[40, 40], [30, 20], [17, 40], [25, 31], [40, 8], [9, 9]])
    other = pixels.clone()
    for image, (height, width) in zip(other, sizes.tolist(), strict=True):
        image[height:], image[:, width:] = 255, 0
    for seed in range(8):
        noise = uniform(6, NOISE, seed=seed)
        moved, _, valid, _ = augmentation(pixels, sizes, [NOTHING] * 6, noise)
        other_moved, *_ = augmentation(other, sizes, [NOTHING] * 6, noise)
        mask = valid.permute(0, 2, 3, 1)
        assert ((moved * mask).int() - (other_moved * mask).int()).abs().max() <= 1


def test_zooming_out_leaves_grey_around_the_image() -> None:
    augmentation = DetectionAugmentation(flip=0.0, zoom=(0.5, 0.5), **QUIET)
    source = torch.full((1, 40, 60, 3), 250, dtype=torch.uint8)
    noise = uniform(1, NOISE)
    noise[:, 0:2] = torch.tensor([1.0, 0.0])
    pixels, _, _, _ = augmentation(source, torch.tensor([[40, 60]]), [NOTHING], noise)
    assert (pixels[0, :20, 30:] == 250).all()
    assert (pixels[0, 20:] == GREY).all()
    assert (pixels[0, :, :30] == GREY).all()


def test_a_mosaic_shows_all_four_images_and_nothing_else() -> None:
    source = PAINTS[:, None, None].expand(-1, 48, 64, -1)
    sizes = torch.tensor([[48, 64]] * 4)
    augmentation = DetectionAugmentation(mosaic=1.0, zoom=(0.5, 1.0), **QUIET)
    for seed in range(10):
        pixels, *_ = augmentation(source, sizes, [NOTHING] * 4, uniform(4, NOISE, seed=seed))
        for image in pixels:
            colors, counts = image.flatten(0, 1).unique(dim=0, return_counts=True)
            assert {tuple(color) for color in colors.tolist()} == {tuple(paint) for paint in PAINTS.tolist()}
            assert counts.min() > 0.25 * 0.25 * 48 * 64


def test_mosaic_boxes_carry_the_classes_of_their_images() -> None:
    targets = [Target(torch.full((3,), i), torch.tensor([[0.5, 0.5, 0.9, 0.9]] * 3)) for i in range(8)]
    source = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    augmentation = DetectionAugmentation(mosaic=1.0, min_visible=0.0)
    _, _, _, moved = augmentation(source, torch.tensor([[32, 32]] * 8), targets, uniform(8, NOISE))
    for i, target in enumerate(moved):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        assert sorted(target.class_ids.tolist()) == sorted([*group] * 3)
        assert target.class_ids[0] == i
