"""The reverse process: from noise to images in any falling list of timesteps, one compiled loop.

    (1)  eps and x_0 are the denoiser's at x_t; a_t = alphas_cumprod[t], a_s likewise for s < t, a_-1 = 1
    (2)  DDIM   x_s = sqrt(a_s) x_0 + sqrt(1 - a_s - step_std^2) eps + step_std z          (arXiv 2010.02502, eq. 12)
    (3)         step_std = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)             (eq. 16)
    (4)  DDPM   q(x_s | x_t, x_0), mean  sqrt(a_s) (1 - a_t/a_s) / (1 - a_t) x_0
                                       + sqrt(a_t/a_s) (1 - a_s) / (1 - a_t) x_t,
                std of (3) with eta = 1                                                    (arXiv 2006.11239, eq. 6, 7)

Image i draws its noise from its own key, so it does not depend on who else is in the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdiff.diffusion.guidance import Denoiser
from jaxdiff.diffusion.prediction import Prediction
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.shapes import ImageKeys, Images, PRNGKey, Scalar, Timestep

Step = Callable[[NoiseSchedule, Prediction, Images, Timestep, Timestep, Callable[[], Images]], Images]
"""(schedule, prediction at x_t, x_t, t, s, draw) -> x_s, where draw() gives standard normal noise."""


class Trajectory(NamedTuple):
    """What the reverse process went through: every x_t, and the clean image seen in each but the last."""

    x_t: Float[Array, "N+1 B H W C"]
    x_0: Float[Array, "N B H W C"]


def image_keys(key: PRNGKey, indices: Int[Array, "B"]) -> ImageKeys:
    """Return one key for each image number; equal numbers give equal images, in any batch."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def starting_noise(keys: ImageKeys, image_shape: tuple[int, int, int]) -> Images:
    """Return each image's pure noise, (height, width, channels)."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), image_shape))(keys)


def step_variance(schedule: NoiseSchedule, t: Timestep, s: Timestep) -> Scalar:
    """Return 1 - a_t / a_s, the variance that the forward process adds between s and t."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    # a_s - a_t = sigma_t^2 - sigma_s^2: the difference of the smaller pair keeps its digits in float32.
    from_sigma = (sigma_t - sigma_s) * (sigma_t + sigma_s)
    from_alpha = (alpha_s - alpha_t) * (alpha_s + alpha_t)
    return jnp.where(sigma_t < alpha_t, from_sigma, from_alpha) / alpha_s**2


def posterior_std(schedule: NoiseSchedule, t: Timestep, s: Timestep, eta: float = 1.0) -> Scalar:
    """Return equation (3), exactly 0 for the step to clean data."""
    _, sigma_t = schedule.alpha_sigma(t)
    _, sigma_s = schedule.alpha_sigma(s)
    return eta * sigma_s / sigma_t * jnp.sqrt(step_variance(schedule, t, s))


def ddim_step(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x_t: Images,
    t: Timestep,
    s: Timestep,
    draw: Callable[[], Images],
    eta: float = 0.0,
) -> Images:
    """Take one step of equation (2); eta is 0 for the deterministic process, 1 for DDPM's noise."""
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    if eta == 0.0:
        return alpha_s * prediction.x_0 + sigma_s * prediction.eps
    step_std = posterior_std(schedule, t, s, eta)
    direction = jnp.sqrt(jnp.maximum(0.0, sigma_s**2 - step_std**2))
    return alpha_s * prediction.x_0 + direction * prediction.eps + step_std * draw()


def ddpm_step(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x_t: Images,
    t: Timestep,
    s: Timestep,
    draw: Callable[[], Images],
) -> Images:
    """Take one ancestral step, equation (4), for any s < t and not only s = t - 1."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    of_x_0 = alpha_s * step_variance(schedule, t, s) / sigma_t**2
    of_x_t = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
    return of_x_0 * prediction.x_0 + of_x_t * x_t + posterior_std(schedule, t, s) * draw()


def sample(
    denoise: Denoiser,
    x_T: Images,
    keys: ImageKeys,
    schedule: NoiseSchedule,
    timesteps: Int[np.ndarray, "M"],
    step: Step,
    trajectory: bool = False,
) -> Images | tuple[Images, Trajectory]:
    """Run the reverse process as one `lax.scan`; compile time does not grow with the number of steps.

    Args:
      denoise: what sees x_t, guidance included.
      x_T: noise to start from.
      keys: one for each image, for the noise along the way.
      schedule: noise schedule.
      timesteps: from `with_final`: where to step, largest first, and where to end.
      step: `ddim_step`, `ddpm_step` or one of your own.
      trajectory: also return every state, at the price of keeping them all.

    Returns:
      The images at the last of `timesteps`, and the `Trajectory` if asked for.
    """

    def body(x_t: Images, now: tuple[Timestep, Timestep, Timestep]):
        t, s, number = now

        def draw() -> Images:
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), x_t.shape[1:]))
            return noise(keys)

        prediction = denoise(x_t, t)
        x_s = step(schedule, prediction, x_t, t, s, draw)
        return x_s, (x_s, prediction.x_0) if trajectory else None

    walked = jnp.asarray(timesteps)
    numbers = jnp.arange(1, len(timesteps), dtype=walked.dtype)
    x_0, states = jax.lax.scan(body, x_T, (walked[:-1], walked[1:], numbers))
    if not trajectory:
        return x_0
    return x_0, Trajectory(jnp.concatenate([x_T[None], states[0]]), states[1])
