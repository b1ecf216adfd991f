"""What DDIM does, shown in pictures: one noise under several etas, ways between two noises, and the way back.

Every mode returns its single pictures, one labelled grid, its figures, and its section of the report.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from jaxdiff.ddim_settings import DrawingSettings
from jaxdiff.diffusion.interpolation import expected_norm, lerp, normal_lerp, slerp
from jaxdiff.diffusion.inversion import invert
from jaxdiff.diffusion.samplers import DDIM, image_keys, sample, starting_noise
from jaxdiff.diffusion.timesteps import Walk, with_final
from jaxdiff.errors import InputError
from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import stretch_to_uint8, to_uint8
from jaxdiff.io.noises import read_noises
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.report import Curve, Picture, Section
from jaxdiff.io.runs import Figures
from jaxdiff.mesh import replicated, round_up
from jaxdiff.recipes.pixel_model import PixelModel
from jaxdiff.recipes.sampling import in_batches, keep_to_pixels
from jaxdiff.recipes.training import Stream, stream_key
from jaxdiff.settings import Threshold

Scaling = Literal["clamp", "minmax"]
FloatImages = Float[np.ndarray, "N H W C"]

STYLE = GridStyle(cell=96, text=16)
COLUMNS = 4
"""Noises that the eta, steps and invert grids show."""
WAYS = {"lerp": lerp, "slerp": slerp, "normal": normal_lerp}


@dataclass(frozen=True)
class Drawing:
    """How every picture of a command comes from its noise.

    Attributes:
      model: what is sampled.
      timesteps: from `with_final`.
      threshold: what happens to predicted pixels outside [-1, 1].
      scaling: how pixels are written: clamped to [-1, 1], or each image stretched from its least to its greatest value.
      seed: of the noise along the way.
      batch_size: images at once, a multiple of the number of devices.
    """

    model: PixelModel
    timesteps: Walk
    threshold: Threshold
    scaling: Scaling
    seed: int
    batch_size: int
    mesh: Mesh

    @cached_property
    def _program(self):
        def run(params: Any, x_T: jax.Array, keys: jax.Array, condition: Any, etas: jax.Array):
            schedule = self.model.schedule
            denoise = keep_to_pixels(self.model.make_denoiser(params, condition), schedule, self.threshold)
            return sample(denoise, x_T, keys, schedule, self.timesteps, DDIM(etas))

        return jax.jit(run, out_shardings=replicated(self.mesh))

    def keys(self, numbers: Int[np.ndarray, "N"] | jax.Array) -> jax.Array:
        """Return the key of each noise's number."""
        return image_keys(stream_key(self.seed, Stream.SAMPLES), jnp.asarray(numbers))

    def draw(
        self, x_T: FloatImages, numbers: Sequence[int] | np.ndarray, etas: float | np.ndarray = 0.0
    ) -> FloatImages:
        """Run DDIM from noises; `numbers` decide the conditions and the noise along the way."""
        order = np.asarray(numbers, np.int32)
        etas = np.broadcast_to(np.asarray(etas, np.float32), order.shape)
        return self.in_batches(
            lambda x_T, numbers, condition, etas: self._program(
                self.model.params, x_T, self.keys(numbers), condition, etas
            ),
            (x_T, order, self.model.condition_of(order), etas),
            "drawing",
        )

    def in_batches(self, program, arrays: tuple, doing: str) -> FloatImages:
        """Run a program over a tree of arrays, batch by batch, under a progress bar."""
        parts = []
        with progress_bar(len(arrays[0]), doing, "image", leave=False) as bar:
            for part, count in in_batches(arrays, self.batch_size, self.mesh):
                parts.append(np.asarray(program(*part))[:count])
                bar.update(count)
        return np.concatenate(parts)

    def to_pixels(self, images: FloatImages) -> UInt8[np.ndarray, "N H W C"]:
        """Return images as they are written."""
        return stretch_to_uint8(images) if self.scaling == "minmax" else to_uint8(images)


def make_drawing(model: PixelModel, settings: DrawingSettings, seed: int, batch_size: int, mesh: Mesh) -> Drawing:
    """Return how pictures are drawn, from what the model, the preset and the flags say.

    Raises:
      InputError: the model's noise schedule does not have the timesteps asked for.
    """
    if settings.preset == "course":
        model = replace(model, spacing="leading", steps_offset=1, final=0, threshold="none")
    if settings.spacing is not None:
        offset = model.steps_offset if settings.spacing == "leading" else 0
        model = replace(model, spacing=settings.spacing, steps_offset=offset)
    if settings.timesteps is None:
        timesteps = model.walk(settings.num_steps or 50)
    else:
        total = model.schedule.num_train_timesteps
        if settings.timesteps[0] >= total or settings.timesteps[-1] <= model.final:
            raise InputError(f"--timesteps must lie in {model.final + 1}..{total - 1}, got {settings.timesteps}")
        timesteps = with_final(np.array(settings.timesteps), model.final)
    scaling = settings.scaling or ("minmax" if settings.preset == "course" else "clamp")
    threshold = settings.threshold or model.threshold
    return Drawing(model, timesteps, threshold, scaling, seed, round_up(batch_size, mesh), mesh)


def read_or_draw_noises(
    folder: Path | None, number: int, seed: int, image_shape: tuple[int, int, int]
) -> tuple[list[str], FloatImages]:
    """Return names and noises of a folder, or `number` of them as functions of (seed, number)."""
    if folder is not None:
        return read_noises(folder.expanduser(), image_shape)
    keys = image_keys(stream_key(seed, Stream.SAMPLES), jnp.arange(number))
    return [f"{i:02d}" for i in range(number)], np.asarray(starting_noise(keys, image_shape))


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
    pixels = drawing.to_pixels(drawing.draw(x_T, [0] * len(x_T)))
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
        f"At alpha {alphas[middle]:g} lerp's noise has {norms['lerp'][middle] / expected:.0%} of normal noise's norm. "
        "The network has never seen so weak a noise at its first timestep and paints it flat and grey. Slerp (Shoemake "
        "1985) keeps the norm, and the normal combination (arXiv 2408.08558) keeps the whole distribution."
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
        spelled = f"{count} iteration{'s' if count > 1 else ''}"
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
    errors = ", ".join(f"{figures[f'invert.round_trip_rmse.{n}']:.2f} with {n}" for n in iterations)
    note = (
        "DDIM backwards, from the picture to its noise, and forwards again, without guidance and clipping (arXiv "
        "2010.02502, section 4.3; iterated as in arXiv 2309.04907). Root mean square error there and back, in grey "
        f"levels of 255: {errors} iterations a step."
    )
    caption = "Rows: the picture, the noise found for it, and what that noise draws."
    return Shown("invert", files, grid, Section("There and back", [Picture(grid, caption)], note), figures)


def grey_rmse(images: np.ndarray, reference: np.ndarray) -> float:
    """Return the root mean square difference in grey levels of 255, both clamped to [-1, 1]."""
    difference = np.clip(images, -1, 1) - np.clip(reference, -1, 1)
    return float(127.5 * np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
