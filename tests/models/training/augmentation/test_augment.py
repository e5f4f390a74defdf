from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from vitrine.models.training.augmentation.augment import NOISE, ClassificationAugmentation, DetectionAugmentation
from vitrine.models.training.augmentation.resampling import GREY
from vitrine.models.training.targets import Target

LAST = 1 - 2**-24  # largest value of torch.rand
OFF: dict[str, Any] = {"crop": "none", "flip": 0.0}
EVERYTHING: dict[str, Any] = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "randaugment_ops": 2,
    "erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int) -> Tensor:
    return (uniform(*shape) * 256).to(torch.uint8)


def smooth(count: int, height: int, width: int) -> Tensor:
    """Images whose red is 2 x and green 2 y, at the centre of each pixel."""
    x, y = (2 * torch.arange(edge) + 1 for edge in (width, height))
    planes = torch.stack(torch.broadcast_tensors(x, y[:, None], torch.tensor(77)), dim=-1)
    return planes.to(torch.uint8).expand(count, -1, -1, -1)


def classify(
    source: Tensor, noise: Tensor, size: tuple[int, int] | None = None, sizes: Tensor | None = None, **changes: Any
) -> tuple[Tensor, Tensor]:
    count, height, width, _ = source.shape
    if sizes is None:
        sizes = torch.tensor([[height, width]]).expand(count, -1)
    augmentation = ClassificationAugmentation(**changes)
    return augmentation(source, sizes, torch.arange(count) % 5, 5, noise, size or (height, width))


def detect(source: Tensor, noise: Tensor, targets: list[Target], **changes: Any) -> tuple[Tensor, list[Target]]:
    sizes = torch.tensor([source.shape[1:3]]).expand(len(source), -1)
    pixels, _, _, moved = DetectionAugmentation(**changes)(source, sizes, targets, noise)
    return pixels, moved


def boxes(count: int) -> list[Target]:
    """No box in the first image, one in the second, ..."""
    return [
        Target(torch.arange(i), 0.2 + 0.6 * uniform(i, 4, seed=i) * torch.tensor([1, 1, 0.5, 0.5]))
        for i in range(count)
    ]


def test_without_augmentation_pixels_and_labels_stay() -> None:
    source = images(4, 9, 12, 3)
    pixels, targets = classify(source, uniform(4, NOISE), **OFF)
    assert torch.equal(pixels, source)
    assert torch.equal(targets, torch.eye(5)[:4])
    zoom = {"zoom": (1.0, 1.0), "brightness": 0, "contrast": 0}
    pixels, moved = detect(source, uniform(4, NOISE), boxes(4), flip=0, **zoom)
    assert torch.equal(pixels, source)
    for before, after in zip(boxes(4), moved, strict=True):
        assert torch.equal(before.boxes_cxcywh, after.boxes_cxcywh)


def test_a_whole_crop_is_the_image() -> None:
    source = images(4, 20, 20, 3)
    pixels, _ = classify(source, uniform(4, NOISE), crop="resized", scale=(1, 1), ratio=(1, 1), flip=0)
    assert torch.equal(pixels, source)
    pixels, _ = detect(
        source, uniform(4, NOISE), boxes(4), flip=0, zoom=(0.5, 2), zoom_probability=0, contrast=0, brightness=0
    )
    assert torch.equal(pixels, source)


@pytest.mark.parametrize("ops", [0, 1])
@pytest.mark.parametrize("crop", ["none", "shift"])
def test_flip(ops: int, crop: str) -> None:
    source, noise = images(40, 8, 10, 3), uniform(40, NOISE)
    noise[:, 20] = LAST  # RandAugment's identity
    pixels, _ = classify(source, noise, crop=crop, padding=0, flip=0.5, randaugment_ops=ops)
    flipped = (pixels == source.flip(2)).flatten(1).all(dim=1)
    same = (pixels == source).flatten(1).all(dim=1)
    assert (same ^ flipped).all()
    assert 8 < flipped.sum() < 32
    assert torch.equal(classify(source, noise, crop="none", flip=1)[0], source.flip(2))


@pytest.mark.parametrize("ops", [0, 1])
def test_shift_is_at_most_an_eighth_with_grey_fill(ops: int) -> None:
    source, noise = images(400, 16, 24, 3).clamp(min=129), uniform(400, NOISE)
    noise[:, 20] = LAST
    pixels, _ = classify(source, noise, crop="shift", padding=0.125, flip=0.5, randaugment_ops=ops)
    moves = []
    for before, after in zip(source, pixels, strict=True):
        found = []
        for dy, dx, flipped in product(range(-2, 3), range(-3, 4), (False, True)):
            shifted = torch.full_like(before, GREY)
            rows, columns = slice(max(0, dy), 16 + min(0, dy)), slice(max(0, dx), 24 + min(0, dx))
            sources = slice(max(0, -dy), 16 + min(0, -dy)), slice(max(0, -dx), 24 + min(0, -dx))
            shifted[rows, columns] = before[sources]
            if torch.equal(after, shifted.flip(1) if flipped else shifted):
                found.append((dy, dx, flipped))
        assert len(found) == 1
        moves += found
    assert len(set(moves)) == 70


@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([(0.08, 1.0), (0.5, 0.5), (1.0, 1.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.3, 0.4)]),
    sizes=st.lists(st.tuples(st.integers(30, 100), st.integers(30, 100)), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_resized_crops_have_the_configured_areas_and_ratios(
    seed: int, scale: tuple[float, float], ratio: tuple[float, float], sizes: list[tuple[int, int]]
) -> None:
    source, noise = smooth(len(sizes), 100, 100), uniform(len(sizes), NOISE, seed=seed)
    pixels, _ = classify(source, noise, (40, 50), torch.tensor(sizes), crop="resized", scale=scale, ratio=ratio)
    assert pixels.shape == (len(sizes), 40, 50, 3)
    assert (pixels[..., 2] == 77).all()
    for image, (height, width) in zip(pixels.float(), sizes, strict=True):
        # Positions in the source; the outermost half pixel may be replicated.
        x, y = image[:, :, 0] / 2, image[:, :, 1] / 2
        assert x.max() <= width
        assert y.max() <= height
        seen_width = float((x[:, 40] - x[:, 10]).abs().mean()) * 50 / 30
        seen_height = float((y[30] - y[10]).mean()) * 40 / 20
        fits = seen_width < width - 2 and seen_height < height - 2
        area = seen_width * seen_height / (height * width)
        slack = 2 / min(seen_width, seen_height)
        assert area < scale[1] * (1 + slack)
        if fits:
            assert area > scale[0] * (1 - slack)
        assert ratio[0] * (1 - slack) < seen_width / seen_height < ratio[1] * (1 + slack)


@pytest.mark.parametrize("crop", ["shift", "none"])
def test_images_of_another_size_are_refused(crop: str) -> None:
    with pytest.raises(ValueError, match=rf"crop={crop}: .* found \(8, 9\) and \(9, 9\)"):
        classify(images(2, 8, 9, 3), uniform(2, NOISE), (9, 9), crop=crop)


@pytest.mark.parametrize("crop", ["resized", "shift"])
def test_augmentation_of_labelled_images_does_not_depend_on_the_batch(crop: str) -> None:
    source, noise, class_ids = images(16, 32, 32, 3), uniform(16, NOISE), torch.arange(16) % 5
    augmentation = ClassificationAugmentation(crop=crop, **EVERYTHING)
    assert augmentation.group == 2
    sizes = torch.tensor([[32, 32]] * 16)
    whole = augmentation(source, sizes, class_ids, 5, noise, (32, 32))
    torch.testing.assert_close(whole[1].sum(dim=1), torch.ones(16))
    for parts in ([slice(0, 4), slice(4, 16)], [slice(0, 8), slice(8, 12), slice(12, 16)]):
        shares = [augmentation(source[p], sizes[p], class_ids[p], 5, noise[p], (32, 32)) for p in parts]
        for one, several in zip(whole, zip(*shares, strict=True), strict=True):
            assert torch.equal(one, torch.cat(several))


def test_augmentation_of_images_with_boxes_does_not_depend_on_the_batch() -> None:
    source, noise, targets = images(12, 32, 40, 3), uniform(12, NOISE), boxes(12)
    changes = {"mosaic": 0.5, "zoom": (0.5, 2.0), "saturation": 0.3, "hue": 0.1, "flip_vertical": 0.5}
    assert DetectionAugmentation(**changes).group == 4
    pixels, moved = detect(source, noise, targets, **changes)
    for parts in ([slice(0, 4), slice(4, 12)], [slice(0, 8), slice(8, 12)]):
        shares = [detect(source[part], noise[part], targets[part], **changes) for part in parts]
        assert torch.equal(pixels, torch.cat([share for share, _ in shares]))
        for one, other in zip(moved, [target for _, share in shares for target in share], strict=True):
            assert torch.equal(one.class_ids, other.class_ids)
            assert torch.equal(one.boxes_cxcywh, other.boxes_cxcywh)


def test_each_image_depends_on_its_own_noise_only() -> None:
    source = images(1, 24, 24, 3).expand(6, -1, -1, -1)
    noise = uniform(6, NOISE)
    noise[5] = noise[0]
    changes = {**EVERYTHING, "mixup": 0.0, "cutmix": 0.0, "randaugment_magnitude": 10.0}
    pixels, _ = classify(source, noise, **changes)
    before = source.clone()
    assert torch.equal(pixels[0], pixels[5])
    assert len(pixels.flatten(1).unique(dim=0)) == 5
    assert torch.equal(source, before)


@pytest.mark.parametrize("number", [0.0, LAST])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("changes", [{}, {"crop": "shift"}, {"crop": "none"}])
def test_extreme_noise_and_small_images(number: float, count: int, changes: dict[str, Any]) -> None:
    for size in ((1, 1), (3, 2), (32, 32)):
        source, noise = images(count, *size, 3), torch.full((count, NOISE), number)
        settings_ = {**EVERYTHING, **changes, "erasing": 1.0}
        pixels, targets = classify(source, noise, **settings_)
        assert (pixels.shape, pixels.dtype) == (source.shape, torch.uint8)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(count))
        pixels, moved = detect(source, noise, boxes(count), mosaic=1.0, zoom=(0.5, 3), hue=0.5, min_visible=0)
        assert (pixels.shape, pixels.dtype) == (source.shape, torch.uint8)
        assert all(target.boxes_cxcywh.isfinite().all() for target in moved)


def test_batches_without_objects_work() -> None:
    nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    for mosaic in (0.0, 1.0):
        _, moved = detect(images(3, 20, 20, 3), uniform(3, NOISE), [nothing] * 3, mosaic=mosaic)
        assert [target.boxes_cxcywh.shape for target in moved] == [(0, 4)] * 3


@pytest.mark.parametrize(
    "changes", [{"crop": "none", "flip": 0.0, **EVERYTHING}, {}, {"crop": "shift", "scale": [0.2, 0.3]}]
)
def test_settings_survive_json(changes: dict[str, Any]) -> None:
    augmentation = ClassificationAugmentation(**changes)
    assert ClassificationAugmentation.model_validate_json(augmentation.model_dump_json()) == augmentation
    assert (
        DetectionAugmentation.model_validate_json(DetectionAugmentation().model_dump_json()) == DetectionAugmentation()
    )


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ClassificationAugmentation, {"scale": (0.5, 0.2)}, "expected the lower bound first, found 0.5 and 0.2"),
        (ClassificationAugmentation, {"scale": (0.0, 0.2)}, "greater than 0"),
        (ClassificationAugmentation, {"ratio": (2, 1)}, "lower bound first"),
        (ClassificationAugmentation, {"flip": 2}, "less than or equal to 1"),
        (ClassificationAugmentation, {"randaugment_magnitude": 11}, "less than or equal to 10"),
        (ClassificationAugmentation, {"mosaic": 1}, "Extra inputs"),
        (DetectionAugmentation, {"zoom": (0.2, 1)}, "greater than or equal to 0.5"),
        (DetectionAugmentation, {"zoom": (2, 1)}, "lower bound first"),
        (DetectionAugmentation, {"hue": 0.6}, "less than or equal to 0.5"),
    ],
)
def test_invalid_settings_are_refused(kind: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**changes)
