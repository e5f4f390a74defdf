import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrine.models.training.evaluation.calibration import Reliability
from vitrine.models.training.evaluation.charts import BOTTOM, LEFT, RIGHT, TOP, line_chart, reliability_chart, ticks


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_cover_the_range(start: float, span: float) -> None:
    low = start * span
    marks = ticks(low, low + span)
    steps = np.diff(marks)
    assert 2 <= len(marks) <= 10
    assert low - 1e-6 * span <= marks[0]
    assert marks[-1] >= low + span - 1e-6 * span
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3, atol=1e-9 * abs(low))


def test_round_numbers() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(1, 13) == [2, 4, 6, 8, 10, 12, 14]
    assert ticks(0, 8) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert ticks(0, 9) == [0, 2, 4, 6, 8, 10]  # at most eight steps
    assert ticks(0, 60) == [0, 10, 20, 30, 40, 50, 60]
    assert ticks(3, 3) == [3]


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 1e6)), min_size=1, max_size=60))
def test_curves_stay_inside_the_plot(points: list[tuple[float, float]]) -> None:
    chart = line_chart("loss", {"loss": points}, x_label="epoch")
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", chart.curves[0].path)]
    assert all(LEFT - 0.1 <= x <= RIGHT + 0.1 for x in numbers[::2])
    assert all(TOP - 0.1 <= y <= BOTTOM + 0.1 for y in numbers[1::2])
    assert all(LEFT - 0.1 <= tick.at <= RIGHT + 0.1 for tick in chart.x_ticks)
    assert all(TOP - 0.1 <= tick.at <= BOTTOM + 0.1 for tick in chart.y_ticks)


def test_higher_is_further_up_and_later_further_right() -> None:
    chart = line_chart("accuracy", {"top1": [(1, 0.2), (2, 0.6)]}, x_label="epoch", y_range=(0, 1), percent=True)
    first, second = chart.curves[0].dots
    assert (first.x, second.x) == (LEFT, RIGHT)
    assert BOTTOM > first.y > second.y > TOP
    assert second.text == "top1: 60 % at 2"
    assert [tick.text for tick in chart.y_ticks] == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]


def test_axes_cover_all_points_and_zero() -> None:
    chart = line_chart("loss", {"a": [(1, 3), (5, 2.5)], "b": [(2, 4)]}, x_label="epoch")
    assert [tick.text for tick in chart.y_ticks] == ["0", "0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4"]
    assert [tick.text for tick in chart.x_ticks] == ["1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5"]
    for marks, first, last in ((chart.x_ticks, LEFT, RIGHT), (chart.y_ticks, BOTTOM, TOP)):
        assert (marks[0].at, marks[-1].at) == pytest.approx((first, last))
    assert [dot.text for curve in chart.curves for dot in curve.dots] == ["a: 3 at 1", "a: 2.5 at 5", "b: 4 at 2"]
    inside = line_chart("loss", {"a": [(0.1, -0.7)]}, x_label="epoch", x_range=(0.15, 1.95))
    assert [tick.text for tick in inside.x_ticks] == ["0.5", "1", "1.5"]
    assert inside.y_ticks[-1].text == "0"


@pytest.mark.parametrize(("points", "dots"), [(1, 1), (40, 40), (41, 0)])
def test_long_curves_have_no_dots(points: int, dots: int) -> None:
    chart = line_chart("loss", {"loss": [(i, i) for i in range(points)]}, x_label="epoch")
    assert len(chart.curves[0].dots) == dots


def test_bars_stand_side_by_side_with_a_gap() -> None:
    shares = np.linspace(0.1, 0.9, 5)
    chart = reliability_chart("reliability", Reliability(np.ones(5, int), shares, shares))
    bars = [bar for bar in chart.bars if bar.kind == "right"]
    assert (bars[0].x, bars[-1].x + bars[-1].width) == pytest.approx((LEFT + 1, RIGHT - 1))
    assert [after.x - bar.x - bar.width for bar, after in pairwise(bars)] == pytest.approx([2] * 4)
    assert [bar.y + bar.height for bar in bars] == pytest.approx([BOTTOM] * 5)
    for marks, first, last in ((chart.x_ticks, LEFT, RIGHT), (chart.y_ticks, BOTTOM, TOP)):
        assert (marks[0].at, marks[-1].at) == (first, last)
        assert [tick.text for tick in marks] == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]


def test_bins_without_answers_have_no_bars() -> None:
    reliability = Reliability(np.array([0, 4, 6]), np.array([0, 0.5, 0.9]), np.array([0, 0.7, 0.8]))
    chart = reliability_chart("reliability", reliability)
    assert [bar.kind for bar in chart.bars] == ["right", "under", "right", "over"]
    assert chart.bars[0].text == "4 answers: probability 50 %, right 70 %"
    assert chart.bars[3].y + chart.bars[3].height == pytest.approx(chart.bars[2].y)  # from the accuracy up
    heights = [bar.height / (BOTTOM - TOP) for bar in chart.bars]
    assert heights == pytest.approx([0.7, 0.2, 0.8, 0.1])
