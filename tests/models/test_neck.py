"""The neck between DETR's backbone and decoder."""

import pytest
import torch

from vitrine.models.neck import FusionNeck

CHANNELS = (3, 5, 7)


def maps(height: int, width: int) -> list[torch.Tensor]:
    """Random maps of strides 8, 16 and 32; `height` and `width` are those of stride 16."""
    scales = zip(CHANNELS, (2, 1, 0.5), strict=True)
    return [torch.randn(1, channels, int(height * scale), int(width * scale)) for channels, scale in scales]


@pytest.fixture
def neck() -> FusionNeck:
    torch.manual_seed(0)
    return FusionNeck(CHANNELS, 8)


def test_memory_has_the_cells_of_stride_16(neck: FusionNeck) -> None:
    memory = neck(maps(4, 6), torch.randn(1, 6, 8), torch.ones(1, 4, 6, dtype=torch.bool))
    assert memory.shape == (1, 24, 8)


@pytest.mark.parametrize("part", range(4))
def test_every_map_and_the_encoder_reach_their_own_cells(neck: FusionNeck, part: int) -> None:
    """A change in the first cell is seen there, and not in the opposite corner; the coarsest map only as tokens."""
    levels, tokens, valid = maps(8, 12), torch.randn(1, 24, 8), torch.ones(1, 8, 12, dtype=torch.bool)
    before = neck(levels, tokens, valid)
    changed = [*levels, tokens.transpose(1, 2).unflatten(2, (4, 6))]
    changed[part] = changed[part].clone()
    changed[part][..., 0, 0] += 1
    after = neck(changed[:3], changed[3].flatten(2).transpose(1, 2), valid)
    difference = (after - before).abs().sum(dim=-1).unflatten(1, (8, 12))[0]
    assert (difference[0, 0] > 1e-3) == (part != 2)
    assert difference[7, 11] < 1e-5


def test_padding_is_not_seen(neck: FusionNeck) -> None:
    levels, tokens = maps(4, 6), torch.randn(1, 6, 8)
    valid = torch.ones(1, 4, 6, dtype=torch.bool)
    valid[:, :, 4:] = False
    before = neck(levels, tokens, valid).unflatten(1, (4, 6))[:, :, :4]
    other = [level.clone() for level in levels]
    for level in other:
        level[..., level.shape[-1] * 2 // 3 :] = 100
    torch.testing.assert_close(neck(other, tokens, valid).unflatten(1, (4, 6))[:, :, :4], before)
