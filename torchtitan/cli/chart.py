"""A chart as an SVG element: curves over the steps of a run, drawn without any library, so that a page needs none."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 26
MOST_POINTS = 2000
"""Of a curve that is drawn: of more, each span of steps gives its lowest and its highest."""
LOG_FROM = 100
"""A positive curve whose largest value is as many times the smallest gets a logarithmic axis, where that is allowed."""


@dataclass(frozen=True)
class Curve:
    name: str
    points: Sequence[Point]
    color: str
    kind: str = "line"
    """Or "line under": another may cover it; "dots": few values, drawn with their places; "lost": trained again."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: float
    text: str
    color: str


def draw(
    curves: Sequence[Curve], *, marks: Sequence[Mark] = (), from_zero: bool = False, may_be_log: bool = False
) -> str:
    """The SVG element; empty if no curve has a point. The steps are on the horizontal axis."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    values = [y for _, y in points]
    is_log = may_be_log and min(values) > 0 and max(values) / min(values) > LOG_FROM
    low, high = (min(values) / 1.2, max(values) * 1.2) if is_log else _range(values, from_zero=from_zero)
    y_ticks = list(_ticks_of_log(low, high) if is_log else _ticks(low, high))
    first, last = _range([x for x, _ in [*points, *((mark.step, 0) for mark in marks)]], margin=0)
    x_of = _scale(first, last, LEFT, WIDTH - RIGHT)
    y_of = _scale(low, high, HEIGHT - BOTTOM, TOP, is_log=is_log)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" role="img">']
    for value in y_ticks:
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.2f}" x2="{WIDTH - RIGHT}" y2="{y:.2f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.2f}">{to_text(value)}</text>')
    parts += [
        f'<text class="x" x="{x_of(value):.2f}" y="{HEIGHT - 8}">{to_text(value)}</text>'
        for value in _ticks(first, last, about=6)
        if value == round(value)  # there is no half of a step
    ]
    for mark in marks:
        x = x_of(mark.step)
        line = f'x1="{x:.2f}" y1="{TOP}" x2="{x:.2f}" y2="{HEIGHT - BOTTOM}"'
        parts.append(f'<line class="mark" stroke="{mark.color}" {line}><title>{escape(mark.text)}</title></line>')
    for curve in curves:
        places = [(x_of(x), y_of(y)) for x, y in thin(curve.points)]
        title = f"<title>{escape(curve.name)}</title>"
        if curve.kind == "dots":
            parts += [
                f'<circle fill="{curve.color}" cx="{x:.2f}" cy="{y:.2f}" r="3.5">'
                f"<title>{escape(curve.name)}: {to_text(value)} at step {step:g}</title></circle>"
                for (x, y), (step, value) in zip(places, thin(curve.points), strict=True)
            ]
        if places:
            path = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
            parts.append(f'<polyline class="{curve.kind}" stroke="{curve.color}" points="{path}">{title}</polyline>')
    return "\n".join([*parts, "</svg>"])


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about so many of the points, all extremes among them."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    spans = (points[begin : begin + size] for begin in range(0, len(points), size))
    return [point for span in spans for point in sorted({min(span, key=lambda p: p[1]), max(span, key=lambda p: p[1])})]


def to_text(value: float) -> str:
    """12,500 or 0.0003: four digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _range(values: Sequence[float], *, margin: float = 0.05, from_zero: bool = False) -> Point:
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    room = margin * (high - low)
    # an axis of positive values does not begin below 0
    return (low if low == 0 else max(low - room, 0) if low > 0 else low - room), high + room


def _scale(low: float, high: float, begin: float, end: float, *, is_log: bool = False) -> Callable[[float], float]:
    def place(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)
        return begin + share * (end - begin)

    return place


def _ticks(low: float, high: float, about: int = 5) -> Iterator[float]:
    """Round numbers between the two, at most `about`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield float(f"{i * step:.12g}")


def _ticks_of_log(low: float, high: float) -> Iterator[float]:
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    yield from (10.0**power for power in powers[:: math.ceil(len(powers) / 6)])
