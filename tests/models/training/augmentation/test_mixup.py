import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrine.models.training.augmentation.mixup import mixup_cutmix, random_erasing


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def plain(count: int, height: int, width: int) -> Tensor:
    """Uniform grey images: 50, 200, 50, 200, ..."""
    greys = torch.tensor([50, 200], dtype=torch.uint8).repeat(count)[:count]
    return greys[:, None, None, None].expand(-1, height, width, 3).contiguous()


@given(seed=st.integers(0, 10_000), alpha=st.floats(0.05, 10), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=50, deadline=None)
def test_label_weights_match_the_pixels(seed: int, alpha: float, size: tuple[int, int]) -> None:
    pixels, targets = plain(8, *size), F.one_hot(torch.arange(8), 8).float()
    for mixup, cutmix, tolerance in ((alpha, 0.0, 0.5 / 150), (0.0, alpha, 1e-5)):
        mixed, labels = mixup_cutmix(pixels, targets, uniform(8, 4, seed=seed), mixup, cutmix)
        assert mixed.dtype == torch.uint8
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(8))
        partners = torch.arange(8) ^ 1
        seen = (mixed.double().mean(dim=(1, 2, 3)) - pixels[partners, 0, 0, 0]) / (
            pixels[:, 0, 0, 0].double() - pixels[partners, 0, 0, 0]
        )
        assert (labels.diagonal() - seen).abs().max() <= tolerance
        assert ((labels > 0).nonzero() == torch.stack((torch.arange(8), torch.arange(8)), dim=1)[:, None]).any()
        torch.testing.assert_close(labels[torch.arange(8), partners], 1 - labels.diagonal())


def test_cutmix_pastes_one_rectangle_at_its_place() -> None:
    rows = torch.arange(20, dtype=torch.uint8)[:, None, None].expand(20, 30, 3)
    pixels = torch.stack((rows, rows + 100))
    mixed, labels = mixup_cutmix(
        pixels, torch.eye(2), torch.tensor([[0.9, 0.5, 0.3, 0.9], [0.9, 0.4, 0.0, 0.0]]), 0.0, 1.0
    )
    pasted = mixed[0, ..., 0] >= 100
    top, left = pasted.nonzero().amin(dim=0)
    bottom, right = pasted.nonzero().amax(dim=0) + 1
    assert pasted[top:bottom, left:right].all()
    assert pasted.sum() == (bottom - top) * (right - left) == round(float(labels[0, 1]) * 600)
    assert torch.equal(mixed[0, pasted], pixels[1, pasted])
    assert torch.equal(mixed[0, ~pasted], pixels[0, ~pasted])


def test_each_of_both_is_used_for_half_of_the_images() -> None:
    pixels = plain(400, 8, 8)
    mixed, _ = mixup_cutmix(pixels, torch.zeros(400, 2), uniform(400, 4), 5.0, 5.0)
    blended = ((mixed != 50) & (mixed != 200)).flatten(1).any(dim=1)
    assert 0.4 < blended.float().mean() < 0.6


@pytest.mark.parametrize(("alpha", "variance"), [(0.2, 0.1786), (1.0, 1 / 12), (8.0, 0.0147)])
def test_weights_follow_the_beta_distribution(alpha: float, variance: float) -> None:
    _, labels = mixup_cutmix(plain(4000, 1, 1), torch.eye(2).repeat(2000, 1), uniform(4000, 4), alpha, 0.0)
    own = labels[torch.arange(4000), torch.arange(4000) % 2]
    assert float(own.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(own.var()) == pytest.approx(variance, rel=0.1)  # 1 / (4 (2 alpha + 1))


@pytest.mark.parametrize("count", [1, 3])
def test_an_image_without_a_partner_stays(count: int) -> None:
    pixels, targets = plain(count, 6, 6), torch.eye(4)[:count]
    mixed, labels = mixup_cutmix(pixels, targets, uniform(count, 4), 1.0, 1.0)
    assert torch.equal(mixed[-1], pixels[-1])
    torch.testing.assert_close(labels[-1], targets[-1])


def test_erase_follows_the_papers_areas_and_ratios() -> None:
    erased = random_erasing(plain(600, 60, 60), uniform(600, 6), 1.0) != plain(600, 60, 60)
    for mask in erased.any(dim=-1):
        rows, columns = mask.nonzero(as_tuple=True)
        height, width = (int(index.max() - index.min() + 1) for index in (rows, columns))
        assert 0.015 < height * width / 3600 < 0.35
        assert 1 / 4 < height / width < 4  # whole pixels
        assert mask.sum() > 0.9 * height * width
    everywhere = erased.any(dim=-1).float().mean(dim=0)
    assert everywhere[[0, -1]].any(dim=1).all()
    assert everywhere[:, [0, -1]].any(dim=0).all()
    torch.testing.assert_close(everywhere, everywhere.flip(0, 1), atol=0.1, rtol=0)


def test_erasing_selects_the_expected_images() -> None:
    noise = uniform(500, 6)
    erased = (random_erasing(plain(500, 20, 20), noise, 0.25) != plain(500, 20, 20)).flatten(1).any(dim=1)
    assert torch.equal(erased, noise[:, 0] < 0.25)
    assert not (random_erasing(plain(500, 20, 20), noise, 0.0) != plain(500, 20, 20)).any()


def test_erased_pixels_are_random() -> None:
    noise = uniform(300, 6)
    pixels = random_erasing(torch.zeros(300, 64, 64, 3, dtype=torch.uint8), noise, 1.0)
    values = pixels[(pixels > 0).any(dim=-1)].double()
    assert values.mean(dim=0).tolist() == pytest.approx([127.5] * 3, abs=1)
    assert values.std(dim=0).tolist() == pytest.approx([73.9] * 3, abs=1)
    correlation = torch.corrcoef(torch.cat((values[:-1].T, values[1:].T))) - torch.eye(6)
    assert correlation.abs().max() < 0.02
    again = random_erasing(torch.zeros(300, 64, 64, 3, dtype=torch.uint8), noise, 1.0)
    assert torch.equal(again, pixels)
