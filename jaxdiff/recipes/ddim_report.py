"""From what the modes show to the files of ddim_grid: single pictures, grids, results.json and report.html."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdiff.ddim_settings import ModeSettings
from jaxdiff.errors import InputError
from jaxdiff.io.images import write_overview, write_png
from jaxdiff.io.report import Figure, Report, facts_of, write_report
from jaxdiff.io.runs import Figures, read_json, write_results
from jaxdiff.mesh import device_name
from jaxdiff.recipes.ddim_modes import (
    Shown,
    show_etas,
    show_images,
    show_interpolations,
    show_inversions,
)
from jaxdiff.recipes.drawing import Drawing, FloatImages
from jaxdiff.recipes.sampler_comparison import most_steps, show_steps

HEADLINES = {
    "interpolate.norm_at_0.5.lerp": ("{:.1f}", "norm of lerp's noise half-way"),
    "interpolate.expected_norm": ("{:.1f}", "expected norm of a normal noise"),
    "steps.rmse.ddim.50": ("{:.1f}", "grey levels of 255 between DDIM with 50 steps and the reference"),
    "invert.round_trip_rmse.1": ("{:.1f}", "grey levels of 255 lost from picture to noise and back"),
}
"""Figures at the head of the page, where they are known: format and meaning."""


def show(
    mode: str, drawing: Drawing, names: Sequence[str], noises: FloatImages, settings: ModeSettings
) -> Iterator[Shown]:
    """Yield what one mode, or every mode for "all", has to show; ways between two noises only where there are two.

    Raises:
      InputError: before anything is drawn: there are too few noises, or fewer timesteps than steps.
    """
    makers = {
        "images": lambda: show_images(drawing, names, noises),
        "eta": lambda: show_etas(drawing, names, noises, settings.etas),
        "interpolate": lambda: show_interpolations(drawing, names, noises, settings.alphas),
        "steps": lambda: show_steps(drawing, names, noises, settings.step_counts, settings.reference_steps),
        "invert": lambda: show_inversions(drawing, names, noises, settings.iterations),
    }
    wanted = list(makers) if mode == "all" else [mode]
    if "interpolate" in wanted and len(names) < 2:
        if mode != "all":
            raise InputError("--mode interpolate needs two noises, there is one")
        print("one noise alone: no interpolation")
        wanted.remove("interpolate")
    if "steps" in wanted:
        for count in settings.step_counts:
            drawing.model.walk(count, "--step-counts")
        drawing.model.walk(settings.reference_steps or most_steps(drawing.model), "--reference-steps")
    return (makers[name]() for name in wanted)


def write_all(
    out: Path, drawing: Drawing, shown: Iterable[Shown], config: Mapping[str, Any], started: float
) -> list[Path]:
    """Write each mode as it comes, then results.json and report.html; return the paths, a folder for single pictures.

    `started` is `time.perf_counter()` when the command began.
    """
    paths, done = [], []
    for mode in shown:
        # The pictures of the noises themselves are what is asked for; the rest would bury them.
        folder = out if mode.mode == "images" else out / mode.mode
        for name, pixels in mode.pictures.items():
            write_png(folder / name, pixels)
        write_overview(out / f"grid_{mode.mode}.png", mode.grid)
        paths += [folder, out / f"grid_{mode.mode}.png"]
        done.append(mode)
    figures: Figures = {name: value for mode in done for name, value in mode.figures.items()}
    figures["seconds"] = time.perf_counter() - started
    hashes = {"params": drawing.model.sha256}
    results = write_results(out, figures, config, hashes, device_name(drawing.mesh))
    return [*paths, results, write_page(out, drawing, done, figures, read_json(results))]


def write_page(
    out: Path, drawing: Drawing, shown: Sequence[Shown], figures: Figures, record: Mapping[str, Any]
) -> Path:
    """Write report.html; `record` is what results.json says."""
    walk = {
        "visited, largest first": ", ".join(f"{t:g}" for t in drawing.timesteps[:-1]),
        "end": "clean data" if drawing.timesteps[-1] < 0 else f"t = {drawing.timesteps[-1]:g}",
    }
    report = Report(
        "What DDIM does",
        f"Pictures of {drawing.model.title}, from noise, by denoising diffusion implicit models (arXiv 2010.02502).",
        [Figure(form.format(figures[name]), text) for name, (form, text) in HEADLINES.items() if name in figures],
        [mode.section for mode in shown],
        facts_of(record, {"Timesteps": walk}),
    )
    return write_report(out / "report.html", report)
