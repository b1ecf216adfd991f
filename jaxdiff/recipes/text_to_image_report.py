"""From pictures of prompts to the files of text2image: a grid, results.json and report.html."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import read_image, write_overview
from jaxdiff.io.report import Figure, Picture, Report, Section, facts_of, write_report
from jaxdiff.io.runs import Figures, read_json, write_results
from jaxdiff.mesh import device_name
from jaxdiff.recipes.text_to_image import GRID, Drawn, Job, TextToImage

CELL = 256
"""Longer side of a picture in the grids, in pixels."""
PROMPTS_ON_A_PAGE = 40
GRID_ROWS = GRID_COLUMNS = 12


def write_outputs(
    out: Path,
    drawing: TextToImage,
    prompts: Sequence[str],
    jobs: Sequence[Job],
    drawn: Drawn,
    config: Mapping[str, Any],
    started: float,
) -> list[Path]:
    """Write everything beside the pictures themselves; return the paths.

    Args:
      out: folder that holds the pictures.
      drawing: how they were made.
      prompts: the texts.
      jobs: as many pictures of each, prompt by prompt.
      drawn: how that went.
      config: the flags.
      started: `time.perf_counter()` when the command began.
    """
    each = len(jobs) // len(prompts)
    shown = min(each, GRID_COLUMNS)
    most = drawing.size[0] * drawing.size[1]  # may be more than what is read of others' pictures
    rows = [
        np.stack([shrink(read_image(out / job.file, most)) for job in jobs[number * each : number * each + shown]])
        for number in range(min(len(prompts), PROMPTS_ON_A_PAGE))
    ]
    write_overview(out / GRID, make_grid(rows[:GRID_ROWS], prompts))
    figures: Figures = {
        "pictures": len(jobs),
        "new_pictures": drawn.new,
        "seconds": time.perf_counter() - started,
    }
    if drawn.timed:
        figures["images_per_second"] = drawn.timed / drawn.seconds
    results = write_results(out, figures, config, {"params": drawing.about["sha256"]}, device_name(drawing.mesh))
    record = read_json(results)
    left_out = len(prompts) - PROMPTS_ON_A_PAGE
    report = Report(
        "Text to image",
        " ".join(filter(None, (
            "Pictures drawn from noise by latent diffusion (arXiv 2112.10752), guided by a text (arXiv 2207.12598).",
            drawing.note,
            f"The first {PROMPTS_ON_A_PAGE} prompts; {left_out} more lie in the folder." if left_out > 0 else "",
        ))),
        [
            Figure(f"{len(jobs):,}", "pictures"),
            *([Figure(f"{drawn.timed / drawn.seconds:.3g}", "pictures a second, compilation left out")]
              if drawn.timed else []),
        ],
        [make_section(number, prompts[number], row, each) for number, row in enumerate(rows)],
        facts_of(record),
    )  # fmt: skip
    return [out, out / GRID, results, write_report(out / "report.html", report)]


def make_grid(rows: Sequence[UInt8[np.ndarray, "N H W 3"]], prompts: Sequence[str]) -> UInt8[np.ndarray, "h w 3"]:
    """Draw one row of pictures for each of the first prompts."""
    title = prompts[0] if len(prompts) == 1 else f"{len(rows)} of {len(prompts)} prompts"
    return labelled_grid(
        np.concatenate(rows),
        [str(number) for number in range(len(rows))],
        [str(number) for number in range(len(rows[0]))],
        title,
        row_axis="prompt",
        column_axis="picture",
        style=GridStyle(cell=max(128, *rows[0].shape[1:3])),
    )


def make_section(number: int, prompt: str, pictures: UInt8[np.ndarray, "N H W 3"], each: int) -> Section:
    """Return what the page shows of one prompt, of which `each` pictures were drawn."""
    left_out = f"{each - len(pictures):,} more lie in the folder" if each > len(pictures) else "none left out"
    text = f"Prompt {number}, pictures 0 to {len(pictures) - 1}; {left_out}."
    return Section(prompt, [Picture(strip(pictures), text, wide=True)])


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
