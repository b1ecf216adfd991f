"""What DDIM does, shown in pictures: one noise under several etas, ways between two noises, and the way back.

Every mode returns its single pictures, one labelled grid, its figures, and its section of the report.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jaxdiff.diffusion.interpolation import expected_norm, lerp, normal_lerp, slerp
from jaxdiff.diffusion.inversion import invert
from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import to_uint8
from jaxdiff.io.report import Curve, Picture, Section
from jaxdiff.io.runs import Figures
from jaxdiff.mesh import replicated
from jaxdiff.recipes.drawing import Drawing, FloatImages

STYLE = GridStyle(cell=96, text=16)
COLUMNS = 4
"""Noises that the eta, steps and invert grids show."""
WAYS = {"lerp": lerp, "slerp": slerp, "normal": normal_lerp}


@dataclass(frozen=True)
class Shown:
    """What a mode has to show: pictures by file name, a grid, figures, and a section of the report."""

    mode: str
    pictures: dict[str, UInt8[np.ndarray, "H W C"]]
    grid: UInt8[np.ndarray, "h w 3"]
    section: Section
    figures: Figures = field(default_factory=dict)


def show_images(drawing: Drawing, names: Sequence[str], noises: FloatImages) -> Shown:
    """Draw every noise once, with eta 0."""
    pixels = drawing.to_pixels(drawing.draw(noises, range(len(names))))
    width = min(len(names), 5)
    rows = -(-len(names) // width)
    padded = np.full((rows * width, *pixels.shape[1:]), 255, np.uint8)
    padded[: len(pixels)] = pixels
    grid = labelled_grid(
        padded,
        [f"{names[row * width]} to {names[min((row + 1) * width, len(names)) - 1]}" for row in range(rows)],
        [""] * width,
        f"DDIM, eta 0, {len(drawing.timesteps) - 1} steps",
        style=STYLE,
    )
    section = Section("Pictures", [Picture(grid, "Every noise drawn once with eta 0.", wide=True)])
    return Shown("images", {f"{name}.png": image for name, image in zip(names, pixels)}, grid, section)


def show_etas(drawing: Drawing, names: Sequence[str], noises: FloatImages, etas: Sequence[float]) -> Shown:
    """Draw a few noises under several etas: rows are etas, columns noises."""
    names = names[:COLUMNS]
    columns = np.arange(len(names))
    numbers = np.tile(columns, len(etas))
    images = drawing.draw(noises[numbers], numbers, np.repeat(etas, len(names)))
    pixels = drawing.to_pixels(images)
    grid = labelled_grid(
        pixels,
        [f"{eta:g}" for eta in etas],
        names,
        f"DDIM, {len(drawing.timesteps) - 1} steps",
        row_axis="eta",
        column_axis="noise",
        style=STYLE,
    )
    files = {
        f"eta_{eta:g}_{name}.png": image
        for (eta, name), image in zip(((eta, name) for eta in etas for name in names), pixels)
    }
    by_eta = images.reshape(len(etas), len(names), *images.shape[1:])
    figures: Figures = {
        f"eta.rmse_to_first.{eta:g}": grey_rmse(row, by_eta[0]) for eta, row in zip(etas[1:], by_eta[1:])
    }
    note = (
        "Down a column the starting noise stays. With eta 0 it alone decides the picture; with eta 1 each step adds as "
        "much fresh noise as DDPM's, and the picture is another one."
    )
    caption = "Rows are etas, columns are starting noises; the first ones, not chosen."
    return Shown("eta", files, grid, Section("Eta", [Picture(grid, caption)], note), figures)


def show_interpolations(drawing: Drawing, names: Sequence[str], noises: FloatImages, alphas: Sequence[float]) -> Shown:
    """Draw what lies between the first two noises: rows are ways, columns alphas."""
    x, y, weights = jnp.asarray(noises[0]), jnp.asarray(noises[1]), jnp.asarray(alphas, jnp.float32)
    between = {way: np.asarray(mix(x, y, weights)) for way, mix in WAYS.items()}
    x_T = np.concatenate(list(between.values()))
    # One condition and one stream of noise for all: only the starting noise changes.
    images = drawing.draw(x_T, [0] * len(x_T))
    pixels = drawing.to_pixels(images)
    norms = {way: np.linalg.norm(mixed.reshape(len(alphas), -1), axis=1) for way, mixed in between.items()}
    expected = expected_norm(x.size)
    middle = int(np.argmin(np.abs(np.asarray(alphas) - 0.5)))
    grid = labelled_grid(
        pixels,
        list(WAYS),
        [f"{alpha:.4g}" for alpha in alphas],
        f"From noise {names[0]} to noise {names[1]}",
        row_axis="way",
        column_axis="alpha",
        style=STYLE,
    )
    files = {
        f"{way}_{alpha:.4g}.png": image
        for (way, alpha), image in zip(((way, alpha) for way in WAYS for alpha in alphas), pixels)
    }
    figures: Figures = {"interpolate.expected_norm": expected}
    figures |= {f"interpolate.norm_at_{alphas[middle]:g}.{way}": float(norms[way][middle]) for way in WAYS}
    spread = dict(zip(WAYS, images.reshape(len(WAYS), len(alphas), -1)[:, middle].std(axis=1) * 127.5))
    figures |= {f"interpolate.pixel_std_at_{alphas[middle]:g}.{way}": float(std) for way, std in spread.items()}
    lines: dict[str, Any] = {way: (list(alphas), norm.tolist()) for way, norm in norms.items()}
    lines["a normal noise, on average"] = [alphas[0], alphas[-1]], [expected, expected]
    chart = Curve(
        lines,
        "Norm of the starting noise along each way.",
        "alpha",
        "norm",
        logarithmic=False,
        raw_first=False,
    )
    note = (
        f"At alpha {alphas[middle]:g} lerp's noise has {norms['lerp'][middle] / expected:.0%} of the norm that normal "
        "noise has on average, which is what the network was trained to start from; slerp (Shoemake 1985) keeps the "
        "norm, and the normal combination (arXiv 2408.08558) the whole distribution. The pictures' pixels there have a "
        f"standard deviation of {', '.join(f'{std:.0f} ({way})' for way, std in spread.items())} grey levels: a weak "
        "noise gives a flat picture."
    )
    blocks: list[Picture | Curve] = [
        Picture(grid, "Rows are ways from one noise to the other, columns alphas.", wide=True),
        chart,
    ]
    return Shown("interpolate", files, grid, Section("Between two noises", blocks, note), figures)


def show_inversions(drawing: Drawing, names: Sequence[str], noises: FloatImages, iterations: Sequence[int]) -> Shown:
    """Draw pictures, find their noises again and draw those: rows are the states, columns the pictures."""
    names = names[:COLUMNS]
    numbers = np.arange(len(names), dtype=np.int32)
    # Clipping cannot be undone, and guidance magnifies what the inversion misses (arXiv 2211.09794): neither here.
    model = replace(drawing.model, make_denoiser=drawing.model.make_unguided)
    drawing = replace(drawing, model=model, threshold="none")

    def find(params: Any, images: jax.Array, condition: Any, count: jax.Array) -> jax.Array:
        return invert(model.make_denoiser(params, condition), images, model.schedule, drawing.timesteps, count)

    program = jax.jit(find, out_shardings=replicated(drawing.mesh))
    images = drawing.draw(noises[numbers], numbers)
    rows, labels, figures = [drawing.to_pixels(images)], ["drawn"], Figures()
    files = {f"drawn_{name}.png": image for name, image in zip(names, rows[0])}
    for count in iterations:
        found = drawing.in_batches(
            lambda images, condition, count=count: program(model.params, images, condition, count),
            (images, model.condition_of(numbers)),
            "inverting",
        )
        again = drawing.draw(found, numbers)
        figures[f"invert.round_trip_rmse.{count}"] = grey_rmse(again, images)
        figures[f"invert.noise_rmse.{count}"] = float(np.sqrt(np.mean((found - noises[numbers]) ** 2)))
        spelled = f"{count} iteration{'s' * (count > 1)}"
        print(f"inversion, {spelled} a step: {grey_rmse(again, images):.2f} of 255 grey levels lost there and back")
        # Three standard deviations of noise fill the range of pixels.
        rows += [to_uint8(found / 3), drawing.to_pixels(again)]
        labels += [f"its noise, {spelled}", "drawn from that"]
        files |= {f"again_{count}_{name}.png": image for name, image in zip(names, rows[-1])}
    grid = labelled_grid(
        np.concatenate(rows),
        labels,
        names,
        f"DDIM inversion, {len(drawing.timesteps) - 1} steps",
        column_axis="noise",
        style=STYLE,
    )
    errors = ", ".join(
        f"{figures[f'invert.round_trip_rmse.{n}']:.2f} with {n} iteration{'s' * (n > 1)} a step" for n in iterations
    )
    note = (
        "DDIM backwards, from the picture to its noise, and forwards again, without guidance and clipping (arXiv "
        "2010.02502, iterated as in arXiv 2309.04907). Root mean square error there and back, in grey "
        f"levels of 255: {errors}."
    )
    caption = "Rows: the picture, the noise found for it, and what that noise draws."
    return Shown("invert", files, grid, Section("There and back", [Picture(grid, caption)], note), figures)


def grey_rmse(images: np.ndarray, reference: np.ndarray) -> float:
    """Return the root mean square difference in grey levels of 255, both clamped to [-1, 1]."""
    difference = np.clip(images, -1, 1) - np.clip(reference, -1, 1)
    return float(127.5 * np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
