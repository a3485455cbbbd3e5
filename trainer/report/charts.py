"""Line charts as inline SVG: no script, colours from the page's own variables, which follow the reader's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from trainer.report.template import fill

# Plots elsewhere have other ends, so they are not drawn here: `nodes/loss_plot.py` makes pixels for ComfyUI, whose
# Python has Pillow but no matplotlib, on this file's axes; the web UI's tab may not import the trainer; `benchmarks/`
# has matplotlib, which the trainer does without, and whose SVG would not follow the page's theme.
WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 46
MOST_POINTS = 800
"""More points than pixels say nothing and make a page heavy."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    style: str
    """CSS classes, which give the colour: `raw`, `teacher` or `student`, and dashes: `other`."""
    marks: bool = False
    """Show every point as a dot; for a few measured values."""


class Axis:
    """A map from values to pixels, linear or logarithmic, with round numbers to label.

    Args:
        values: all that must fit.
        start, end: pixels of the smallest and the largest value.
        log: a logarithmic axis; falls back to a linear one where a value is not positive.
        ticks: the values to label; None chooses round ones.
    """

    def __init__(
        self, values: Sequence[float], start: float, end: float, log: bool, ticks: Sequence[float] | None = None
    ) -> None:
        low, high = min(values), max(values)
        self.log = log and low > 0
        if low == high:  # a flat line goes through the middle
            low, high = (low / 2, high * 2) if self.log else (low - 1, high + 1)
        self.low, self.high, self.start, self.end = low, high, start, end
        self.ticks = list(ticks) if ticks is not None else log_ticks(low, high) if self.log else round_ticks(low, high)

    def __call__(self, value: float) -> float:
        low, high, v = (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (v - low) / (high - low) * (self.end - self.start)


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 between them where there would be fewer than three."""
    for multiples in ((1,), (1, 2, 5)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**e for e in exponents for m in multiples if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks
    return round_ticks(low, high)


def smooth(points: Sequence[Point], share: float = 0.04) -> list[Point]:
    """Each value replaced by the mean of its neighbourhood, `share` of all points wide and symmetric about it."""
    reach = round(len(points) * share / 2)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        result.append((x, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return result


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """The points, at most `most`; of each group that is merged, the lowest and the highest stay, so that peaks are
    kept."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        kept += sorted({min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])})
    return kept


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
) -> Markup:
    """A chart as an HTML figure with title and legend, empty without a point. Points that are not finite are left out.

    Args:
        title: above the chart.
        series: the lines; those that come later lie on top.
        x_label, y_label: what the axes measure, with units.
        log_x, log_y: logarithmic axes.
        x_ticks: values to label on the x axis.
    """
    shown = [Series(s.name, [p for p in s.points if all(map(math.isfinite, p))], s.style, s.marks) for s in series]
    shown = [s for s in shown if s.points]
    if not shown:
        return Markup()
    xs, ys = ([p[i] for s in shown for p in s.points] for i in (0, 1))
    x = Axis(xs, LEFT, WIDTH - RIGHT, log_x, x_ticks)
    y = Axis(ys, HEIGHT - BOTTOM, TOP, log_y)
    return fill(
        "chart.html.jinja",
        title=title,
        lines=[(s, [(x(a), y(b)) for a, b in thin(s.points)]) for s in shown],
        x=x,
        y=y,
        x_label=x_label,
        y_label=y_label,
        width=WIDTH,
        height=HEIGHT,
    )
