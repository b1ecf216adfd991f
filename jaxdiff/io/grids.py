"""Labelled grids and strips of pictures: small ones enlarged by whole pixels, white ground, names on both axes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

INK, FAINT = (28, 32, 38), (104, 112, 122)


@dataclass(frozen=True)
class GridStyle:
    """Sizes in pixels."""

    cell: int = 64
    gap: int = 4
    margin: int = 20
    text: int = 17
    title: int = 22


def labelled_grid(
    images: UInt8[np.ndarray, "N H W C"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    row_axis: str = "",
    column_axis: str = "",
    style: GridStyle = GridStyle(),
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw pictures row by row under a title, with a label for every row and column.

    Args:
      images: row by row, one for each pair of labels.
      row_labels: names at the left, cut with an ellipsis where they are long.
      column_labels: names above the columns.
      title: one line.
      row_axis: what the rows are.
      column_axis: what the columns are.
      style: sizes.

    Raises:
      ValueError: the number of images is not rows times columns.
    """
    rows, columns = len(row_labels), len(column_labels)
    if len(images) != rows * columns:
        raise ValueError(f"{rows} rows and {columns} columns need {rows * columns} images, got {len(images)}")
    factor = max(1, style.cell // max(images.shape[1:3]))
    pictures = np.repeat(np.repeat(images, factor, axis=1), factor, axis=2)
    if pictures.shape[-1] == 1:
        pictures = np.repeat(pictures, 3, axis=-1)
    height, width = pictures.shape[1:3]
    font, bold = ImageFont.load_default(style.text), ImageFont.load_default(style.title)
    names = [_shorten(name, font, 200) for name in row_labels]
    axis_width = style.text + 10 if row_axis else 0
    left = style.margin + axis_width + int(max(font.getlength(name) for name in names)) + 10
    top = style.margin + style.title + 14 + (style.text + 8 if column_axis else 0) + style.text + 8
    step_x, step_y = width + style.gap, height + style.gap
    total_width = max(left + columns * step_x - style.gap, style.margin + int(bold.getlength(title))) + style.margin
    canvas = Image.new("RGB", (total_width, top + rows * step_y - style.gap + style.margin), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((style.margin, style.margin), title, INK, bold)
    centre = left + (columns * step_x - style.gap) / 2
    pen.text((centre, top - style.text - 16), column_axis, FAINT, font, anchor="mb")
    for j, name in enumerate(column_labels):
        pen.text((left + j * step_x + width / 2, top - 8), _shorten(name, font, step_x), INK, font, anchor="mb")
    for i, name in enumerate(names):
        pen.text((left - 10, top + i * step_y + height / 2), name, INK, font, anchor="rm")
    if row_axis:
        upright = Image.new("RGB", (rows * step_y - style.gap, style.text + 6), "white")
        ImageDraw.Draw(upright).text((upright.width / 2, upright.height / 2), row_axis, FAINT, font, anchor="mm")
        canvas.paste(upright.rotate(90, expand=True), (style.margin - 4, top))
    for number, picture in enumerate(pictures):
        i, j = divmod(number, columns)
        canvas.paste(Image.fromarray(picture), (left + j * step_x, top + i * step_y))
    return np.asarray(canvas)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Cut a text with an ellipsis so that it fits the width."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
