"""A confusion matrix of very many classes as a picture: neighbours share a cell, class numbers stand at the axes."""

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxdiff.io.charts import round_ticks
from jaxdiff.io.grids import FAINT

RIGHT, WRONG = np.array([35, 87, 198]), np.array([205, 92, 20])
MOST_CELLS, SIDE = 125, 900
"""Cells and pixels along a side; a cell is then never smaller than 7 pixels."""
LEFT, TOP, END = 88, 62, 24
"""Pixels beside the matrix: for the row numbers, the column numbers, and free."""


def block_size(num_classes: int) -> int:
    """Return how many neighbouring classes share a row of cells."""
    return -(-num_classes // MOST_CELLS)


def block_shares(counts: Int[np.ndarray, "K K"]) -> Float[np.ndarray, "k k"]:
    """Return for each block of true classes the shares of its pictures that go to each block of recognised classes."""
    block = block_size(len(counts))
    spare = -len(counts) % block
    padded = np.pad(counts, ((0, spare), (0, spare)))
    cells = len(padded) // block
    sums = padded.reshape(cells, block, cells, block).sum(axis=(1, 3))
    return sums / np.maximum(sums.sum(axis=1, keepdims=True), 1)


def heat_map(counts: Int[np.ndarray, "K K"], rows: str, columns: str) -> UInt8[np.ndarray, "h w 3"]:
    """Draw the matrix: blue on the diagonal, orange beside it, darker for more of the row.

    Args:
      counts: pictures by true class (row) and recognised class (column).
      rows: what the rows are called.
      columns: what the columns are called.
    """
    # The square root, so that rare errors show.
    shares = np.sqrt(block_shares(counts))[..., None]
    ink = np.where(np.eye(len(shares), dtype=bool)[..., None], RIGHT, WRONG)
    cell = SIDE // len(shares)
    pixels = np.rint(255 + shares * (ink - 255)).astype(np.uint8)
    matrix = Image.fromarray(np.repeat(np.repeat(pixels, cell, axis=0), cell, axis=1))
    canvas = Image.new("RGB", (LEFT + matrix.width + END, TOP + matrix.height + END), "white")
    canvas.paste(matrix, (LEFT, TOP))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    right, bottom = LEFT + matrix.width, TOP + matrix.height
    pen.rectangle((LEFT - 1, TOP - 1, right, bottom), outline=FAINT)
    pen.text(((LEFT + right) / 2, 20), columns, FAINT, font, anchor="mm")
    upright = Image.new("RGB", (matrix.height, 24), "white")
    ImageDraw.Draw(upright).text((matrix.height / 2, 12), rows, FAINT, font, anchor="mm")
    canvas.paste(upright.rotate(90, expand=True), (8, TOP))
    for tick in map(int, round_ticks(0, len(counts) - 1, 10)):
        # The middle of the cell that the class is in.
        place = (tick // block_size(len(counts)) + 0.5) * cell
        pen.line((LEFT + place, TOP - 6, LEFT + place, TOP - 1), FAINT)
        pen.line((LEFT - 6, TOP + place, LEFT - 1, TOP + place), FAINT)
        pen.text((LEFT + place, TOP - 10), f"{tick:,}", FAINT, font, anchor="ms")
        pen.text((LEFT - 10, TOP + place), f"{tick:,}", FAINT, font, anchor="rm")
    return np.asarray(canvas)
