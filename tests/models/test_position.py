import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vitrine.models.position import (
    LearnedPositions,
    PositionEncoding,
    grid_points,
    interpolate_positions,
    make_positions,
    nearest_valid_cells,
    sincos_2d,
    sine,
    sine_2d,
    valid_cells,
)

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rectangle(grid: tuple[int, int], height: int, width: int) -> Tensor:
    """bool [h, w], True in the top-left rectangle."""
    valid = torch.zeros(grid, dtype=torch.bool)
    valid[:height, :width] = True
    return valid


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


@pytest.mark.parametrize(("class_token", "tokens"), [(False, 6), (True, 7)])
def test_learned_positions_are_added_to_every_image(class_token: bool, tokens: int) -> None:
    positions = LearnedPositions((2, 3), 4, class_token=class_token)
    x = torch.randn(5, tokens, 4)
    torch.testing.assert_close(positions(x) - x, positions.embedding.expand(5, -1, -1))
    assert positions.embedding.std().item() == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("encoding", ["sine_1d", "sine_2d"])
def test_sine_positions_are_fixed_and_leave_a_class_token_as_it_is(
    encoding: PositionEncoding, class_token: bool
) -> None:
    positions = make_positions(encoding, (2, 3), 8, class_token=class_token)
    assert not list(positions.parameters())
    assert not positions.state_dict()
    x = torch.randn(5, class_token + 6, 8)
    added = positions(x) - x
    places = added[:, int(class_token) :]
    expected = sine(torch.arange(6.0), 8)[None] if encoding == "sine_1d" else sincos_2d((2, 3), 8)
    torch.testing.assert_close(places, expected.expand(5, -1, -1))
    assert (added[:, : int(class_token)] == 0).all()


@settings(deadline=None, max_examples=20)
@given(grid=GRIDS)
def test_sine_positions_tell_every_place_from_every_other(grid: tuple[int, int]) -> None:
    for embedding in (sine(torch.arange(float(grid[0] * grid[1])), 16), sincos_2d(grid, 16)[0]):
        distances = torch.cdist(embedding, embedding) + torch.eye(len(embedding))
        assert distances.min() > 1e-2


def test_no_positions() -> None:
    x = torch.randn(2, 6, 8)
    assert torch.equal(make_positions("none", (2, 3), 8, class_token=False)(x), x)
    assert isinstance(make_positions("learned", (2, 3), 8, class_token=False), LearnedPositions)


@pytest.mark.parametrize(("encoding", "dim"), [("sine_1d", 7), ("sine_2d", 10), ("sine_2d", 4)])
def test_dimension_that_sines_cannot_fill(encoding: PositionEncoding, dim: int) -> None:
    with pytest.raises(ValueError, match=f"embed_dim: expected .* for {encoding}, found {dim}"):
        make_positions(encoding, (2, 2), dim, class_token=False)


@settings(deadline=None, max_examples=20)
@given(grid=GRIDS, prefix=st.integers(0, 2))
def test_positions_of_the_same_grid_stay_as_they_are(grid: tuple[int, int], prefix: int) -> None:
    embedding = torch.randn(1, prefix + grid[0] * grid[1], 3)
    assert torch.equal(interpolate_positions(embedding, grid, grid), embedding)


@settings(deadline=None, max_examples=40)
@given(old=GRIDS, new=GRIDS, prefix=st.integers(0, 2))
def test_vectors_before_the_grid_are_kept_bit_for_bit(old: tuple[int, int], new: tuple[int, int], prefix: int) -> None:
    embedding = torch.randn(1, prefix + old[0] * old[1], 3)
    resized = interpolate_positions(embedding, old, new)
    assert resized.shape == (1, prefix + new[0] * new[1], 3)
    assert torch.equal(resized[:, :prefix], embedding[:, :prefix])


@settings(deadline=None, max_examples=40)
@given(old=GRIDS, new=GRIDS)
def test_a_constant_grid_stays_constant(old: tuple[int, int], new: tuple[int, int]) -> None:
    vector = torch.randn(3)
    resized = interpolate_positions(vector.expand(1, old[0] * old[1], 3), old, new)
    torch.testing.assert_close(resized, vector.expand(1, new[0] * new[1], 3), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(old=GRIDS, new=GRIDS)
def test_a_ramp_keeps_its_direction(old: tuple[int, int], new: tuple[int, int]) -> None:
    assume(min(*old, *new) > 1)
    rows, columns = torch.meshgrid(torch.arange(float(old[0])), torch.arange(float(old[1])), indexing="ij")
    embedding = torch.stack((rows, columns), dim=-1).reshape(1, -1, 2)
    down, right = interpolate_positions(embedding, old, new).reshape(*new, 2).unbind(-1)
    assert (down.diff(dim=0) > 0).all()
    assert (right.diff(dim=1) > 0).all()
    assert down.diff(dim=1).abs().max() < 1e-4
    assert right.diff(dim=0).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((4, 7), (9, 5)), ((8, 8), (8, 3))]
)
def test_positions_are_resized_as_pillow_resizes_an_image(old: tuple[int, int], new: tuple[int, int]) -> None:
    embedding = torch.randn(1, old[0] * old[1], 3)
    resized = interpolate_positions(embedding, old, new).reshape(*new, 3)
    for channel, image in enumerate(embedding.reshape(*old, 3).unbind(-1)):
        expected = Image.fromarray(image.numpy()).resize((new[1], new[0]), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(resized[..., channel].numpy(), np.asarray(expected), atol=1e-5)


def test_centres_of_a_full_grid() -> None:
    x, y = grid_points(torch.ones(1, 2, 4, dtype=torch.bool), 0.5).unbind(-1)
    torch.testing.assert_close(x[0], torch.tensor([[1 / 8, 3 / 8, 5 / 8, 7 / 8]]).expand(2, 4))
    torch.testing.assert_close(y[0], torch.tensor([[1 / 4], [3 / 4]]).expand(2, 4))


def test_corners_of_a_full_grid() -> None:
    x, y = grid_points(torch.ones(1, 2, 4, dtype=torch.bool), 1.0).unbind(-1)
    torch.testing.assert_close(x[0], torch.tensor([[1 / 4, 1 / 2, 3 / 4, 1]]).expand(2, 4))
    torch.testing.assert_close(y[0], torch.tensor([[1 / 2], [1.0]]).expand(2, 4))


@pytest.mark.parametrize("offset", [0.5, 1.0])
@settings(deadline=None, max_examples=30)
@given(grid=GRIDS, data=st.data())
def test_padding_does_not_move_the_points(offset: float, grid: tuple[int, int], data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, grid[0])), data.draw(st.integers(1, grid[1]))
    neighbour = rectangle(grid, *grid)  # makes padding necessary
    padded = grid_points(torch.stack((rectangle(grid, height, width), neighbour)), offset)
    alone = grid_points(torch.ones(1, height, width, dtype=torch.bool), offset)
    assert torch.equal(padded[:1, :height, :width], alone)
    assert padded.isfinite().all()


def test_points_and_their_encoding_are_those_of_published_detr() -> None:
    """DETR's `PositionEmbeddingSine`, with `normalize=True`."""
    valid, half = torch.stack((rectangle((5, 7), 3, 6), rectangle((5, 7), 5, 7))), 8
    y, x = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
    y, x = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi, x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    index = torch.arange(half, dtype=torch.float32)
    wavelengths = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / half)
    parts = []
    for angles in (y[..., None] / wavelengths, x[..., None] / wavelengths):
        parts.append(torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=4).flatten(3))
    expected = torch.cat(parts, dim=3)
    found = sine_2d(grid_points(valid, 1.0), 2 * half)
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "cells"), [((1, 1), (1, 1)), ((8, 9), (1, 2)), ((32, 64), (4, 8)), ((25, 33), (4, 5))]
)
def test_valid_cells_round_up(size: tuple[int, int], cells: tuple[int, int]) -> None:
    assert torch.equal(valid_cells(torch.tensor([size]), (4, 8), stride=8)[0], rectangle((4, 8), *cells))


@settings(deadline=None, max_examples=40)
@given(grid=GRIDS, stride=st.sampled_from([1, 2, 16, 32]), data=st.data())
def test_sampling_the_mask_rounds_up_where_the_padded_edges_are_whole_cells(
    grid: tuple[int, int], stride: int, data: st.DataObject
) -> None:
    image = (grid[0] * stride, grid[1] * stride)
    sizes = torch.tensor([[data.draw(st.integers(1, edge)) for edge in image] for _ in range(2)])
    assert torch.equal(nearest_valid_cells(sizes, image, grid), valid_cells(sizes, grid, stride))


@settings(deadline=None, max_examples=40)
@given(image=st.tuples(st.integers(1, 100), st.integers(1, 100)), data=st.data())
def test_sampling_the_mask_is_torchs_nearest_interpolation(image: tuple[int, int], data: st.DataObject) -> None:
    grid = (math.ceil(image[0] / 32), math.ceil(image[1] / 32))
    height, width = data.draw(st.integers(1, image[0])), data.draw(st.integers(1, image[1]))
    padding = ~rectangle(image, height, width)  # the mask as in published DETR
    expected = ~F.interpolate(padding[None, None].float(), size=grid).to(torch.bool)[0, 0]
    assert torch.equal(nearest_valid_cells(torch.tensor([[height, width]]), image, grid)[0], expected)


def test_sampling_the_mask_differs_from_rounding_up_where_an_edge_is_not_whole() -> None:
    sizes, image, grid = torch.tensor([[17, 33]]), (33, 33), (2, 2)
    assert valid_cells(sizes, grid, 32)[0].tolist() == [[True, True], [False, False]]
    assert nearest_valid_cells(sizes, image, grid)[0].tolist() == [[True, True], [True, True]]
