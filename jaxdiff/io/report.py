"""A report: one HTML page with everything in it, readable offline, on a phone, on paper and in the dark."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from PIL import Image

from jaxdiff.io.charts import NARROW, WIDE, Line, draw_lines

Facts = Mapping[str, Mapping[str, str]]
"""Names and values under a few heads."""


@dataclass(frozen=True)
class Figure:
    """A headline number, already formatted, with what it means."""

    value: str
    caption: str
    detail: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture with its caption; `pixels` are embedded as PNG. A wide one takes a row, and scrolls on a phone."""

    pixels: UInt8[np.ndarray, "H W C"]
    caption: str
    wide: bool = False

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        buffer = BytesIO()
        pixels = self.pixels.squeeze(-1) if self.pixels.shape[-1] == 1 else self.pixels
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads; all but the first column are set right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Confusion:
    """Counts by wanted class (row) and recognised class (column); `rows` is what the rows are called."""

    counts: Int[np.ndarray, "K K"]
    names: Sequence[str]
    caption: str
    rows: str = "asked for"

    def shade(self, row: int, column: int) -> str:
        """Strength of a cell's colour in [0, 1]: the square root of its share of the row, so that rare errors show."""
        return f"{(self.counts[row, column] / max(1, self.counts[row].sum())) ** 0.5:.3f}"

    @property
    def upright(self) -> bool:
        """Whether the names over the columns must stand upright to fit."""
        return max(len(name) for name in self.names) > 4

    @property
    def wide(self) -> bool:
        """Whether the matrix needs a row of its own."""
        return len(self.names) > 12

    @property
    def dense(self) -> bool:
        """Whether the cells must be small for the matrix to fit the page."""
        return len(self.names) > 30


@dataclass(frozen=True)
class Curve:
    """One or more lines over steps, by name.

    Attributes:
      lines: x and y of each line.
      caption: one sentence under the chart.
      x_axis: what x is.
      y_axis: what y is.
      logarithmic: draw y on a logarithmic axis, which leaves out what is not above 0.
      raw_first: of several lines, the first is noisy data that the second smooths: drawn faint behind it.
    """

    lines: Mapping[str, Line]
    caption: str
    x_axis: str
    y_axis: str
    logarithmic: bool = True
    raw_first: bool = True

    @property
    def legend(self) -> list[tuple[str, str]]:
        """CSS classes and name of each line."""
        behind = int(self.raw_first and len(self.lines) > 1)
        colours = [max(0, number - behind) % 6 for number in range(len(self.lines))]
        faint = ["faint " if behind and number == 0 else "" for number in range(len(self.lines))]
        return [(f"{pale}line{colour}", name) for pale, colour, name in zip(faint, colours, self.lines)]

    def svg(self, narrow: bool) -> Markup:
        """The chart as inline SVG that takes its colours from the page, for a wide page or for a phone."""
        classes = [css for css, _ in self.legend]
        return Markup(
            draw_lines(
                self.lines,
                NARROW if narrow else WIDE,
                self.x_axis,
                self.y_axis,
                self.caption,
                self.logarithmic,
                classes,
            )
        )


@dataclass(frozen=True)
class Section:
    """A headed part of the page."""

    title: str
    blocks: Sequence[Picture | Table | Confusion | Curve]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The page: headline figures first, sections next, facts, see `facts_of`, last."""

    title: str
    subtitle: str
    figures: Sequence[Figure]
    sections: Sequence[Section]
    facts: Facts


def facts_of(record: Mapping[str, Any], more: Mapping[str, Mapping[str, Any]] | None = None) -> Facts:
    """Return the facts about a run: its command, what else is of its kind, its config, versions and hashes.

    Args:
      record: what its results.json says, `seconds` among it.
      more: further facts under heads of their own.
    """
    facts: dict[str, Mapping[str, Any]] = {
        "Command": {"command line": record["command"], "seconds": f"{record['seconds']:.0f}"},
        **(more or {}),
        "Config": record["config"],
        "Versions": record["versions"],
        "Hashes (SHA-256)": record["hashes"],
    }
    return {head: {name: str(value) for name, value in group.items()} for head, group in facts.items()}


def write_report(path: Path, report: Report) -> Path:
    """Write the page and return its path."""
    environment = Environment(
        loader=PackageLoader("jaxdiff.io", "."), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    # "97.2 %" never breaks before its unit.
    environment.finalize = lambda value: value.replace(" %", "\N{NO-BREAK SPACE}%") if type(value) is str else value
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    path.write_text(environment.get_template("report.html.j2").render(report=report), encoding="utf-8")
    return path
