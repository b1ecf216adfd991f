"""Sampling a conditional model: one compiled program over the mesh, the same images for any batch size.

Image i is a function of (seed, i) and its condition alone: its starting noise and every later draw come from
fold_in(key of the seed, i), never from its place in a batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from jaxdiff.diffusion.edm import Churn, Euler, Heun
from jaxdiff.diffusion.guidance import ConditionalDenoiser, Denoiser, chain_weights, guide, within_interval
from jaxdiff.diffusion.multistep import PNDM, DPMSolverMultistep, UniPC
from jaxdiff.diffusion.prediction import Prediction, clip_x_0, threshold_x_0, to_prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM, Sampler, image_keys, sample, starting_noise
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.timesteps import Walk, check_reach, timestep_spacing, with_final
from jaxdiff.io.images import to_uint8
from jaxdiff.mesh import put_whole, replicated
from jaxdiff.recipes.conditional import Condition, ConditionalModel
from jaxdiff.recipes.training import Stream, stream_key
from jaxdiff.settings import SamplerName, SamplingSettings, Threshold

ImageSampler = Callable[[Any, Any, Condition], Any]
"""(params, image keys, condition) -> images, or (images, trajectory)."""

REVERSE_PROCESSES: dict[SamplerName, Sampler] = {
    "ddim": DDIM(),
    "ddpm": DDPM(),
    "euler": Euler(),
    "euler-ancestral": DDIM(eta=1.0),  # the same step, written in noise levels
    "heun": Heun(),
    "dpm++2m": DPMSolverMultistep(),
    "dpm++2m-sde": DPMSolverMultistep(stochastic=True),
    "unipc": UniPC(),
    "pndm": PNDM(),
}
"""By the name that `--sampler` takes."""


def make_denoiser(model: ConditionalModel, params: Any) -> ConditionalDenoiser:
    """Wrap a network as `(x_t, t, condition) -> Prediction`."""

    def denoise(x_t: jax.Array, t: jax.Array, condition: Condition) -> Prediction:
        alpha_t, sigma_t = model.schedule.alpha_sigma(t)
        output = model.apply(params, x_t, jnp.broadcast_to(t, x_t.shape[:1]), condition)
        return to_prediction(output, x_t, alpha_t, sigma_t, model.prediction_type)

    return denoise


def keep_to_pixels(denoise: Denoiser, schedule: NoiseSchedule, threshold: Threshold) -> Denoiser:
    """Bring the clean image back to [-1, 1]; after guidance, which overshoots (arXiv 2205.11487, section 2.3)."""
    if threshold == "none":
        return denoise
    bring_back = clip_x_0 if threshold == "static" else threshold_x_0

    def kept(x_t: jax.Array, t: jax.Array) -> Prediction:
        return bring_back(denoise(x_t, t), x_t, *schedule.alpha_sigma(t))

    return kept


def guide_conditions(
    model: ConditionalModel, denoise: ConditionalDenoiser, condition: Condition, settings: SamplingSettings
) -> Denoiser:
    """Return the guided denoiser: nothing, then the domain, then the class, each with its own scale."""
    no_class = jnp.full_like(condition.class_labels, model.null[0])
    no_domain = jnp.full_like(condition.domain_labels, model.null[1])
    chain = (
        Condition(no_class, no_domain),
        Condition(no_class, condition.domain_labels),
        condition,
    )
    weights = chain_weights((settings.domain_scale, settings.guidance_scale))
    guided = guide(denoise, list(zip(weights, chain)))
    if settings.guidance_interval is None:
        return guided
    unguided = guide(denoise, [(1.0, condition)])
    return within_interval(guided, unguided, model.schedule, *settings.guidance_interval)


def reverse_process(settings: SamplingSettings, schedule: NoiseSchedule) -> tuple[Sampler, Walk]:
    """Return how to sample, and the timesteps to visit, the end included."""
    process = REVERSE_PROCESSES[settings.sampler]
    if settings.eta is not None:
        process = DDIM(settings.eta)
    if settings.churn is not None:
        process = replace(process, churn=Churn(settings.churn))  # type: ignore[type-var]
    timesteps = timestep_spacing(settings.spacing, settings.num_steps, schedule)
    if settings.spacing == "leading":
        check_reach(timesteps, schedule)
    return process, with_final(timesteps)


def make_sampler(
    model: ConditionalModel, settings: SamplingSettings, mesh: Mesh, trajectory: bool = False
) -> ImageSampler:
    """Return the jitted sampler; with `trajectory` it also returns every x_t and predicted x_0."""
    process, timesteps = reverse_process(settings, model.schedule)

    def run(params: Any, keys: jax.Array, condition: Condition):
        guided = guide_conditions(model, make_denoiser(model, params), condition, settings)
        kept = keep_to_pixels(guided, model.schedule, settings.threshold)
        x_T = starting_noise(keys, model.image_shape)
        return sample(kept, x_T, keys, model.schedule, timesteps, process, trajectory)

    return jax.jit(run, out_shardings=replicated(mesh))


def sample_pixels(
    sampler: ImageSampler,
    params: Any,
    seed: int,
    indices: Int[np.ndarray, "N"],
    condition: Condition,
    batch_size: int,
    mesh: Mesh,
) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Yield the images of `indices` in order, batch by batch; a short last batch is padded and cut.

    Args:
      sampler: from `make_sampler` without trajectory.
      params: of the network.
      seed: of the whole set of images.
      indices: image numbers; equal numbers start from equal noise.
      condition: NumPy labels, one for each index.
      batch_size: images at once, a multiple of the number of devices.
      mesh: devices to split a batch over.
    """
    for (numbers, labels), count in in_batches((indices, condition), batch_size, mesh):
        keys = image_keys(stream_key(seed, Stream.SAMPLES), numbers)
        yield to_uint8(np.asarray(sampler(params, keys, labels)))[:count]


def in_batches(arrays: Any, batch_size: int, mesh: Mesh) -> Iterator[tuple[Any, int]]:
    """Yield parts of a tree of NumPy arrays, split over the devices, and how many of each part's images count.

    All parts have `batch_size` images: the last one repeats its last image.
    """
    for chosen, count in batch_numbers(len(jax.tree.leaves(arrays)[0]), batch_size):
        yield put_whole(jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], arrays), mesh), count


def batch_numbers(total: int, batch_size: int) -> Iterator[tuple[Int[np.ndarray, "B"], int]]:
    """Yield the numbers 0..total-1, `batch_size` at a time, the last one repeated to the end, and how many count."""
    for start in range(0, total, batch_size):
        yield np.arange(start, start + batch_size).clip(max=total - 1), min(batch_size, total - start)
