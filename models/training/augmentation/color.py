"""Color operations: one linear map per image for brightness, contrast, saturation and hue; PIL's other operations.

All take and return uint8 [B, H, W, 3].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrine.models.training.augmentation.resampling import chunks

_LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey (ITU-R 601, as in PIL)


def color_jitter(pixels: Tensor, factors: Tensor, valid: Tensor | None = None) -> Tensor:
    """Change brightness, contrast and saturation as PIL's `ImageEnhance` does, in this order, then rotate the hue.

    All are linear, so they are composed into one 3 x 3 matrix and one offset per image; only the result is clipped.

    Args:
        factors: float [B, 4], brightness, contrast and saturation factors (1: unchanged) and the hue rotation around
            the grey axis as a fraction of a full turn (0: unchanged).
        valid: bool [B, H, W], the pixels whose mean contrast is relative to; None: all.
    """
    brightness, contrast, saturation, hue = factors[..., None, None].unbind(dim=1)  # [B, 1, 1] each
    one, luma = torch.eye(3, device=pixels.device), torch.tensor(_LUMA, device=pixels.device)
    saturated = saturation * one + (1 - saturation) * luma
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=pixels.device) / math.sqrt(3)
    cosine, sine = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    rotation = cosine * one + (1 - cosine) / 3 + sine * cross  # Rodrigues' formula
    masked = pixels if valid is None else pixels * valid[..., None]
    count = pixels[0, ..., 0].numel() if valid is None else valid.sum(dim=(1, 2))[:, None, None]
    mean = (masked.sum(dim=(1, 2), dtype=torch.int32).float() @ luma)[:, None, None] / count
    # Both matrices map greys, and thus the mean, to themselves.
    matrix = (brightness * contrast * rotation @ saturated).mT.contiguous()
    offset = brightness * (1 - contrast) * mean + 0.5
    output = torch.empty_like(pixels)
    for part in chunks(pixels):
        colors = torch.baddbmm(offset[part], pixels[part].flatten(1, 2).float(), matrix[part])
        output[part] = colors.clamp_(0, 255).to(torch.uint8).view_as(pixels[part])
    return output


def sharpen(pixels: Tensor, factors: Tensor) -> Tensor:
    """Sharpen (factor above 1) or smooth (below 1) like PIL's `ImageEnhance.Sharpness`; border pixels are unchanged.

    Args:
        factors: float [B].
    """
    image = pixels.permute(0, 3, 1, 2).float()
    inner = image[..., 1:-1, 1:-1]
    smooth = image.clone()
    smooth[..., 1:-1, 1:-1] = (9 * F.avg_pool2d(image, 3, stride=1) + 4 * inner) / 13
    image = torch.lerp(smooth, image, factors[:, None, None, None])
    return (image + 0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def posterize(pixels: Tensor, bits: int) -> Tensor:
    """Keep the highest `bits` bits of each value, 0 to 8."""
    return pixels & (256 - 2 ** (8 - bits))


def solarize(pixels: Tensor, threshold: float) -> Tensor:
    """Invert the values at or above `threshold`."""
    return torch.where(pixels < float(threshold), pixels, 255 - pixels)


def autocontrast(pixels: Tensor) -> Tensor:
    """Stretch the values of each channel to 0..255."""
    low = pixels.amin(dim=(1, 2), keepdim=True).float()
    high = pixels.amax(dim=(1, 2), keepdim=True).float()
    stretched = ((pixels - low) * (255 / (high - low).clamp(min=1)) + 0.5).to(torch.uint8)
    return torch.where(high > low, stretched, pixels)


def equalize(pixels: Tensor) -> Tensor:
    """Equalise the histogram of each channel with PIL's lookup table."""
    values = pixels.permute(0, 3, 1, 2).flatten(2).flatten(0, 1).long()  # [B * 3, H * W]
    channels = torch.arange(len(values), device=pixels.device)[:, None]
    counts = torch.bincount((channels * 256 + values).flatten(), minlength=256 * len(values)).view(-1, 256)
    highest = counts.gather(1, values.amax(dim=1, keepdim=True))
    step = (counts.sum(dim=1, keepdim=True) - highest) // 255
    below = counts.cumsum(dim=1) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=pixels.device)).to(torch.uint8)
    batch, height, width, _ = pixels.shape
    return table.gather(1, values).view(batch, 3, height, width).permute(0, 2, 3, 1)
