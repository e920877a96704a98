# SPDX-License-Identifier: Apache-2.0
"""Line charts as inline SVG, coloured by the page's style sheet so that they follow light and dark mode.

Matplotlib would bake its colours and fonts into the picture and add a dependency for a few straight lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from tools.report_html import Element, element, number

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 12, 36
LOG_RATIO = 30  # largest to smallest value from which a logarithmic axis shows more
SMOOTH_FROM = 25  # points from which a smoothed line is drawn over the values
WINDOW = 9  # points of the moving average

# A chart outside the report's page brings its colours along.
_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #63696f }
.grid { stroke: #e3e4e6 } .axis { stroke: #63696f }
polyline { fill: none; stroke-width: 2 }
polyline.train { stroke: #2f6fb3 } circle.train, text.train { fill: #2f6fb3 }
polyline.validation { stroke: #c2571a } circle.validation, text.validation { fill: #c2571a }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa1a8 } .grid { stroke: #31353a }
  polyline.train { stroke: #7fb2ea } circle.train, text.train { fill: #7fb2ea }
  polyline.validation { stroke: #f0975c } circle.validation, text.validation { fill: #f0975c }
}
"""
_LEGEND = 22  # height of its key


@dataclass(frozen=True)
class Series:
    """One line. `style` is a class of the style sheet (`train`, `validation`)."""

    label: str
    style: str
    points: Points


def smoothed(points: Points, *, window: int = WINDOW) -> Points:
    """Centred moving average over at most `window` points, fewer towards the ends.

    An exponential average would lag behind a falling loss and make training look worse than validation. A window that
    stays symmetric keeps straight lines straight.
    """
    result = []
    for index, (x, _) in enumerate(points):
        half = min(index, len(points) - 1 - index, window // 2)
        values = [y for _, y in points[index - half : index + half + 1]]
        result.append((x, sum(values) / len(values)))
    return result


def standalone(svg: Element, lines: Sequence[Series], *, title: str = "") -> str:
    """A chart from `line_chart` as a file of its own, with a key to its lines, two at most."""
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    svg.set("viewBox", f"0 {-_LEGEND} {WIDTH} {HEIGHT + _LEGEND}")
    svg.insert(0, element("style", _STYLE))
    if title:
        svg.append(element("text", title, x=4, y=-8))
    for index, line in enumerate(lines):
        svg.append(element("text", line.label, x=WIDTH - 220 + 110 * index, y=-8, class_=line.style))
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def line_chart(series: Sequence[Series], *, label: str, x_label: str = "epoch") -> Element:
    """A chart of one quantity over epochs; logarithmic when the values span a factor of `LOG_RATIO`.

    Args:
        series: at least one, each with at least one finite point.
        label: what is shown, for people who listen to the page.
        x_label: under the horizontal axis.

    Returns:
        The `<svg>` element.
    """
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) >= LOG_RATIO
    x_ticks = _ticks(min(xs), max(xs), whole=True)
    y_ticks = _log_ticks(min(ys), max(ys)) if logarithmic else _ticks(min(ys), max(ys))
    x_low, x_high = _padded(min(xs), max(xs))
    ends = (math.log10(min(ys)), math.log10(max(ys))) if logarithmic else (min(ys), max(ys))
    y_low, y_high = _padded(*ends, share=0.06)

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        value = math.log10(y) if logarithmic else y
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    svg = element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="chart")
    for tick in y_ticks:
        if TOP - 1 <= down(tick) <= HEIGHT - BOTTOM + 1:
            place = f"{down(tick):.1f}"
            svg.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=place, y2=place, class_="grid"))
            svg.append(element("text", number(tick), x=LEFT - 8, y=place, dy="0.32em", text_anchor="end"))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            place = f"{across(tick):.1f}"
            svg.append(element("text", number(tick), x=place, y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    axis = HEIGHT - BOTTOM
    svg.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=axis, y2=axis, class_="axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    svg.append(element("text", x_label, x=f"{middle:.0f}", y=HEIGHT - 4, text_anchor="middle", class_="quiet"))
    if logarithmic:
        svg.append(element("text", "log scale", x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end", class_="quiet"))

    for one in series:
        places = [(across(x), down(y)) for x, y in one.points]
        is_smoothed = len(places) >= SMOOTH_FROM and one.style == "train"
        svg.append(_line(places, f"{one.style} raw" if is_smoothed else one.style))
        if is_smoothed:
            svg.append(_line([(across(x), down(y)) for x, y in smoothed(one.points)], one.style))
        marked = list(zip(one.points, places, strict=True))
        for (x, y), (px, py) in marked if len(marked) < SMOOTH_FROM else marked[-1:]:
            title = element("title", f"{one.label}, {x_label} {number(x)}: {number(y)}")
            svg.append(element("circle", title, cx=f"{px:.1f}", cy=f"{py:.1f}", r=2.6, class_=one.style))
    return svg


def _line(places: Points, style: str) -> Element:
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_=style)


def _padded(low: float, high: float, *, share: float = 0.0) -> tuple[float, float]:
    if high == low:
        return low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    return low - share * (high - low), high + share * (high - low)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers (1, 2 or 5 times a power of ten) between the ends."""
    if high == low:
        return [low]
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1, round(step))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them while there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(powers) > 8:
        return [10.0**power for power in powers if power % 2 == 0]
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors]
