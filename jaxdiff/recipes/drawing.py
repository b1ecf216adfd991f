"""From starting noises to pictures by DDIM: one compiled program for any number of them, any etas, any conditions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from jaxdiff.ddim_settings import DrawingSettings
from jaxdiff.diffusion.samplers import DDIM, image_keys, sample, starting_noise
from jaxdiff.diffusion.timesteps import Walk, with_final
from jaxdiff.errors import InputError
from jaxdiff.io.images import stretch_to_uint8, to_uint8
from jaxdiff.io.noises import read_noises
from jaxdiff.io.progress import progress_bar
from jaxdiff.mesh import replicated, round_up
from jaxdiff.recipes.pixel_model import PixelModel
from jaxdiff.recipes.sampling import in_batches, keep_to_pixels
from jaxdiff.recipes.training import Stream, stream_key
from jaxdiff.settings import Threshold

Scaling = Literal["clamp", "minmax"]
FloatImages = Float[np.ndarray, "N H W C"]


@dataclass(frozen=True)
class Drawing:
    """How every picture of a command comes from its noise.

    Attributes:
      model: what is sampled.
      timesteps: from `with_final`.
      threshold: what happens to predicted pixels outside [-1, 1].
      scaling: how pixels are written: clamped to [-1, 1], or each image stretched from its least to its greatest value.
      seed: of the noise along the way.
      batch_size: most images at once, a multiple of the number of devices.
      mesh: devices to split a batch over.
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
        total = len(arrays[0])
        # As few batches as fit, all of one size with as little padding as possible: one shape is one compilation.
        batches = -(-total // self.batch_size)
        size = round_up(-(-total // batches), self.mesh)
        with progress_bar(total, doing, "image", leave=False) as bar:
            for part, count in in_batches(arrays, size, self.mesh):
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
        timesteps = model.walk(settings.num_steps or 50, "--num-steps")
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
