"""Stable Diffusion as pure functions: texts to vectors, noise to latents, latents to pictures (arXiv 2112.10752).

Each of the three is one compiled program over the mesh. Keys and values of the text are computed once for each picture,
not once a step, and the empty prompt is encoded once for all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdiff.diffusion.guidance import chain_weights, guide
from jaxdiff.diffusion.prediction import Prediction, to_prediction
from jaxdiff.diffusion.samplers import DDIM, Sampler, sample
from jaxdiff.diffusion.timesteps import Walk, check_reach, timestep_spacing, with_final
from jaxdiff.errors import InputError
from jaxdiff.mesh import batch_split, replicated
from jaxdiff.models.attention import AttentionKernel, attend, why_not_cudnn
from jaxdiff.models.autoencoder import Autoencoder, Latents
from jaxdiff.models.clip import CLIPText
from jaxdiff.models.conditional_unet import ConditionalUNet
from jaxdiff.models.spatial_transformer import TEXT, Context, project_context
from jaxdiff.recipes.pretrained_unet import ForwardProcess, SamplingDefaults
from jaxdiff.recipes.sampling import REVERSE_PROCESSES
from jaxdiff.settings import SamplerName, Spacing
from jaxdiff.shapes import ImageKeys, Images

Params = dict[str, Any]
"""The parameters of the networks under "text_encoder", "unet" and "vae"."""


@dataclass(frozen=True)
class StableDiffusion:
    """The networks, without their parameters, and how they were trained and are sampled by default.

    Attributes:
      defaults: how each sampler goes through the timesteps unless told otherwise.
      sampler: that of the published scheduler; the name of its class where jaxdiff does not have it.
      own_values: tokens of each word that has values of its own, see `jaxdiff.recipes.value_adapters`.
    """

    text_encoder: CLIPText
    unet: ConditionalUNet
    autoencoder: Autoencoder
    diffusion: ForwardProcess
    defaults: Mapping[SamplerName, SamplingDefaults]
    sampler: str
    own_values: tuple[tuple[int, ...], ...] = ()

    @property
    def default_size(self) -> int:
        """Height and width that the UNet was trained on, in pixels."""
        return self.unet.config.sample_size * self.autoencoder.config.size_divisor

    @property
    def size_divisor(self) -> int:
        """Height and width must be multiples of this, in pixels."""
        return self.autoencoder.config.size_divisor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of the latents of one picture, whose size is in pixels.

        Raises:
          InputError: the size does not fit the networks.
        """
        for side, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % self.size_divisor:
                near = max(1, round(pixels / self.size_divisor)) * self.size_divisor
                raise InputError(f"{side} must be a multiple of {self.size_divisor} pixels, got {pixels}: try {near}")
        factor = self.size_divisor
        return height // factor, width // factor, self.unet.config.in_channels


class Sampled(NamedTuple):
    """What the reverse process ends with.

    Attributes:
      latents: scaled, as the UNet sees them.
      broken_at: the first step after which a number was not finite, from 1; 0 if all were.
    """

    latents: Latents
    broken_at: Int[Array, ""]


def encode_texts(model: StableDiffusion, params: Params, input_ids: Int[Array, "B L"]) -> Context:
    """Return one vector for each token; padding counts, as in training.

    Where words have values of their own, it is followed by as many copies, each zero but at the tokens of one word.
    """
    encoded, _ = model.text_encoder.apply({"params": params["text_encoder"]}, input_ids)  # type: ignore[misc]
    context = encoded.last_hidden_state
    own = [context * jnp.isin(input_ids, jnp.array(tokens))[..., None] for tokens in model.own_values]
    return jnp.concatenate([context, *own], axis=-1)


class ReverseProcess(NamedTuple):
    """How noise becomes latents, text and guidance aside.

    Attributes:
      sampler: takes the steps.
      timesteps: that it visits, the end included.
      noise_std: standard deviation of the noise that it starts from.
    """

    sampler: Sampler
    timesteps: Walk
    noise_std: float


def own_sampler(model: StableDiffusion) -> SamplerName:
    """Return the sampler of the published scheduler.

    Raises:
      InputError: jaxdiff does not have it.
    """
    for name in REVERSE_PROCESSES:
        if name == model.sampler:
            return name
    raise InputError(
        f"the model's scheduler is {model.sampler}, which jaxdiff does not have: choose --sampler "
        f"{', '.join(REVERSE_PROCESSES)} (sampler= in Python)"
    )


def make_process(
    model: StableDiffusion,
    sampler: SamplerName | None,
    num_steps: int,
    spacing: Spacing | None = None,
    eta: float | None = None,
) -> ReverseProcess:
    """Return the reverse process, step for step that of diffusers' scheduler; None means as published.

    Raises:
      InputError: so many steps do not fit the spacing, or the published sampler is none of jaxdiff's.
    """
    name = own_sampler(model) if sampler is None else sampler
    defaults = model.defaults[name]
    schedule = model.diffusion.make_schedule()
    step = DDIM(eta) if eta is not None else REVERSE_PROCESSES[name]
    chosen = spacing or defaults.spacing
    if name == "pndm" and chosen == "karras":
        raise InputError("--spacing karras: PNDM takes equal steps only (arXiv 2202.09778); choose another --sampler")
    # diffusers moves all leading timesteps of Stable Diffusion up by 1, whatever the file says.
    offset = 1 if chosen == "leading" else 0
    of_levels = name in ("euler", "euler-ancestral", "heun") and chosen != "leading"
    # diffusers' solvers of several steps make one timestep more, and leave the last one out.
    left_out = 1 if name in ("dpm++2m", "dpm++2m-sde", "unipc") and chosen in ("leading", "linspace") else 0
    # Only DDIM and PNDM ever end at t = 0 instead of clean data.
    final = defaults.final if name in ("ddim", "pndm") else -1
    if left_out and num_steps + left_out > schedule.num_train_timesteps:
        most = schedule.num_train_timesteps - left_out
        raise InputError(f"--num-steps {num_steps}, {chosen} spacing: must lie in 1..{most} with {name}")
    try:
        timesteps = timestep_spacing(chosen, num_steps + left_out, schedule, offset, whole=not of_levels)[:num_steps]
        if spacing == "leading":
            check_reach(timesteps, schedule)
        # A step from t = 0 to t = 0 changes nothing, and linspace's and karras' timesteps end there.
        walk = with_final(timesteps[timesteps > final], final)
    except ValueError as error:
        raise InputError(f"--num-steps {num_steps}, {chosen} spacing: {error}") from error
    # diffusers' samplers of noise levels start from x_T / alpha_T = level eps, not sqrt(level^2 + 1) eps.
    noise_std = float(schedule.alpha_sigma(jnp.asarray(walk[0]))[1]) if of_levels else 1.0
    return ReverseProcess(step, walk, noise_std)


LatentSampler = Callable[[Any, Latents, ImageKeys, Context, Context], Sampled]
"""(parameters of the UNet, noise, keys, texts, texts to avoid or one for all) -> latents; the noise is given away."""


def make_latent_sampler(
    model: StableDiffusion, process: ReverseProcess, guidance_scale: float, mesh: Mesh
) -> LatentSampler:
    """Return the jitted reverse process with classifier-free guidance, one scan over all steps.

    Args:
      model: the networks.
      process: from `make_process`.
      guidance_scale: g = 1 + w of arXiv 2207.12598: 0 leaves the text out, 1 follows it, more follows it strongly.
      mesh: devices that share a batch.
    """
    schedule = model.diffusion.make_schedule()
    against, along = chain_weights((guidance_scale,))

    def run(params: Any, x_T: Latents, keys: ImageKeys, context: Context, avoided: Float[Array, "A S E"]) -> Sampled:
        def denoise(x_t: Latents, t: Any, text: Any) -> Prediction:
            output: Any = model.unet.apply({"params": params, TEXT: text}, x_t, jnp.broadcast_to(t, x_t.shape[:1]))
            return to_prediction(output, x_t, *schedule.alpha_sigma(t), model.diffusion.prediction_type)

        text, no_text = (project_context(params, texts, model.unet.dtype) for texts in (context, avoided))
        no_text = jax.tree.map(lambda one, each: jnp.broadcast_to(one, each.shape), no_text, text)
        guided = guide(denoise, [(against, no_text), (along, text)])
        start = process.noise_std * x_T
        latents, states = sample(guided, start, keys, schedule, process.timesteps, process.sampler, trajectory=True)
        broken = ~jnp.isfinite(states.x_t[1:]).all(axis=(1, 2, 3, 4))
        steps = process.sampler.plan(process.timesteps).number
        return Sampled(latents, jnp.where(broken.any(), steps[jnp.argmax(broken)], 0))

    places: Any = Sampled(batch_split(mesh), replicated(mesh))  # type: ignore[arg-type]
    return jax.jit(run, donate_argnums=1, out_shardings=places)


def decode_latents(model: StableDiffusion, params: Params, latents: Latents) -> Images:
    """Return pixels about in [-1, 1]; `latents` are scaled, as the UNet sees them."""
    scaled = latents / model.autoencoder.config.scaling_factor
    images: Any = model.autoencoder.apply({"params": params["vae"]}, scaled, method="decode")
    return images


def choose_attention(model: StableDiffusion) -> tuple[StableDiffusion, str]:
    """Return the model with the fastest attention that this machine has, and a sentence on what was chosen and why."""
    kernel, reason = choose_kernel(model.unet.dtype, model.unet.config.head_dims)
    return replace(model, unet=model.unet.clone(kernel=kernel)), f"attention: {kernel} ({reason})"


def choose_kernel(dtype: DTypeLike, head_dims: tuple[int, ...]) -> tuple[AttentionKernel, str]:
    """Return the kernel for heads of these many features, and why."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return "xla", f"cuDNN's needs an NVIDIA GPU, this is {device.device_kind}"
    newest = float(device.compute_capability) >= 9.0
    if reason := why_not_cudnn(dtype, head_dims, newest):
        return "xla", f"cuDNN's does not fit: {reason}"
    for features in sorted(set(head_dims)):
        blank = jnp.zeros((2, 256, 8, features), dtype)
        text = jnp.zeros((2, 77, 8, features), dtype)
        try:
            for keys in (blank, text):
                jax.block_until_ready(jax.jit(jax.grad(_total, argnums=(0, 1, 2)))(blank, keys, keys))
        except Exception as error:  # what cuDNN lacks is told by exceptions of many types
            return "xla", f"cuDNN's failed: {next(iter(str(error).splitlines()), type(error).__name__)}"
    sizes = ", ".join(map(str, sorted(set(head_dims))))
    return "cudnn", f"heads of {sizes} features in {np.dtype(dtype).name}; texts of an odd number of tokens by xla"


def _total(query: Array, key: Array, value: Array) -> Array:
    """Return one number of cuDNN's attention, whose gradient needs its kernels of both directions."""
    return attend(query, key, value, "cudnn").astype(jnp.float32).sum()


def check_finite_latents(model: StableDiffusion, process: ReverseProcess, sampled: Sampled) -> None:
    """Raise InputError, naming the step, unless all numbers are finite."""
    step = int(sampled.broken_at)
    if step:
        exact = "" if model.unet.dtype == jnp.float32 else ", or use --dtype float32"
        raise InputError(
            f"the latents are not finite after step {step} of {len(process.timesteps) - 1}, at timestep "
            f"{process.timesteps[step - 1]:g}: lower --guidance-scale{exact}"
        )


def check_finite_pictures(model: StableDiffusion, images: Float[np.ndarray, "B H W C"]) -> None:
    """Raise InputError unless all pixels are finite; in half precision the autoencoder can overflow."""
    if not np.isfinite(images).all():
        exact = "" if model.autoencoder.dtype == jnp.float32 else ": use --decode-dtype float32"
        raise InputError(f"the decoded pictures are not finite{exact}")
