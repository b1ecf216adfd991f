"""DDIM inversion: the noise from which DDIM draws a given image.

(1)  DDIM, eta = 0, from s down to t:  x_t = alpha_t x_0 + sigma_t eps,  both seen at (x_s, s)   (arXiv 2010.02502)
(2)  its inverse:  x_s = alpha_s (x_t - sigma_t eps(x_s, s)) / alpha_t + sigma_s eps(x_s, s)
(3)  (2) has x_s on both sides; it is iterated from x_s = x_t. One iteration is the usual inversion (section 4.3),
     more of them approach the exact one                                      (arXiv 2309.04907, section 3.2)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxdiff.diffusion.guidance import Denoiser
from jaxdiff.diffusion.prediction import Prediction
from jaxdiff.diffusion.samplers import recombine
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.timesteps import Walk
from jaxdiff.shapes import Images, Timestep


def invert(
    denoise: Denoiser,
    x_0: Images,
    schedule: NoiseSchedule,
    timesteps: Walk,
    iterations: int | Int[Array, ""] = 1,
) -> Images:
    """Return the noise at the first of `timesteps` that DDIM (eta = 0) takes to x_0 along the same list.

    Args:
      denoise: what DDIM sees, guidance included; clipping inside it cannot be undone.
      x_0: images at the last of `timesteps`.
      schedule: noise schedule.
      timesteps: from `with_final`.
      iterations: of equation (3), at least 1; each costs one evaluation a step.
    """

    def climb(x_t: Images, interval: tuple[Timestep, Timestep]) -> tuple[Images, None]:
        t, s = interval
        alpha_t, sigma_t = schedule.alpha_sigma(t)

        def iterate(_, x_s: Images) -> Images:
            eps = denoise(x_s, s).eps
            return recombine(schedule, Prediction((x_t - sigma_t * eps) / alpha_t, eps), s)

        return jax.lax.fori_loop(0, iterations, iterate, x_t), None

    rising = jnp.asarray(timesteps)[::-1]
    noise, _ = jax.lax.scan(climb, x_0, (rising[:-1], rising[1:]))
    return noise
