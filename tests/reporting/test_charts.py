"""Charts: where points are drawn, what is left out, what the table says."""

from __future__ import annotations

import re

import pytest

from specjax.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TABLE_ROWS, TOP, WIDTH, Chart, Series, number
from tests.reporting.parsed_page import ParsedPage


def chart(*points: tuple[int, float], **settings: object) -> Chart:
    return Chart("Loss", (Series("train", points),), **settings)  # type: ignore[arg-type]


def drawn(chart: Chart) -> list[tuple[float, float]]:
    (found,) = re.findall(r'points="([^"]*)"', chart.svg())
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.split())]


def labels(chart: Chart) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", chart.svg())


def test_points_span_the_plot() -> None:
    found = drawn(chart((10, 0.0), (20, 0.5), (30, 1.0), y_range=(0.0, 1.0)))
    middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    assert found == [(LEFT, HEIGHT - BOTTOM), middle, (WIDTH - RIGHT, TOP)]


def test_fixed_ranges_leave_room() -> None:
    ((x, y),) = drawn(chart((50, 0.25), x_range=(0, 100), y_range=(0, 1)))
    assert x == (LEFT + WIDTH - RIGHT) / 2
    assert y == TOP + 0.75 * (HEIGHT - BOTTOM - TOP)


def test_a_logarithmic_axis_draws_ratios_alike() -> None:
    wide = (1, 1.0), (2, 10.0), (3, 100.0)
    ys = [y for _, y in drawn(chart(*wide, may_be_log=True))]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    for linear in (
        chart(*wide),
        chart((1, 0.0), *wide[1:], may_be_log=True),
        chart((1, 1.0), (2, 2.0), may_be_log=True),
    ):
        assert not linear.log


def test_ticks_are_round_and_named() -> None:
    assert labels(chart((0, 0.0), (450, 1.0), y_range=(0, 1))) == [
        *("0", "0.2", "0.4", "0.6", "0.8", "1"),
        *("0", "100", "200", "300", "400"),
        "step",
    ]
    assert labels(chart((1, 0.0), (7, 1.0), y_range=(0, 1)))[6:13] == [*"1234567"]
    assert labels(chart((0, 3e-5), (90_000, 6e-4), from_zero=True))[:3] == ["0", "0.0002", "0.0004"]


@pytest.mark.parametrize("value", [0.0, -3.0, 2.5, 1e-9, 1e12])
def test_one_point_has_a_place(value: float) -> None:
    ((x, y),) = drawn(chart((5, value), may_be_log=True))
    assert LEFT <= x <= WIDTH - RIGHT
    assert TOP <= y <= HEIGHT - BOTTOM


def test_a_long_curve_keeps_its_spike_and_its_end() -> None:
    points = [(step, 1.0) for step in range(1, 20_001)]
    points[7_003] = (7_004, 9.0)
    long = chart(*points, y_range=(0.0, 9.0))
    found = drawn(long)
    assert len(found) <= 600
    assert min(y for _, y in found) == TOP
    assert found[-1][0] == WIDTH - RIGHT
    rows = list(long.table())
    assert len(rows) == TABLE_ROWS
    assert (rows[0], rows[-1]) == (("1", "1"), ("20000", "1"))
    assert long.rows_left_out == 20_000 - TABLE_ROWS


def test_what_is_no_number_is_in_the_table_and_not_in_the_drawing() -> None:
    broken = chart((1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0))
    assert len(drawn(broken)) == 2
    assert list(broken.table()) == [("1", "1"), ("2", "nan"), ("3", "inf"), ("4", "2")]
    assert "no value is a number" in chart((1, float("nan"))).svg()


def test_a_table_joins_series_by_step() -> None:
    both = Chart("Loss", (Series("train", ((10, 1.0), (20, 2.0))), Series("eval", ((20, 3.0),))))
    assert list(both.table()) == [("10", "1", ""), ("20", "2", "3")]
    assert both.rows_left_out == 0


def test_labels_are_escaped_and_values_readable_without_seeing_them() -> None:
    html = Chart("<i>", (Series('"<b>"', ((1, 0.5),)),)).svg()
    page = ParsedPage(str(html))
    assert page.tags == {"svg", "line", "text", "polyline", "circle", "title"}
    assert ("svg", "aria-label", '<i>: "<b>" 0.5 (last values)') in page.attributes
    assert '"<b>", step 1: 0.5' in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00012345, "0.000123"), (3e-9, "3e-09"), (0.17136, "0.1714"), (9999.4, "9999"), (36448.0, "36,448")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
