import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitrine.models.boxes import cxcywh_to_xyxy, generalised_iou, xyxy_to_cxcywh

GRID = 12
Corners = tuple[int, int, int, int]


def corners() -> st.SearchStrategy[Corners]:
    """Boxes on a grid, xyxy, at least one cell wide and high."""
    edge = st.tuples(st.integers(0, GRID - 1), st.integers(1, GRID)).filter(lambda pair: pair[0] < pair[1])
    return st.tuples(edge, edge).map(lambda edges: (edges[0][0], edges[1][0], edges[0][1], edges[1][1]))


def cells(box: Corners) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


def giou(a: Corners, b: Corners) -> float:
    scale = 1 / GRID
    return generalised_iou(torch.tensor(a) * scale, torch.tensor(b) * scale).item()


def test_conversion() -> None:
    xyxy, cxcywh = torch.tensor([[0.1, 0.2, 0.5, 0.8]]), torch.tensor([[0.3, 0.5, 0.4, 0.6]])
    torch.testing.assert_close(xyxy_to_cxcywh(xyxy), cxcywh)
    torch.testing.assert_close(cxcywh_to_xyxy(cxcywh), xyxy)


@given(st.lists(corners(), max_size=4))
def test_conversion_and_back(boxes: list[Corners]) -> None:
    xyxy = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / GRID
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(xyxy)), xyxy)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7 - 2 / 9),  # hull 9, union 7
        ((0, 0, 1, 1), (2, 0, 3, 1), 0 - 1 / 3),  # a gap of one
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),  # touching
        ((0, 0, 4, 4), (1, 1, 2, 2), 1 / 16),  # inside
        ((0, 0, 1, 1), (9, 9, 10, 10), -0.98),  # far apart
    ],
)
def test_by_hand(a: Corners, b: Corners, expected: float) -> None:
    assert giou(a, b) == pytest.approx(expected, abs=1e-6)


@given(corners(), corners())
def test_by_counting_cells(a: Corners, b: Corners) -> None:
    union, intersection = len(cells(a) | cells(b)), len(cells(a) & cells(b))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    assert giou(a, b) == pytest.approx(intersection / union - (hull - union) / hull, abs=1e-5)
    assert giou(a, b) == pytest.approx(giou(b, a))
    assert -1 <= giou(a, b) <= 1 + 1e-6


def test_empty_boxes_are_finite() -> None:
    points = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    value = generalised_iou(points, points.detach())
    assert value.item() == 0
    value.sum().backward()
    assert torch.isfinite(points.grad).all()


def test_broadcasts() -> None:
    a, b = torch.rand(5, 1, 4).sort(dim=-1).values, torch.rand(3, 4).sort(dim=-1).values
    pairs = generalised_iou(a, b)
    assert pairs.shape == (5, 3)
    torch.testing.assert_close(pairs[4, 2], generalised_iou(a[4, 0], b[2]))
