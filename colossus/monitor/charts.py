"""Charts as SVG, drawn without a library: lines that keep their width at any size, text that stays text.

A plot is an SVG stretched over a box, with its labels as HTML around it, so that one drawing serves a phone
and a desktop. The numbers under the pointer are shown by `report.js` from the data put beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MAX_POINTS = 600  # of a line; more can't be seen
LEAST_REACH = 3  # values on either side that are smoothed over, at least
WIDTH, HEIGHT = 1000.0, 300.0  # of the drawing, in its own units


@dataclass(frozen=True)
class Line:
    """name: as the legend says it. style: classes of `report.css` (`one` to `four`, `faint`, `dots`; `loose`:
    dots that no line joins)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "one"


@dataclass(frozen=True)
class Chart:
    """Lines over steps.

    levels: horizontal lines with their names. marks: steps at which a restart or the like happened, with
    their names. top_quantile: leaves out of the scale the highest values beyond it.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    say: Callable[[float], str] = lambda value: f"{value:.4g}"
    levels: Sequence[tuple[str, float]] = ()
    marks: Sequence[tuple[float, str]] = ()
    x_max: float = 1.0
    x_tokens: Callable[[float], str] | None = None
    from_zero: bool = False
    top_quantile: float = 1.0
    note: str = ""
    wide: bool = False


def draw(chart: Chart) -> str:
    """HTML of a chart; empty where there is nothing finite to draw."""
    lines = [line for line in map(_thinned, chart.lines) if line.x]
    if not lines:
        return ""
    low, high = _range(chart, lines)
    ticks = nice_ticks(low, high, 4)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def px(x: float) -> float:
        return WIDTH * x / max(chart.x_max, 1e-12)

    def py(y: float) -> float:
        return HEIGHT * (1 - (y - low) / (high - low))

    svg = [f'<line class="grid" x1="0" x2="{WIDTH:g}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>' for t in ticks]
    svg += [
        f'<line class="mark" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="0" y2="{HEIGHT:g}"/>'
        for x, _ in chart.marks
    ]
    svg += [
        f'<line class="level" x1="0" x2="{WIDTH:g}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
        for _, y in chart.levels
    ]
    for line in lines:
        if "loose" in line.style:
            continue
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        svg.append(f'<polyline class="{line.style}" points="{points}"/>')
    html = [f'<div class="y" style="top:{_share(py(t), HEIGHT)}">{escape(chart.say(t))}</div>' for t in ticks]
    html += _x_labels(chart)
    html += _level_labels(chart, py)
    html += [
        f'<div class="mark-name" style="left:{_share(px(x), WIDTH)}">{escape(name)}</div>'
        for x, name in chart.marks
    ]
    html += [
        f'<i class="dot {line.style}" style="left:{_share(px(x), WIDTH)};top:{_share(py(y), HEIGHT)}"></i>'
        for line in lines
        if "dots" in line.style
        for x, y in zip(line.x, line.y, strict=True)
        if low <= y <= high
    ]
    data = [
        {
            "name": line.name,
            "style": line.style,
            "x": [_brief(x) for x in line.x],
            "y": [_brief(y) for y in line.y],
        }
        for line in lines
        if "quiet" not in line.style
    ]
    packed = escape(json.dumps({"lines": data, "xMax": chart.x_max, "low": low, "high": high}), quote=True)
    legend = "".join(
        f'<span class="key {line.style}">{escape(line.name)}</span>'
        for line in chart.lines
        if len(chart.lines) > 1
    )
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    classes = "chart" + " wide" * bool(chart.wide) + " levels" * bool(chart.levels)
    title = escape(chart.title, quote=True)
    return (
        f'<figure class="{classes}"><figcaption><b>{title}</b>{unit}'
        f'<span class="legend">{legend}</span></figcaption>'
        f'<div class="plot" data-plot="{packed}"><svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" '
        f'preserveAspectRatio="none" role="img" aria-label="{title}">{"".join(svg)}</svg>'
        f"{''.join(html)}</div>{note}</figure>"
    )


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`, in about so many steps of 1, 2, 2.5 or 5."""
    span = max(high - low, 1e-9 * max(abs(low), abs(high)), 1e-300)
    magnitude = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if span / (m * magnitude) <= about + 0.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def smoothed(values: Sequence[float], share: float = 0.02) -> list[float]:
    """A running mean over about `share` of the values on either side, without those that are not finite.

    At both ends the window stays as wide, and the straight line through it by least squares says what is left
    or right of its middle (Savitzky and Golay 1964, first order): no bias by the slope, and no jump to the
    last value alone.
    """
    reach = max(LEAST_REACH, int(len(values) * share))
    y = np.array(values, np.float64)
    finite = np.isfinite(y)
    x = np.arange(len(y), dtype=np.float64)
    moments = [finite, finite * x, finite * x * x, np.where(finite, y, 0.0), np.where(finite, y, 0.0) * x]
    sums = np.array([np.concatenate([[0.0], np.cumsum(moment)]) for moment in moments])
    first = np.clip(np.arange(len(y)) - reach, 0, max(0, len(y) - 2 * reach - 1))
    stop = np.minimum(first + 2 * reach + 1, len(y))
    n, sx, sxx, sy, sxy = sums[:, stop] - sums[:, first]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y = sx / n, sy / n
        spread = sxx - sx * mean_x
        slope = np.where(spread > 0.25, (sxy - sx * mean_y) / spread, 0.0)  # of two values and more
        at_end = (x - first < reach) | (stop - 1 - x < reach)
        line = np.where(at_end, mean_y + slope * (x - mean_x), mean_y)
    return [float(value) for value in line]


def _thinned(line: Line) -> Line:
    """At most MAX_POINTS finite points: of each bucket the lowest and the highest, so that spikes stay."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if len(points) > MAX_POINTS:
        per = math.ceil(2 * len(points) / MAX_POINTS)
        buckets = [points[i : i + per] for i in range(0, len(points), per)]
        points = [
            p
            for bucket in buckets
            for p in sorted({min(bucket, key=lambda q: q[1]), max(bucket, key=lambda q: q[1])})
        ]
    return Line(line.name, [x for x, _ in points], [y for _, y in points], line.style)


def _range(chart: Chart, lines: Sequence[Line]) -> tuple[float, float]:
    values = sorted(y for line in lines for y in line.y)
    highest = values[min(len(values) - 1, int(len(values) * chart.top_quantile))]
    lowest = 0.0 if chart.from_zero else values[0]
    levels = [value for _, value in chart.levels]
    low, high = min([lowest, *levels]), max([highest, *levels])
    return (low, high) if high > low else (low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9)


def _x_labels(chart: Chart) -> list[str]:
    ticks = [t for t in nice_ticks(0, chart.x_max, 5) if t <= chart.x_max]
    labels = []
    for tick in ticks:
        text = f"{tick:,.0f}" if tick == round(tick) else f"{tick:g}"
        tokens = f"<small>{escape(chart.x_tokens(tick))}</small>" if chart.x_tokens and chart.wide else ""
        labels.append(f'<div class="x" style="left:{_share(tick, chart.x_max)}">{text}{tokens}</div>')
    return labels


def _level_labels(chart: Chart, py: Callable[[float], float]) -> list[str]:
    """Names of the levels at the right; close ones are pushed apart."""
    labels, least = [], 0.075 * HEIGHT
    previous = -math.inf
    for name, value in sorted(chart.levels, key=lambda level: -level[1]):
        y = max(py(value), previous + least)
        previous = y
        text = escape(f"{name} {chart.say(value)}")
        labels.append(f'<div class="level-name" style="top:{_share(y, HEIGHT)}">{text}</div>')
    return labels


def _share(value: float, whole: float) -> str:
    return f"{100 * value / max(whole, 1e-12):.2f}%"


def _brief(value: float) -> float:
    return float(f"{value:.6g}")
