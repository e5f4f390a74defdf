import math

import pytest
import torch

from models.position import LearnedPositions, grid_centres, sine, sine_2d, valid_cells


@pytest.mark.parametrize("dim", [2, 8, 32])
def test_sine_is_the_formula(dim: int) -> None:
    coordinates = torch.tensor([0.0, 0.5, 3.0])
    encoded = sine(coordinates, dim)
    assert encoded.shape == (3, dim)
    for row, position in zip(encoded.tolist(), coordinates.tolist(), strict=True):
        for i in range(dim // 2):
            angle = position / 10000 ** (2 * i / dim)
            assert row[2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert row[2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_sine_2d_is_y_then_x() -> None:
    points = torch.tensor([[0.25, 0.5], [1.0, 0.0]])  # x, y
    encoded = sine_2d(points, 16)
    torch.testing.assert_close(encoded[:, :8], sine(points[:, 1] * 2 * math.pi, 8))
    torch.testing.assert_close(encoded[:, 8:], sine(points[:, 0] * 2 * math.pi, 8))


def test_sine_2d_keeps_leading_axes() -> None:
    assert sine_2d(torch.rand(2, 3, 5, 2), 12).shape == (2, 3, 5, 12)


def test_learned_positions_are_added_to_every_image() -> None:
    positions = LearnedPositions(5, 4)
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(positions(x) - x, positions.embedding.expand(3, -1, -1))
    assert positions.embedding.std() > 0


def test_centres_of_a_full_grid() -> None:
    y, x = grid_centres(torch.ones(1, 2, 4, dtype=torch.bool))
    torch.testing.assert_close(x[0], torch.tensor([[1 / 8, 3 / 8, 5 / 8, 7 / 8]]).expand(2, 4))
    torch.testing.assert_close(y[0], torch.tensor([[1 / 4], [3 / 4]]).expand(2, 4))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (6, 2), (6, 7)])
def test_padding_does_not_move_the_centres(height: int, width: int) -> None:
    valid = torch.zeros(2, 6, 7, dtype=torch.bool)
    valid[0, :height, :width] = True
    valid[1] = True  # the neighbour that makes padding necessary
    padded = torch.stack(grid_centres(valid))[:, :1, :height, :width]
    alone = torch.stack(grid_centres(torch.ones(1, height, width, dtype=torch.bool)))
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize(
    ("size", "cells"), [((1, 1), (1, 1)), ((8, 9), (1, 2)), ((32, 64), (4, 8)), ((25, 33), (4, 5))]
)
def test_valid_cells_round_up(size: tuple[int, int], cells: tuple[int, int]) -> None:
    valid = valid_cells(torch.tensor([size]), (4, 8), stride=8)[0]
    assert valid.any(dim=1).sum() == cells[0]
    assert valid.any(dim=0).sum() == cells[1]
    assert valid[: cells[0], : cells[1]].all()
