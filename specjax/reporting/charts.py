"""Line charts as inline SVG, and the numbers behind them as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 10, 36  # margins around the plot, which hold the axes' labels
MARKED_POINTS = 30  # a series with more has no markers
HOVER_POINTS = 60  # places of a series that show their value under the mouse
DRAWN_BUCKETS = 200
TABLE_ROWS = 40
COLORS = 6  # of style.css, .color-0 and so on
LOG_FROM = 30.0  # greatest over least value from which a chart that may be logarithmic is

Item = TypeVar("Item")


@dataclass(frozen=True)
class Series:
    """(x, y) points, x ascending. A y that is no number has a row in the table and no place in the drawing."""

    label: str
    points: Sequence[tuple[int, float]]

    @property
    def last(self) -> str:
        return number(self.points[-1][1])


@dataclass(frozen=True)
class Chart:
    """One chart.

    may_be_log: a logarithmic y axis where values differ by more than `LOG_FROM` and all are positive.
    from_zero: the y axis begins at zero, for values whose ratios matter. ordered: the series are steps of one quantity,
    and get shades of one colour. x_range, y_range: fixed ends of the axes.
    """

    title: str
    series: tuple[Series, ...]
    x_label: str = "step"
    note: str = ""
    may_be_log: bool = False
    from_zero: bool = False
    ordered: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None

    @property
    def log(self) -> bool:
        values = [y for one in self.series for _, y in _finite(one.points)]
        return self.may_be_log and bool(values) and min(values) > 0 and max(values) > LOG_FROM * min(values)

    def classes(self, index: int) -> str:
        return "ramp" if self.ordered else f"color-{index % COLORS}"

    def style(self, index: int) -> str:
        """Of ordered series: how far along the ramp, in percent."""
        return f"--along:{100 * index // max(1, len(self.series) - 1)}%" if self.ordered else ""

    def table(self) -> Iterator[tuple[str, ...]]:
        """Rows of x and every series' value there (empty where it has none); at most TABLE_ROWS, the last included."""
        values = [dict(one.points) for one in self.series]
        xs = sorted(set().union(*values))
        for x in _evenly(xs, TABLE_ROWS):
            yield str(x), *(number(y[x]) if x in y else "" for y in values)

    @property
    def rows_left_out(self) -> int:
        return max(0, len({x for one in self.series for x, _ in one.points}) - TABLE_ROWS)

    def svg(self) -> Markup:
        """The drawing; it says its title and last values to who cannot see it."""
        points = [point for one in self.series for point in _finite(one.points)]
        if not points:
            return Markup('<p class="missing">no value is a number</p>')
        x_axis = _Axis.of([x for x, _ in points], LEFT, WIDTH - RIGHT, whole=True, fixed=self.x_range)
        ys = [y for _, y in points] + [0.0] * self.from_zero
        y_axis = _Axis.of(ys, HEIGHT - BOTTOM, TOP, log=self.log, fixed=self.y_range)
        spoken = f"{self.title}: {', '.join(f'{one.label} {one.last}' for one in self.series)} (last values)"
        parts = [*_frame(x_axis, y_axis, self.x_label)]
        for index in range(len(self.series)):
            parts += _line(self, index, x_axis, y_axis)
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            WIDTH, HEIGHT, spoken, Markup("").join(parts)
        )


def number(value: float) -> str:
    """Four digits, more for large numbers; a scientific form for small ones."""
    if value and math.isfinite(value) and abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` at pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    whole: bool

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        whole: bool = False,
        fixed: tuple[float, float] | None = None,
    ) -> _Axis:
        low, high = fixed or (min(values), max(values))
        if low == high:
            margin = 1.0 if whole else abs(low) / 2 or 1.0
            low, high = (low / 2, high * 2) if log else (low - margin, high + margin)
        elif log:
            low, high = low / 1.1, high * 1.1
        elif fixed is None and not whole:
            margin = (high - low) / 20
            # An axis that nearly reaches zero shows it, and does not pass it.
            low, high = (0.0 if 0 <= low < (high - low) / 2 else low - margin), high + margin
        return cls(low, high, start, end, log, whole)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values, up to nine."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 4 else (1,)
            found = [step * 10.0**decade for decade in decades for step in steps]
            return [tick for tick in found if self.low <= tick <= self.high]
        step = (
            max(_round_step((self.high - self.low) / 8), 1.0) if self.whole else _round_step((self.high - self.low) / 5)
        )
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(least: float) -> float:
    decade = 10.0 ** math.floor(math.log10(least))
    return next(step * decade for step in (1, 2, 5, 10) if step * decade >= least * (1 - 1e-9))


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str) -> Iterator[Markup]:
    bottom = HEIGHT - BOTTOM
    for tick in y_axis.ticks():
        y = y_axis(tick)
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"></line>').format(LEFT, WIDTH - RIGHT, y, y)
        yield Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 6, y + 4, _tick(tick))
    for tick in x_axis.ticks():
        x = x_axis(tick)
        yield Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"></line>').format(x, x, bottom, bottom + 4)
        yield Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(x, bottom + 16, _tick(tick))
    yield Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"></line>').format(
        LEFT, WIDTH - RIGHT, bottom, bottom
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, HEIGHT - 5, x_label)


def _tick(value: float) -> str:
    return (
        f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.10g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
    )


def _line(chart: Chart, index: int, x_axis: _Axis, y_axis: _Axis) -> Iterator[Markup]:
    series, classes, style = chart.series[index], chart.classes(index), chart.style(index)
    points = _finite(series.points)
    drawn = " ".join(f"{x_axis(x)},{y_axis(y)}" for x, y in _extremes(points))
    yield Markup('<polyline class="{}" style="{}" points="{}"></polyline>').format(classes, style, drawn)
    radius = 2.5 if len(points) <= MARKED_POINTS else 6
    if radius > 2.5:
        classes += " hidden"
    for x, y in _evenly(points, HOVER_POINTS):
        shown = f"{series.label}, {chart.x_label} {x}: {number(y)}"
        yield Markup('<circle class="{}" style="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
            classes, style, x_axis(x), y_axis(y), radius, shown
        )


def _finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _extremes(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The least, greatest and last of every few neighbours of a long curve, to keep its spikes; all of a short one."""
    size = -(-len(points) // DRAWN_BUCKETS)
    if size <= 2:
        return list(points)
    buckets = (points[i : i + size] for i in range(0, len(points), size))
    return [
        point
        for bucket in buckets
        for point in sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1]), bucket[-1]})
    ]


def _evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly spaced, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]
