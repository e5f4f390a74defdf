"""Geometry of the report's charts: lines, bars and ticks, which the template draws as SVG.

Positions are in chart units, `WIDTH` by `HEIGHT` from the top-left corner; the page sets the size and, for light and
dark mode, the colors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vitrine.models.training.evaluation.calibration import Reliability

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 458, 14, 250  # of the plot area
_MAX_STEPS = 8
_MIN_STEP = 1e-300
_MAX_DOTS = 40  # per curve

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A tick with its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A point of a curve, with its tooltip."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A named line."""

    name: str
    path: str  # SVG path data
    dots: list[Dot]


@dataclass(frozen=True)
class Bar:
    """A vertical bar, with its tooltip."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart, ready to draw."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]
    bars: list[Bar]
    diagonal: str = ""  # SVG path data of the line x = y


def line_chart(
    title: str,
    curves: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
) -> Chart:
    """Draw a line through the points of each curve; by default, axes cover all points and y = 0."""
    points = [point for curve in curves.values() for point in curve]
    x_low, x_high = x_range or (min(x for x, _ in points), max(x for x, _ in points))
    y_low, y_high = y_range or (min(0.0, *(y for _, y in points)), max(0.0, *(y for _, y in points)))
    y_ticks = ticks(y_low, y_high)
    y_high = max(y_high, y_ticks[-1])
    x, y = _scale(x_low, x_high, LEFT, RIGHT), _scale(y_low, y_high, BOTTOM, TOP)
    format_value = _percent if percent else _number
    lines = []
    for name, curve in curves.items():
        places = [(x(a), y(b)) for a, b in curve]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        dots = [
            Dot(*place, f"{name}: {format_value(b)} at {_number(a)}")
            for place, (a, b) in zip(places, curve, strict=True)
            if len(curve) <= _MAX_DOTS
        ]
        lines.append(Curve(name, path, dots))
    x_ticks = [Tick(x(value), _number(value)) for value in ticks(x_low, x_high) if x_low <= value <= x_high]
    return Chart(
        title,
        x_label,
        y_label,
        x_ticks,
        [Tick(y(value), format_value(value)) for value in y_ticks if value >= y_low],
        lines,
        [],
    )


def reliability_chart(title: str, reliability: Reliability) -> Chart:
    """Draw accuracy by predicted probability as bars, and the gaps to the diagonal."""
    x, y = _scale(0, 1, LEFT, RIGHT), _scale(0, 1, BOTTOM, TOP)
    bins = len(reliability.counts)
    bars = []
    for i, count in enumerate(reliability.counts.tolist()):
        if not count:
            continue
        accuracy, confidence = float(reliability.accuracy[i]), float(reliability.confidence[i])
        left, width = x(i / bins) + 1, (RIGHT - LEFT) / bins - 2
        text = f"{count:,} answers: probability {_percent(confidence)}, right {_percent(accuracy)}"
        bars.append(Bar(left, y(accuracy), width, BOTTOM - y(accuracy), "right", text))
        top, bottom = sorted((y(accuracy), y(confidence)))
        kind = "over" if confidence > accuracy else "under"
        bars.append(Bar(left, top, width, bottom - top, kind, text))
    values = [0, 0.2, 0.4, 0.6, 0.8, 1]
    return Chart(
        title,
        "probability of the answer",
        "share that is right",
        [Tick(x(value), _percent(value)) for value in values],
        [Tick(y(value), _percent(value)) for value in values],
        [],
        bars,
        f"M{LEFT} {BOTTOM}L{RIGHT} {TOP}",
    )


def ticks(low: float, high: float) -> list[float]:
    """Return ticks at equal steps of 1, 2 or 5 times a power of ten, from `low` until one reaches `high`."""
    raw_step = (high - low) / _MAX_STEPS
    if not raw_step > _MIN_STEP:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw_step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw_step * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
