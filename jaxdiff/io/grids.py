"""Labelled grids and strips of pictures: small ones enlarged by whole pixels, white ground, names on both axes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

INK, FAINT = (28, 32, 38), (104, 112, 122)


@dataclass(frozen=True)
class GridStyle:
    """Sizes in pixels, for pictures up to `cell`; larger ones get larger text and gaps, by at most 1.6."""

    cell: int = 64
    gap: int = 4
    margin: int = 20
    text: int = 17
    title: int = 22

    def enlarged(self, side: int) -> "GridStyle":
        """Return the sizes that suit cells of `side` pixels."""
        ratio = min(max(side / self.cell, 1.0), 1.6)
        return GridStyle(side, *(round(ratio * size) for size in (self.gap, self.margin, self.text, self.title)))


def labelled_grid(
    images: UInt8[np.ndarray, "N H W C"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    row_axis: str = "",
    column_axis: str = "",
    style: GridStyle = GridStyle(),
    captions: Sequence[str] = (),
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw pictures row by row under a title, with a label for every row and column.

    Args:
      images: row by row, one for each pair of labels.
      row_labels: names at the left, on several lines where they are long, and cut where that does not suffice.
      column_labels: names above the columns.
      title: one line.
      row_axis: what the rows are.
      column_axis: what the columns are.
      style: sizes.
      captions: one line under each picture; none where there are none.

    Raises:
      ValueError: there is nothing to draw, or the number of images is not rows times columns.
    """
    rows, columns = len(row_labels), len(column_labels)
    if len(images) != rows * columns or not len(images):
        raise ValueError(f"{rows} rows and {columns} columns need {rows * columns} images, got {len(images)}")
    factor = max(1, style.cell // max(images.shape[1:3]))
    pictures = np.repeat(np.repeat(images, factor, axis=1), factor, axis=2)
    if pictures.shape[-1] == 1:
        pictures = np.repeat(pictures, 3, axis=-1)
    height, width = pictures.shape[1:3]
    style = style.enlarged(max(height, width))
    font, bold = ImageFont.load_default(style.text), ImageFont.load_default(style.title)
    pad = style.text // 2
    line_height = style.text + pad // 2
    names = [wrap(name, font, 12 * style.text, max(1, height // line_height)) for name in row_labels]
    longest = max(font.getlength(line) for name in names for line in name)
    left = style.margin + (style.text + pad if row_axis else 0) + int(longest) + pad
    top = style.margin + style.title + (style.text + pad) * (2 if column_axis else 1) + 2 * pad
    step_x, step_y = width + style.gap, height + style.gap + (line_height + pad if captions else 0)
    wide, high = columns * step_x - style.gap, rows * step_y - style.gap
    # The axis name stands over the middle of the columns, but never runs out of the picture at the left.
    centre = max(left + wide / 2, style.margin + font.getlength(column_axis) / 2)
    ends = left + wide, style.margin + bold.getlength(title), centre + font.getlength(column_axis) / 2
    canvas = Image.new("RGB", (int(max(ends)) + style.margin, top + high + style.margin), "white")
    pen = ImageDraw.Draw(canvas)
    # Anchors end in "s" (baseline), so that names with and without descenders stand on one line.
    pen.text((style.margin, style.margin + style.title), title, INK, bold, anchor="ls")
    pen.text((centre, top - style.text - 2 * pad), column_axis, FAINT, font, anchor="ms")
    for j, name in enumerate(column_labels):
        name = shorten(name, font, step_x)
        pen.text((left + j * step_x + width / 2, top - pad), name, INK, font, anchor="ms")
    for i, lines in enumerate(names):
        for j, line in enumerate(lines):
            middle = top + i * step_y + height / 2 + (j - (len(lines) - 1) / 2) * line_height
            pen.text((left - pad, middle), line, INK, font, anchor="rm")
    if row_axis:
        upright = Image.new("RGB", (high, style.text + pad), "white")
        name = shorten(row_axis, font, high)
        ImageDraw.Draw(upright).text((high / 2, upright.height / 2), name, FAINT, font, anchor="mm")
        canvas.paste(upright.rotate(90, expand=True), (style.margin - pad // 2, top))
    for number, picture in enumerate(pictures):
        i, j = divmod(number, columns)
        canvas.paste(Image.fromarray(picture), (left + j * step_x, top + i * step_y))
        if captions:
            under = left + j * step_x + width / 2, top + i * step_y + height + line_height
            pen.text(under, shorten(captions[number], font, step_x), INK, font, anchor="ms")
    return np.asarray(canvas)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """Break a text between words into lines that fit the width, `most` at most, and cut what does not fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or len(lines) == most or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [shorten(line, font, width) for line in lines]


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut a text with an ellipsis so that it fits the width."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
