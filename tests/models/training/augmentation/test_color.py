from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vitrine.models.training.augmentation.color import (
    autocontrast,
    color_jitter,
    equalize,
    posterize,
    sharpen,
    solarize,
)

AS_IS = [1.0, 1.0, 1.0, 0.0]


@pytest.fixture(scope="module", params=["frog.jpg", "blood.jpg"])
def photo(request: pytest.FixtureRequest, root: Path) -> Image.Image:
    image = Image.open(root / "examples" / request.param).convert("RGB")
    return image.resize((160, 120)).point(lambda value: 20 + value * 0.8)  # so that no channel is stretched already


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def check(changed: Tensor, expected: Image.Image, levels: int = 1) -> None:
    assert changed.dtype == torch.uint8
    assert (changed.int() - tensor(expected).int()).abs().max() <= levels


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.7, 1.0, 1.3, 1.9])
@pytest.mark.parametrize(
    ("column", "enhance"),
    [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
)
def test_color_jitter_is_pils_enhancement(photo: Image.Image, column: int, enhance: type, factor: float) -> None:
    factors = torch.tensor([AS_IS, AS_IS])
    factors[1, column] = factor
    same, changed = color_jitter(torch.stack([tensor(photo)] * 2), factors)
    assert torch.equal(same, tensor(photo))
    check(changed, enhance(photo).enhance(factor), 2)


def test_color_jitter_composes_in_order(photo: Image.Image) -> None:
    calm = photo.point(lambda value: 90 + value * 0.3)  # nothing is clipped on the way
    expected = calm
    for enhance, factor in ((ImageEnhance.Brightness, 0.8), (ImageEnhance.Contrast, 1.3), (ImageEnhance.Color, 0.5)):
        expected = enhance(expected).enhance(factor)
    check(color_jitter(tensor(calm)[None], torch.tensor([[0.8, 1.3, 0.5, 0.0]]))[0], expected, 3)


def test_a_third_of_a_hue_rotation_maps_red_to_green_and_keeps_grey() -> None:
    pixels = torch.tensor([[200, 20, 20], [90, 90, 90], [255, 255, 255]], dtype=torch.uint8)[None, None]
    turned = color_jitter(pixels, torch.tensor([[1.0, 1.0, 1.0, 1 / 3]]))
    assert turned[0, 0].tolist() == [[20, 200, 20], [90, 90, 90], [255, 255, 255]]
    back = color_jitter(turned, torch.tensor([[1.0, 1.0, 1.0, 2 / 3]]))
    assert torch.equal(back, pixels)


def test_contrast_ignores_padding(photo: Image.Image) -> None:
    pixels = tensor(photo)
    padded = torch.full((1, 150, 200, 3), 255, dtype=torch.uint8)
    padded[0, :120, :160] = pixels
    valid = torch.zeros(1, 150, 200, dtype=torch.bool)
    valid[:, :120, :160] = True
    factors = torch.tensor([[1.2, 1.5, 1.0, 0.0]])
    assert torch.equal(color_jitter(padded, factors, valid)[:, :120, :160], color_jitter(pixels[None], factors))


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
def test_sharpen_is_pils(photo: Image.Image, factor: float) -> None:
    check(sharpen(tensor(photo)[None], torch.tensor([factor]))[0], ImageEnhance.Sharpness(photo).enhance(factor), 2)


@pytest.mark.parametrize(
    ("ours", "pils"),
    [
        *(
            (lambda p, bits=bits: posterize(p, bits), lambda i, bits=bits: ImageOps.posterize(i, bits))
            for bits in (4, 8)
        ),
        *((lambda p, t=t: solarize(p, t), lambda i, t=t: ImageOps.solarize(i, t)) for t in (0, 26, 128, 256)),
        (autocontrast, ImageOps.autocontrast),
        (equalize, ImageOps.equalize),
    ],
)
def test_lookup_tables_are_pils(
    photo: Image.Image, ours: Callable[[Tensor], Tensor], pils: Callable[[Image.Image], Image.Image]
) -> None:
    flipped = ImageOps.mirror(photo).point(lambda value: 255 - value)
    changed = ours(torch.stack([tensor(photo), tensor(flipped)]))
    check(changed[0], pils(photo))
    check(changed[1], pils(flipped))


@pytest.mark.parametrize("change", [autocontrast, equalize])
def test_constant_channels_stay(change: Callable[[Tensor], Tensor]) -> None:
    pixels = torch.tensor([0, 77, 255], dtype=torch.uint8).expand(2, 8, 9, 3)
    assert torch.equal(change(pixels), pixels)
