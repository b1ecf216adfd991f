"""A report: one HTML page with everything in it, readable offline, on a phone, on paper and in the dark."""

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from PIL import Image


@dataclass(frozen=True)
class Figure:
    """A headline number, already formatted, with what it means."""

    value: str
    caption: str
    detail: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture with its caption; `pixels` are embedded as PNG."""

    pixels: UInt8[np.ndarray, "H W C"]
    caption: str
    wide: bool = False

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        buffer = BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads; all but the first column are set right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Confusion:
    """Counts by wanted class (row) and recognised class (column)."""

    counts: Int[np.ndarray, "K K"]
    names: Sequence[str]
    caption: str

    def shade(self, row: int, column: int) -> str:
        """Share of the row in a cell, as the opacity of its ground."""
        return f"{self.counts[row, column] / max(1, self.counts[row].sum()):.3f}"


@dataclass(frozen=True)
class Curve:
    """One or more lines over steps; values are drawn on a logarithmic axis."""

    lines: dict[str, tuple[Sequence[float], Sequence[float]]]
    caption: str
    x_axis: str
    y_axis: str

    @property
    def svg(self) -> Markup:
        """The chart as inline SVG that takes its colours from the page."""
        return Markup(draw_curve(self))


@dataclass(frozen=True)
class Section:
    """A headed part of the page."""

    title: str
    blocks: Sequence[Figure | Picture | Table | Confusion | Curve]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The page: headline figures first, sections next, facts (config, versions, hashes) last."""

    title: str
    subtitle: str
    figures: Sequence[Figure]
    sections: Sequence[Section]
    facts: dict[str, dict[str, str]]


def write_report(path: Path, report: Report) -> Path:
    """Write the page and return its path."""
    environment = Environment(
        loader=PackageLoader("jaxdiff.io", "."), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    path.write_text(environment.get_template("report.html.j2").render(report=report), encoding="utf-8")
    return path


WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 300, 64, 44, 14


def draw_curve(curve: Curve) -> str:
    """Draw the chart: logarithmic y, linear x, a tick at every 1-2-5 of a decade."""
    xs = [x for line in curve.lines.values() for x in line[0]]
    ys = [y for line in curve.lines.values() for y in line[1] if y > 0]
    if not ys:
        return "<svg></svg>"
    low, high = min(xs), max(max(xs), min(xs) + 1)
    bottom, top = math.log10(min(ys)) - 0.03, math.log10(max(ys)) + 0.03

    def across(x: float) -> float:
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - 12)

    def down(y: float) -> float:
        return TOP + (top - math.log10(max(y, 1e-12))) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in decade_ticks(10**bottom, 10**top):
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - 12}" y1="{down(value):.1f}" y2="{down(value):.1f}"/>'
            f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{down(value) + 4:.1f}">{value:g}</text>'
        )
    for value in round_ticks(low, high):
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 20}">'
            f"{value:g}</text>"
        )
    for number, (name, (x_values, y_values)) in enumerate(curve.lines.items()):
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(x_values, y_values))
        place = WIDTH - 24, TOP + 18 + 20 * number
        parts.append(f'<polyline class="line line{number}" points="{points}"/>')
        parts.append(
            f'<text class="name name{number}" text-anchor="end" x="{place[0]}" y="{place[1]}">'
            f"{html.escape(name)}</text>"
        )
    parts.append(
        f'<text class="axis" text-anchor="middle" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}">'
        f"{html.escape(curve.x_axis)}</text>"
        f'<text class="axis" text-anchor="middle" transform="translate(14 {HEIGHT / 2 - 10}) rotate(-90)">'
        f"{html.escape(curve.y_axis)}</text>"
    )
    label = html.escape(curve.caption, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def decade_ticks(low: float, high: float) -> list[float]:
    """Return the values 1, 2, 5 times powers of ten between two positive numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [float(f"{tick:.6g}") for tick in ticks if low <= tick <= high]


def round_ticks(low: float, high: float, number: int = 6) -> list[float]:
    """Return about `number` multiples of a round step between two numbers."""
    raw = (high - low) / number
    step = min(
        size * 10.0 ** math.floor(math.log10(raw))
        for size in (1, 2, 5, 10)
        if size * 10.0 ** math.floor(math.log10(raw)) >= raw
    )
    first = math.ceil(low / step)
    return [step * k for k in range(first, math.floor(high / step) + 1)]
