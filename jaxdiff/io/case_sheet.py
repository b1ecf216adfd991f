"""A sheet of single cases: each picture beside its most probable classes as bars."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxdiff.io.grids import FAINT, INK, shorten

RIGHT, WRONG, TRACK = (35, 87, 198), (205, 92, 20), (233, 235, 238)
PICTURE, MARGIN, GAP, LINE = 168, 20, 24, 28
LONGEST_NAME, BAR, NUMBER = 190, 200, 76
"""Widths in pixels: the most that class names take, a bar, and the number after it."""


class Case(NamedTuple):
    """One picture and what was made of it.

    Attributes:
      pixels: the picture.
      title: the true class.
      names: the most probable classes.
      probabilities: of those, in [0, 1].
      right: the position of the true class among them; -1 if it is not.
    """

    pixels: UInt8[np.ndarray, "_ _ 3"]
    title: str
    names: Sequence[str]
    probabilities: Sequence[float]
    right: int


def case_sheet(cases: Sequence[Case], title: str, columns: int = 2) -> UInt8[np.ndarray, "h w 3"]:
    """Draw at least one case; bars of the true class are blue, those of others orange."""
    font, bold = ImageFont.load_default(16), ImageFont.load_default(22)
    height = LINE + max(PICTURE, LINE * max(len(case.names) for case in cases)) + GAP
    longest = max(font.getlength(name) for case in cases for name in case.names)
    name_width = min(LONGEST_NAME, int(longest) + 1)
    width = name_width + 10 + BAR + NUMBER
    wide = PICTURE + GAP + width
    rows, columns = -(-len(cases) // columns), min(columns, len(cases))
    size = 2 * MARGIN + columns * wide + (columns - 1) * GAP, 2 * MARGIN + 40 + rows * height - GAP
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN + 22), title, INK, bold, anchor="ls")
    for number, case in enumerate(cases):
        row, column = divmod(number, columns)
        left, top = MARGIN + column * (wide + GAP), MARGIN + 40 + row * height
        pen.text((left, top + 18), shorten(case.title, font, wide), INK, font, anchor="ls")
        top += LINE
        canvas.paste(fit(case.pixels), (left, top))
        left += PICTURE + GAP
        for line, (name, probability) in enumerate(zip(case.names, case.probabilities)):
            middle = top + line * LINE + LINE // 2
            pen.text((left, middle), shorten(name, font, name_width), INK, font, anchor="lm")
            start = left + name_width + 10
            pen.rectangle((start, middle - 8, start + BAR, middle + 8), TRACK)
            filled = round(BAR * float(probability))
            if filled:
                pen.rectangle((start, middle - 8, start + filled, middle + 8), RIGHT if line == case.right else WRONG)
            text = f"{100 * float(probability):.1f} %"
            pen.text((left + width, middle), text, FAINT, font, anchor="rm")
    return np.asarray(canvas)


def fit(pixels: UInt8[np.ndarray, "_ _ 3"]) -> Image.Image:
    """Return the picture in a square of `PICTURE` pixels: small ones enlarged by whole pixels, large ones reduced."""
    image = Image.fromarray(pixels)
    factor = PICTURE // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((PICTURE, PICTURE), Image.Resampling.BICUBIC)
    return image
