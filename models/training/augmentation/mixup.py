"""Mixup, CutMix and random erasing.

Shapes: B images of H x W pixels, K classes. Samples 2j and 2j + 1 are partners. Random numbers `noise` are uniform in
[0, 1), float [B, ...], on the CPU.
"""

import math

import torch
from scipy.special import betaincinv
from torch import Tensor

from vitrine.models.training.augmentation.resampling import chunks

_ERASED = (0.02, 1 / 3)  # smallest and largest fraction of an image
_ERASED_ASPECT = 3.3  # largest aspect ratio


def random_erasing(pixels: Tensor, noise: Tensor, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020): fill a rectangle with random pixels in some images, in place.

    It covers 2 to 33 % of an image, with an aspect ratio of up to 3.3.

    Args:
        pixels: uint8 [B, H, W, 3].
        noise: [B, 6].
    """
    chosen = (noise[:, 0] < probability).nonzero()[:, 0]
    if not len(chosen):
        return pixels
    _, area, aspect, *place, seed = noise[chosen].to(pixels.device).unbind(1)
    area = _ERASED[0] + (_ERASED[1] - _ERASED[0]) * area
    inside, _ = _rectangle(area, (2 * aspect - 1) * math.log(_ERASED_ASPECT), torch.stack(place, dim=1), pixels)
    image, row, column = inside.nonzero(as_tuple=True)
    number = row * pixels.shape[2] + column
    seeds = (seed * 2**24).long()[image] * pixels[0, ..., 0].numel()
    pixels[chosen.to(pixels.device)[image], row, column] = _random_colors(number + seeds)
    return pixels


def mixup_cutmix(pixels: Tensor, targets: Tensor, noise: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix each image and its label with its partner.

    Mixup (Zhang et al. 2018) takes the weighted mean of all pixels. CutMix (Yun et al. 2019) pastes a rectangle of the
    partner, of the image's aspect ratio and fully inside it; label weights are the exact areas.

    Args:
        pixels: uint8 [B, H, W, 3].
        targets: float [B, K].
        noise: [B, 4].
        mixup, cutmix: alpha of the weights' distribution Beta(alpha, alpha); 0: off. If both are above 0, each is
            applied to half of the images.

    Returns:
        The new pixels and targets.
    """
    pasted = noise[:, 0] < (0.5 if mixup and cutmix else float(cutmix > 0))
    partners = (torch.arange(len(pixels)) ^ 1).clamp(max=len(pixels) - 1)  # an odd last image is its own partner
    mixed, weights = torch.empty_like(pixels), torch.empty(len(pixels), 1, device=pixels.device)
    for chosen, alpha, method in ((~pasted, mixup, _mixup), (pasted, cutmix, _cutmix)):
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            weight = torch.from_numpy(betaincinv(alpha, alpha, noise[rows, 1].double().numpy())).float()
            weight, place = (tensor.to(pixels.device) for tensor in (weight, noise[rows, 2:]))
            mixed[rows], weights[rows, 0] = method(pixels[rows], pixels[partners[rows]], weight, place)
    return mixed, torch.lerp(targets[partners], targets, weights)


def _mixup(images: Tensor, partners: Tensor, weight: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    mixed = torch.empty_like(images)
    for part in chunks(images):
        blend = torch.lerp(partners[part].float(), images[part].float(), weight[part, None, None, None])
        mixed[part] = (blend + 0.5).to(torch.uint8)
    return mixed, weight


def _cutmix(images: Tensor, partners: Tensor, weight: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    inside, covered = _rectangle(1 - weight, torch.zeros_like(weight), place, images)
    return torch.where(inside[..., None], partners, images), 1 - covered


def _rectangle(area: Tensor, log_aspect: Tensor, place: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Place a rectangle of whole pixels inside each image.

    Args:
        area: float [B], fraction of the image to cover; less where an edge would be longer than the image's.
        log_aspect: float [B], logarithm of height over width, relative to the image's own.
        place: float [B, 2] in 0..1, position from top (left) to bottom (right).
        pixels: the images, [B, H, W, 3].

    Returns:
        Mask of the rectangle, bool [B, H, W], and the fraction of the image that it covers, float [B].
    """
    inside, covered = [], []
    for start, edge, direction in zip(place.unbind(1), pixels.shape[1:3], (0.5, -0.5), strict=True):
        length = (edge * area.sqrt() * torch.exp(direction * log_aspect)).round().clamp(max=edge)
        first = (start * (edge - length + 1)).floor()[:, None]
        position = torch.arange(edge, device=pixels.device)
        inside.append((position >= first) & (position < first + length[:, None]))
        covered.append(length / edge)
    return inside[0][:, :, None] & inside[1][:, None], covered[0] * covered[1]


def _random_colors(numbers: Tensor) -> Tensor:
    """Hash each number to a color, identically on every device: int64 [n] -> uint8 [n, 3]."""
    state = numbers & 0xFFFFFFFF
    for factor in (0x21F0AAAD, 0x735A2D97):
        state = ((state ^ (state >> 16)) * factor) & 0xFFFFFFFF
    return torch.stack([state >> shift for shift in (8, 16, 24)], dim=-1).to(torch.uint8)
