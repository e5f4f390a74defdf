import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vitrine.models.training.augmentation import augment
from vitrine.models.training.augmentation.augment import NOISE, ClassificationAugmentation
from vitrine.models.training.augmentation.randaugment import Operation, sample_operations

WIDTH, HEIGHT = 120, 90
MAGNITUDE = 8.0


def affine(*values: float) -> Callable[[Image.Image, float], Image.Image]:
    """PIL's transform by x' = x + a y + c w, y' = d x + y + f h about the centre, (a, c, d, f) times the amount."""

    def change(image: Image.Image, sign: float) -> Image.Image:
        a, c, d, f = (value * sign * MAGNITUDE / 10 for value in values)
        data = (1, a, c * WIDTH - a * HEIGHT / 2, d, 1, f * HEIGHT - d * WIDTH / 2)
        return image.transform(
            image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
        )

    return change


def rotate(image: Image.Image, sign: float) -> Image.Image:
    angle = sign * 30 * MAGNITUDE / 10
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))


def enhance(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, sign: kind(image).enhance(1 + sign * 0.9 * MAGNITUDE / 10)


EXPECTED: dict[Operation, Callable[[Image.Image, float], Image.Image]] = {
    Operation.BRIGHTNESS: enhance(ImageEnhance.Brightness),
    Operation.CONTRAST: enhance(ImageEnhance.Contrast),
    Operation.COLOR: enhance(ImageEnhance.Color),
    Operation.SHARPNESS: enhance(ImageEnhance.Sharpness),
    Operation.POSTERIZE: lambda image, _: ImageOps.posterize(image, 5),
    Operation.SOLARIZE: lambda image, _: ImageOps.solarize(image, 52),
    Operation.AUTOCONTRAST: lambda image, _: ImageOps.autocontrast(image),
    Operation.EQUALIZE: lambda image, _: ImageOps.equalize(image),
    Operation.ROTATE: rotate,
    Operation.SHEAR_X: affine(0.3, 0, 0, 0),
    Operation.SHEAR_Y: affine(0, 0, 0.3, 0),
    Operation.TRANSLATE_X: affine(0, 150 / 331, 0, 0),
    Operation.TRANSLATE_Y: affine(0, 0, 0, 150 / 331),
    Operation.IDENTITY: lambda image, _: image,
}


@pytest.fixture(scope="module")
def photo(root: Path) -> Image.Image:
    image = Image.open(root / "examples" / "frog.jpg").convert("RGB")
    return image.resize((WIDTH, HEIGHT)).point(lambda value: 20 + value * 0.8)


def rows(sampled: list[list[tuple[Operation, float]]]) -> Tensor:
    """Noise that yields these operations and signs."""
    noise = torch.full((len(sampled), NOISE), 0.5)
    for row, operations in zip(noise, sampled, strict=True):
        numbers = [(operation + 0.5) / len(Operation) for operation, _ in operations]
        numbers += [0.25 if sign < 0 else 0.75 for _, sign in operations]
        row[augment._OPERATIONS : augment._OPERATIONS + len(numbers)] = torch.tensor(numbers)
    return noise


def augmented(photo: Image.Image, sampled: list[list[tuple[Operation, float]]]) -> Tensor:
    settings = ClassificationAugmentation(
        crop="none", flip=0, randaugment_ops=len(sampled[0]), randaugment_magnitude=MAGNITUDE
    )
    source = torch.from_numpy(np.array(photo)).expand(len(sampled), -1, -1, -1)
    sizes = torch.tensor([[HEIGHT, WIDTH]]).expand(len(sampled), -1)
    class_ids = torch.zeros(len(sampled), dtype=torch.int64)
    pixels, _ = settings(source, sizes, class_ids, 2, rows(sampled), (HEIGHT, WIDTH))
    assert pixels.dtype == torch.uint8
    return pixels


def test_every_operation_is_pils(photo: Image.Image) -> None:
    sampled = [[(operation, sign)] for operation in Operation for sign in (-1.0, 1.0)]
    for pixels, [(operation, sign)] in zip(augmented(photo, sampled), sampled, strict=True):
        expected = torch.from_numpy(np.array(EXPECTED[operation](photo, sign)))
        difference = (pixels.int() - expected.int()).abs()
        # Along a slanted border a rounding error decides between image and grey.
        assert (difference > 2).float().mean() < 0.001, f"{operation.name} {sign}: {difference.max()}"


def test_geometric_operations_compose(photo: Image.Image) -> None:
    first, second = (Operation.SHEAR_X, 1.0), (Operation.ROTATE, -1.0)
    (pixels,) = augmented(photo, [[first, second]])
    expected = np.array(rotate(EXPECTED[Operation.SHEAR_X](photo, 1.0), -1.0))
    inner = slice(25, -25), slice(35, -35)
    difference = np.abs(pixels.numpy()[inner].astype(int) - expected[inner])
    assert difference.mean() < 4  # theirs is interpolated twice
    shifted = np.abs(np.roll(pixels.numpy(), 2, axis=1)[inner].astype(int) - expected[inner])
    assert shifted.mean() > 2 * difference.mean()


def test_color_operations_are_applied_in_order(photo: Image.Image) -> None:
    first, second = (Operation.SOLARIZE, 1.0), (Operation.BRIGHTNESS, -1.0)
    for order in ([first, second], [second, first]):
        expected = photo
        for operation, sign in order:
            expected = EXPECTED[operation](expected, sign)
        (pixels,) = augmented(photo, [order])
        difference = np.abs(pixels.numpy().astype(int) - np.array(expected))
        assert (difference > 3).mean() < 0.01


def test_all_operations_and_signs_are_equally_likely() -> None:
    operations, signs = sample_operations(torch.rand(14_000, 4, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(operations.flatten(), minlength=len(Operation)) / operations.numel()
    assert ((counts * len(Operation) - 1).abs() < 0.15).all()
    assert abs(signs.mean()) < 0.05
    assert math.isclose(float(signs.abs().mean()), 1)


def test_magnitude_zero_changes_little(photo: Image.Image) -> None:
    settings = ClassificationAugmentation(crop="none", flip=0, randaugment_ops=1, randaugment_magnitude=0)
    quiet = [o for o in Operation if o not in (Operation.AUTOCONTRAST, Operation.EQUALIZE)]
    source = torch.from_numpy(np.array(photo)).expand(len(quiet), -1, -1, -1)
    sizes = torch.tensor([[HEIGHT, WIDTH]]).expand(len(quiet), -1)
    noise = rows([[(operation, 1.0)] for operation in quiet])
    pixels, _ = settings(source, sizes, torch.zeros(len(quiet), dtype=torch.int64), 2, noise, (HEIGHT, WIDTH))
    assert torch.equal(pixels, source)
