import math

import pytest
import torch
from torch import Tensor

from models.transformer import Block, DetrDecoderBlock, DetrEncoderBlock, DropPath, Mlp, SpatialPrior


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_drop_path_keeps_the_expectation(probability: float) -> None:
    dropped = DropPath(probability)(torch.ones(40_000, 2, 1))
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    kept = 1 / (1 - probability)
    assert ((dropped == 0) | torch.isclose(dropped, torch.tensor(kept))).all()
    assert (dropped[:, 0] == dropped[:, 1]).all()  # a sample is dropped as a whole


def test_drop_path_is_identity_outside_training() -> None:
    x = torch.randn(8, 3)
    assert DropPath(0.0)(x) is x
    assert DropPath(0.9).eval()(x) is x


def test_mlp_works_on_the_last_axis() -> None:
    mlp, x = Mlp(4, 16), torch.randn(2, 3, 4)
    torch.testing.assert_close(mlp(x)[1, 2], mlp(x[1, 2]))


def test_block_is_residual_around_normed_branches() -> None:
    block, x = Block(8, 2, 4.0), torch.randn(2, 5, 8)
    middle = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))


def test_block_whose_branches_are_dropped_is_the_identity() -> None:
    block, x = Block(8, 2, 4.0, drop_path=0.999999), torch.randn(2, 5, 8)
    torch.testing.assert_close(block.train()(x), x)


def test_encoder_block_does_not_see_padding() -> None:
    block = DetrEncoderBlock(8, 2, 16, 0.0)
    x, positions = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    bias = torch.zeros(1, 1, 1, 6)
    bias[..., 4:] = -math.inf
    alone = block(x[:, :4], positions[:, :4], torch.zeros(1, 1, 1, 4))
    torch.testing.assert_close(block(x, positions, bias)[:, :4], alone)


def test_spatial_prior_is_the_formula() -> None:
    prior = SpatialPrior(3)
    torch.nn.init.normal_(prior.offset)
    boxes, cells = torch.rand(2, 4, 4) + 0.1, torch.rand(2, 5, 2)
    bias = prior(boxes, cells)
    assert bias.shape == (2, 3, 4, 5)
    for image, head, query, cell in torch.cartesian_prod(*map(torch.arange, bias.shape)).tolist():
        cx, cy, w, h = boxes[image, query].tolist()
        x, y = cells[image, cell].tolist()
        shift_x, shift_y = prior.offset[head].tolist()
        factor = prior.log_factor[head].exp().item()
        dx, dy = (x - cx - shift_x * w) / (w * factor), (y - cy - shift_y * h) / (h * factor)
        assert bias[image, head, query, cell].item() == pytest.approx(-(dx * dx + dy * dy) / 2, rel=1e-4, abs=1e-5)


def test_spatial_prior_is_largest_at_the_centre_of_the_box() -> None:
    cells = torch.tensor([[[0.5, 0.5], [0.6, 0.5], [0.9, 0.9]]])
    bias = SpatialPrior(4)(torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), cells)[0, :, 0]  # [H, 3]
    assert (bias[:, 0] == 0).all()
    assert (bias.diff(dim=-1) < 0).all()


def decode(block: DetrDecoderBlock, queries: Tensor, groups: int, **changes: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "memory": torch.randn(2, 5, 8, generator=generator),
        "positions": torch.randn(2, 5, 8, generator=generator),
        "padding_bias": torch.zeros(2, 1, 1, 5),
        "cells": torch.rand(2, 5, 2, generator=generator),
        "query_positions": torch.randn(queries.shape, generator=generator),
        "reference_boxes": torch.rand(*queries.shape[:2], 4, generator=generator) + 0.1,
    }
    return block(queries, **{**inputs, **changes}, groups=groups)


@pytest.mark.parametrize("groups", [2, 3])
def test_query_groups_do_not_see_each_other(groups: int) -> None:
    block = DetrDecoderBlock(8, 2, 16, 0.0)
    queries = torch.randn(2, 6, 8)
    own = 6 // groups
    other = queries.clone()
    other[:, own:] = torch.randn(2, 6 - own, 8)
    torch.testing.assert_close(decode(block, other, groups)[:, :own], decode(block, queries, groups)[:, :own])
    assert not torch.allclose(decode(block, other, 1)[:, :own], decode(block, queries, 1)[:, :own])


def test_first_group_alone_answers_the_same() -> None:
    block = DetrDecoderBlock(8, 2, 16, 0.0)
    queries, positions, boxes = torch.randn(2, 6, 8), torch.randn(2, 6, 8), torch.rand(2, 6, 4) + 0.1
    together = decode(block, queries, 3, query_positions=positions, reference_boxes=boxes)[:, :2]
    alone = decode(block, queries[:, :2], 1, query_positions=positions[:, :2], reference_boxes=boxes[:, :2])
    torch.testing.assert_close(together, alone)


def test_decoder_block_does_not_see_padding() -> None:
    block, queries = DetrDecoderBlock(8, 2, 16, 0.0), torch.randn(2, 4, 8)
    bias = torch.zeros(2, 1, 1, 5)
    bias[..., 3:] = -math.inf
    memory = torch.randn(2, 5, 8)
    other = memory.clone()
    other[:, 3:] = 100
    torch.testing.assert_close(
        decode(block, queries, 1, memory=other, padding_bias=bias),
        decode(block, queries, 1, memory=memory, padding_bias=bias),
    )
