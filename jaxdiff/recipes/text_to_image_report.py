"""From pictures of prompts to the files of text2image: a grid, results.json and report.html."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import write_png
from jaxdiff.io.report import Figure, Picture, Report, Section, write_report
from jaxdiff.io.runs import Figures, read_json, write_results
from jaxdiff.recipes.text_to_image import Drawn, TextToImage
from jaxdiff.recipes.text_to_image_model import TINY, TINY_NOTE

CELL = 256
"""Longer side of a picture in the grids, in pixels."""
PROMPTS_ON_A_PAGE = 40
GRID_ROWS = 12


def write_outputs(
    out: Path,
    drawing: TextToImage,
    prompts: Sequence[str],
    drawn: Drawn,
    config: Mapping[str, Any],
    started: float,
) -> list[Path]:
    """Write everything beside the pictures themselves; return the paths.

    Args:
      out: folder that holds the pictures.
      drawing: how they were made.
      prompts: the texts.
      drawn: as many pictures of each, prompt by prompt.
      config: the flags.
      started: `time.perf_counter()` when the command began.
    """
    pictures = drawn.pictures
    columns = len(pictures) // len(prompts)
    small = np.stack([shrink(picture) for picture in pictures])
    by_prompt = small.reshape(len(prompts), columns, *small.shape[1:])
    style = GridStyle(cell=max(128, *small.shape[1:3]))
    names = [str(number) for number in range(columns)]
    shown = min(GRID_ROWS, len(prompts))
    grid = labelled_grid(
        by_prompt[:shown].reshape(-1, *small.shape[1:]),
        [str(number) for number in range(shown)],
        names,
        prompts[0] if len(prompts) == 1 else f"{shown} of {len(prompts)} prompts",
        row_axis="prompt",
        column_axis="picture",
        style=style,
    )
    write_png(out / "grid.png", grid)
    sections = [
        Section(
            prompt, [Picture(strip(row), f"Prompt {number}, pictures 0 to {columns - 1}; none left out.", wide=True)]
        )
        for number, (prompt, row) in enumerate(zip(prompts[:PROMPTS_ON_A_PAGE], by_prompt))
    ]
    figures: Figures = {
        "pictures": len(pictures),
        "new_pictures": drawn.new,
        "seconds": time.perf_counter() - started,
    }
    if drawn.timed:
        figures["images_per_second"] = drawn.timed / drawn.seconds
    device = f"{drawing.mesh.size} x {drawing.mesh.devices.flat[0].device_kind}"
    results = write_results(out, figures, config, {"params": drawing.about["sha256"]}, device)
    record = read_json(results)
    facts = {
        "Command": {"command line": record["command"], "seconds": f"{figures['seconds']:.0f}"},
        "Config": record["config"],
        "Versions": record["versions"],
        "Hashes (SHA-256)": record["hashes"],
    }
    left_out = len(prompts) - PROMPTS_ON_A_PAGE
    report = Report(
        "Text to image",
        " ".join(filter(None, (
            "Pictures drawn from noise by latent diffusion (arXiv 2112.10752), guided by a text (arXiv 2207.12598).",
            TINY_NOTE if drawing.about["model"] == TINY else "",
            f"The first {PROMPTS_ON_A_PAGE} prompts; {left_out} more lie in the folder." if left_out > 0 else "",
        ))),
        [
            Figure(f"{len(pictures):,}", "pictures"),
            *([Figure(f"{drawn.timed / drawn.seconds:.3g}", "pictures a second, compilation left out")]
              if drawn.timed else []),
        ],
        sections,
        {name: {key: str(value) for key, value in group.items()} for name, group in facts.items()},
    )  # fmt: skip
    return [out, out / "grid.png", results, write_report(out / "report.html", report)]


def shrink(picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return the picture with a longer side of at most `CELL` pixels."""
    height, width = picture.shape[:2]
    ratio = min(1.0, CELL / max(height, width))
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    return picture if ratio == 1 else np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def strip(pictures: UInt8[np.ndarray, "N H W 3"], gap: int = 6) -> UInt8[np.ndarray, "h w 3"]:
    """Return pictures side by side, in rows of at most four, white between them, small ones enlarged."""
    factor = max(1, 128 // max(pictures.shape[1:3]))
    pictures = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = pictures.shape
    columns = min(4, count)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas
