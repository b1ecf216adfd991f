"""Line charts as inline SVG: labelled axes, round ticks, linear or logarithmic, colours left to the page."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Line = tuple[Sequence[float | int], Sequence[float | int]]
"""x and y of one line."""

MOST_POINTS = 1500
"""A longer line is drawn by the lowest and the highest point of each stretch, so that no spike is lost."""

FEW_POINTS = 25
"""A line of fewer points gets a dot on each of them."""


@dataclass(frozen=True)
class ChartSize:
    """Sizes in units of the drawing, which the page scales to its width."""

    width: int
    height: int
    text: int
    left: int
    x_ticks: int
    right: int = 24
    top: int = 12
    bottom: int = 52


WIDE = ChartSize(width=920, height=320, text=14, left=76, x_ticks=9)
NARROW = ChartSize(width=420, height=300, text=15, left=78, x_ticks=4)


def draw_lines(
    lines: Mapping[str, Line],
    size: ChartSize,
    x_axis: str,
    y_axis: str,
    label: str,
    logarithmic: bool,
    classes: Sequence[str],
) -> str:
    """Return the chart as SVG text.

    Args:
      lines: by name; points that the axis cannot show are left out: not finite, or not above 0 on a logarithmic axis.
      size: of the drawing.
      x_axis: what x is, with its unit.
      y_axis: what y is, with its unit.
      label: what a screen reader says.
      logarithmic: draw y on a logarithmic axis.
      classes: CSS classes of each line.
    """
    drawn = [_thin(_visible(line, logarithmic)) for line in lines.values()]
    xs, ys = [x for line in drawn for x, _ in line], [y for line in drawn for _, y in line]
    height = size.height if xs else 40
    open_tag = f'<svg viewBox="0 0 {size.width} {height}" role="img" aria-label="{html.escape(label)}">'
    if not xs:
        return f'{open_tag}<text class="tick" y="24" font-size="{size.text}">Nothing to draw yet.</text></svg>'
    to_x = _scale(min(xs), max(xs), 0.0, size.left, size.width - size.right, logarithmic=False)
    to_y = _scale(min(ys), max(ys), 0.06, size.height - size.bottom, size.top, logarithmic)
    parts = [open_tag, f'<g font-size="{size.text}">', *_grid(to_x, to_y, size), *_axis_names(x_axis, y_axis, size)]
    parts.append("</g>")
    for line, css in zip(drawn, classes, strict=True):
        points = [(f"{to_x.place(x):.1f}", f"{to_y.place(y):.1f}") for x, y in line]
        parts.append(f'<polyline class="{css}" points="{" ".join(",".join(point) for point in points)}"/>')
        if len(points) <= FEW_POINTS:
            parts += [f'<circle class="{css}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in points]
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Scale:
    """A map from values to places along one axis."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    def place(self, value: float | int) -> float:
        """Return where a value stands."""
        low, high, at = ((math.log10(v) if self.logarithmic else v) for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def _scale(low: float | int, high: float | int, room: float, start: int, end: int, logarithmic: bool) -> _Scale:
    """Return the scale that shows low..high with a share of `room` on both sides."""
    if logarithmic:
        spare = (high / low) ** room if high > low else 1.5
        return _Scale(low / spare, high * spare, float(start), float(end), True)
    if high == low:
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
    spare = (high - low) * room
    return _Scale(float(low - spare), float(high + spare), float(start), float(end), False)


def _visible(line: Line, logarithmic: bool) -> list[tuple[float | int, float | int]]:
    """Return the points that the axes can show."""
    points = ((x, y) for x, y in zip(*line, strict=True) if math.isfinite(x) and math.isfinite(y))
    return [(x, y) for x, y in points if y > 0 or not logarithmic]


def _thin(points: list[tuple[float | int, float | int]]) -> list[tuple[float | int, float | int]]:
    """Return at most about `MOST_POINTS` points, with every extreme and both ends kept."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = -(-len(points) // (MOST_POINTS // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        here = range(start, min(start + stretch, len(points)))
        kept |= {min(here, key=lambda i: points[i][1]), max(here, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _grid(to_x: _Scale, to_y: _Scale, size: ChartSize) -> list[str]:
    """Return a rule and a number at every tick of y, a number at every tick of x."""
    parts = []
    for value in (log_ticks if to_y.logarithmic else round_ticks)(to_y.low, to_y.high):
        y = f"{to_y.place(value):.1f}"
        parts.append(f'<line class="rule" x1="{size.left}" x2="{size.width - size.right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" text-anchor="end" x="{size.left - 10}" y="{y}" dy=".35em">{spell(value)}</text>'
        )
    for value in round_ticks(to_x.low, to_x.high, size.x_ticks):
        # A digit is about 0.6 of the text size wide; a long last number moves left rather than out of the picture.
        text = spell(value)
        x = min(to_x.place(value), size.width - 0.3 * size.text * len(text))
        below = size.height - size.bottom + size.text + 6
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{below}">{text}</text>')
    return parts


def _axis_names(x_axis: str, y_axis: str, size: ChartSize) -> list[str]:
    """Return the names of both axes, y turned upright."""
    middle = (size.left + size.width - size.right) / 2, (size.top + size.height - size.bottom) / 2
    return [
        f'<text class="axis" text-anchor="middle" x="{middle[0]}" y="{size.height - 6}">{html.escape(x_axis)}</text>',
        f'<text class="axis" text-anchor="middle" transform="translate({size.text} {middle[1]}) rotate(-90)">'
        f"{html.escape(y_axis)}</text>",
    ]


def spell(value: float | int) -> str:
    """Write a tick: 0.05, 1,500, 2e-4."""
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.6e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.10g}".replace("e+", "e")


def log_ticks(low: float | int, high: float | int, most: int = 9) -> list[float]:
    """Return 1, 2, 5 times powers of ten, or powers of ten alone where the range is long; round ticks where short."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 5), ((1,), 20)):
        values = [float(f"{digit}e{power}") for power in powers if power % every == 0 for digit in digits]
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) >= 3 else round_ticks(low, high)


def round_ticks(low: float | int, high: float | int, number: int = 6) -> list[float]:
    """Return the multiples in low..high of the finest step of 1, 2 or 5 times a power of ten; up to `number` + 1."""
    power = 10.0 ** math.floor(math.log10((high - low) / number))
    for size in (1, 2, 5, 10):
        step = size * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first <= number:
            break
    return [float(f"{step * k:.12g}") for k in range(first, last + 1)]
