"""Charts: every point stands where its axis says, ticks are round and true, and no text leaves the drawing."""

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxdiff.io.charts import MOST_POINTS, NARROW, WIDE, draw_lines, log_ticks, round_ticks, spell

SIZES = pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
PLACES = 0.06
"""Places in the SVG are written with one decimal."""


def draw(lines, size=WIDE, logarithmic=True):
    return ET.fromstring(draw_lines(lines, size, "step", "loss & more", "a <label>", logarithmic, ["c"] * len(lines)))


def points_of(svg, number=0):
    line = svg.findall(".//polyline")[number]
    return np.array([[float(v) for v in point.split(",")] for point in line.get("points").split()])


def ticks_of(svg):
    """Return (place, value) of the ticks of x and of y."""
    ticks = [text for text in svg.findall(".//text") if text.get("class") == "tick"]
    value = {id(text): float(text.text.replace(",", "")) for text in ticks}
    x = [(float(text.get("x")), value[id(text)]) for text in ticks if text.get("text-anchor") == "middle"]
    y = [(float(text.get("y")), value[id(text)]) for text in ticks if text.get("text-anchor") == "end"]
    return np.array(x), np.array(y)


@SIZES
@pytest.mark.parametrize("logarithmic", [True, False])
def test_points_and_ticks_agree_on_the_axes(size, logarithmic):
    x, y = np.arange(1, 900, 7), np.random.default_rng(0).lognormal(-3, 1, 129)
    svg = draw({"loss": (x.tolist(), y.tolist())}, size, logarithmic)
    to_axis = np.log10 if logarithmic else np.asarray
    places, (x_ticks, y_ticks) = points_of(svg), ticks_of(svg)
    for column, values, ticks in ((0, x, x_ticks), (1, to_axis(y), np.c_[y_ticks[:, 0], to_axis(y_ticks[:, 1])])):
        # The axis as its ticks tell it, extended to the points.
        slope, start = np.polyfit(ticks[:, 1], ticks[:, 0], 1)
        np.testing.assert_allclose(slope * values + start, places[:, column], atol=4 * PLACES)
    assert np.polyfit(y_ticks[:, 1], y_ticks[:, 0], 1)[0] < 0, "larger values stand higher"


@SIZES
@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "last"),
    [(0.11, 0.14, 10), (1e-9, 1e4, 1_000_000), (3.0, 3.0, 1), (0.5, 0.5000001, 2000), (1e-30, 1e30, 123_456)],
)
def test_everything_stays_inside_the_drawing(size, logarithmic, low, high, last):
    svg = draw({"loss": ([0, last], [low, high])}, size, logarithmic)
    width, height = (float(v) for v in svg.get("viewBox").split()[2:])
    assert (width, height) == (size.width, size.height)
    x, y = points_of(svg).T
    assert (x >= size.left - PLACES).all()
    assert (x <= width - size.right + PLACES).all()
    assert (y >= size.top - PLACES).all()
    assert (y <= height - size.bottom + PLACES).all()
    x_ticks, y_ticks = ticks_of(svg)
    assert len(x_ticks) >= 2
    assert len(y_ticks) >= 2
    assert (np.diff(y_ticks[:, 0]) < -size.text).all(), "numbers of y do not touch"
    for place, value in x_ticks:
        half = len(spell(value)) * size.text * 0.3
        assert half - size.text < place <= width - half + PLACES


def test_what_an_axis_cannot_show_is_left_out():
    bad = [math.nan, math.inf, -1.0, 0.0, 0.5, 0.25]
    assert len(points_of(draw({"a": (range(6), bad)}, logarithmic=True))) == 2
    assert len(points_of(draw({"a": (range(6), bad)}, logarithmic=False))) == 4


@pytest.mark.parametrize("lines", [{}, {"a": ([], [])}, {"a": ([1], [0.0])}])
def test_nothing_to_draw_says_so(lines):
    svg = draw(lines)
    assert [text.text for text in svg.findall(".//text")] == ["Nothing to draw yet."]


def test_one_point_is_a_dot():
    svg = draw({"a": ([10], [0.5])})
    assert len(svg.findall("circle")) == 1


def test_unequal_x_and_y_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        draw({"a": ([1, 2], [0.5])})


def test_a_long_line_is_thinned_but_keeps_its_extremes_and_ends():
    rng = np.random.default_rng(0)
    y = rng.random(100_000) + 1
    y[[31_234, 77_777]] = 5.0, 0.01
    whole = {"a": (range(len(y)), y.tolist())}
    few = {"a": ([0, 31_234, 77_777, len(y) - 1], y[[0, 31_234, 77_777, -1]].tolist())}
    thinned = points_of(draw(whole, logarithmic=False))
    assert len(thinned) <= 1.1 * MOST_POINTS
    assert {tuple(p) for p in points_of(draw(few, logarithmic=False))} <= {tuple(p) for p in thinned}
    assert (np.diff(thinned[:, 0]) >= 0).all()


def test_names_are_escaped():
    svg = draw({"a": ([1, 2], [1.0, 2.0])})
    assert svg.get("aria-label") == "a <label>"
    assert "loss & more" in [text.text for text in svg.findall(".//text")]


@pytest.mark.parametrize(("low", "high"), [(0, 0.3), (0, 1), (-7, 1234), (0.1199, 0.1201), (1e-9, 2e-9), (0, 100_000)])
def test_round_ticks_are_all_multiples_of_one_round_step(low, high):
    ticks = round_ticks(low, high)
    steps = np.diff(ticks)
    assert len(ticks) >= 3
    assert len(ticks) <= 7
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    mantissa = steps[0] / 10.0 ** math.floor(math.log10(steps[0] * 1.0000001))
    assert min(abs(mantissa - size) for size in (1, 2, 5)) < 1e-6
    # Within the range, and no further multiple would have fitted.
    assert low - 1e-9 * steps[0] <= ticks[0] < low + steps[0]
    assert high - steps[0] < ticks[-1] <= high + 1e-9 * steps[0]


def test_round_ticks_hold_the_ends_in_spite_of_rounding():
    assert round_ticks(0, 0.3, 3) == [0.0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize("high", [1.27, 1.5, 2.0, 4.6, 10, 99, 1e3, 1e6, 1e13, 1e60])
def test_log_ticks_are_few_but_enough(high):
    ticks = log_ticks(1.1, 1.1 * high)
    assert 3 <= len(ticks) <= 9
    assert all(1.1 <= tick <= 1.1 * high for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.05, "0.05"),
        (1500, "1,500"),
        (1_000_000, "1,000,000"),
        (2e-4, "2e-4"),
        (-0.5, "-0.5"),
        (1e12, "1e12"),
    ],
)
def test_ticks_are_spelled_as_people_write_them(value, text):
    assert spell(value) == text
