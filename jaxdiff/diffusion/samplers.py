"""The reverse process: from noise to images in any falling list of timesteps, one compiled loop.

    (1)  eps and x_0 are the denoiser's at x_t; a_t = alphas_cumprod[t], a_s likewise for s < t, a_-1 = 1
    (2)  DDIM   x_s = sqrt(a_s) x_0 + sqrt(1 - a_s - step_std^2) eps + step_std z          (arXiv 2010.02502, eq. 12)
    (3)         step_std = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)             (eq. 16)
    (4)  DDPM   q(x_s | x_t, x_0), mean  sqrt(a_s) (1 - a_t/a_s) / (1 - a_t) x_0
                                       + sqrt(a_t/a_s) (1 - a_s) / (1 - a_t) x_t,
                std of (3) with eta = 1                                                    (arXiv 2006.11239, eq. 6, 7)

Image i draws its noise from its own key, so it does not depend on who else is in the batch. Samplers of higher order
are in `edm` (Euler, Heun) and `multistep` (DPM-Solver++, UniPC, PNDM).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.diffusion.guidance import Denoiser
from jaxdiff.diffusion.prediction import Prediction, expand
from jaxdiff.diffusion.schedule import NoiseSchedule, Times
from jaxdiff.diffusion.timesteps import Walk
from jaxdiff.shapes import ImageKeys, Images, PRNGKey, Scalar, Timestep

Draw = Callable[[], Images]
"""Give standard normal noise of the images' shape."""


class Move(NamedTuple):
    """One evaluation of the denoiser and what it is for; as stacked arrays, a sampler's whole plan.

    Attributes:
      t: where the interval begins.
      s: where it ends, s < t.
      number: which interval this is, from 1.
      total: how many there are.
      again: the denoiser looks at the interval a second time, now from its end, to correct the first try.
    """

    t: Timestep
    s: Timestep
    number: Int[Array, ""]
    total: Int[Array, ""]
    again: Bool[Array, ""]

    @property
    def seen_at(self) -> Times:
        """Where the denoiser is evaluated."""
        return jnp.where(self.again, self.s, self.t)


class Sampler:
    """How to get from x_t to x_s: a pure step, what it remembers between steps, and where it looks at the denoiser."""

    def plan(self, timesteps: Walk) -> Move:
        """Return one stacked `Move` for each evaluation; `timesteps` are from `with_final`."""
        return plan_moves(timesteps)

    def start(self, x_T: Images) -> Any:
        """Return what there is to remember before the first step; its shapes never change."""
        return ()

    def step(
        self, schedule: NoiseSchedule, denoise: Denoiser, x_t: Images, memory: Any, move: Move, draw: Draw
    ) -> tuple[Images, Any, Prediction]:
        """Evaluate the denoiser once; return x_s, the new memory, and what the denoiser saw."""
        raise NotImplementedError


class Trajectory(NamedTuple):
    """What the reverse process went through: every state, and the clean image seen in each but the last."""

    x_t: Float[Array, "M+1 B H W C"]
    x_0: Float[Array, "M B H W C"]


def image_keys(key: PRNGKey, indices: Int[Array, "B"]) -> ImageKeys:
    """Return one key for each image number; equal numbers give equal images, in any batch."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def starting_noise(keys: ImageKeys, image_shape: tuple[int, int, int]) -> Images:
    """Return each image's pure noise, (height, width, channels)."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), image_shape))(keys)


def sample(
    denoise: Denoiser,
    x_T: Images,
    keys: ImageKeys,
    schedule: NoiseSchedule,
    timesteps: Walk,
    sampler: Sampler,
    trajectory: bool = False,
) -> Images | tuple[Images, Trajectory]:
    """Run the reverse process as one `lax.scan`; compile time does not grow with the number of steps.

    Args:
      denoise: what sees x_t, guidance included.
      x_T: noise to start from.
      keys: one for each image, for the noise along the way.
      schedule: noise schedule.
      timesteps: from `with_final`: where to step, largest first, and where to end.
      sampler: `DDIM()` or any other.
      trajectory: also return every state, at the price of keeping them all.

    Returns:
      The images at the last of `timesteps`, and the `Trajectory` if asked for.
    """

    def body(carry: tuple[Images, Any], move: Move):
        x_t, memory = carry
        x_s, memory, prediction = sampler.step(schedule, denoise, x_t, memory, move, make_draw(keys, x_t, move.number))
        return (x_s, memory), (x_s, prediction.x_0) if trajectory else None

    (x_0, _), states = jax.lax.scan(body, (x_T, sampler.start(x_T)), sampler.plan(timesteps))
    if not trajectory:
        return x_0
    return x_0, Trajectory(jnp.concatenate([x_T[None], states[0]]), states[1])


def make_draw(keys: ImageKeys, x_t: Images, number: Int[Array, ""]) -> Draw:
    """Return what draws the noise of one interval, each image's from its own key."""
    return lambda: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), x_t.shape[1:]))(keys)


def plan_moves(timesteps: Walk, corrected: int = 0) -> Move:
    """Return the moves along a list, the first `corrected` intervals looked at twice, except the one to clean data."""
    total = len(timesteps) - 1
    rows = []
    for i, (t, s) in enumerate(zip(timesteps, timesteps[1:])):
        rows += [(t, s, i + 1, total, again) for again in ((False, True) if i < corrected and s >= 0 else (False,))]
    return Move(*(jnp.asarray(np.array(column)) for column in zip(*rows)))


def recombine(schedule: NoiseSchedule, prediction: Prediction, s: Timestep) -> Images:
    """Return alpha_s x_0 + sigma_s eps, the state at s that this prediction fits."""
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    return alpha_s * prediction.x_0 + sigma_s * prediction.eps


def step_variance(schedule: NoiseSchedule, t: Timestep, s: Timestep) -> Scalar:
    """Return 1 - a_t / a_s, the variance that the forward process adds between s and t."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    # a_s - a_t = sigma_t^2 - sigma_s^2: the difference of the smaller pair keeps its digits in float32.
    from_sigma = (sigma_t - sigma_s) * (sigma_t + sigma_s)
    from_alpha = (alpha_s - alpha_t) * (alpha_s + alpha_t)
    return jnp.where(sigma_t < alpha_t, from_sigma, from_alpha) / alpha_s**2


def posterior_std(schedule: NoiseSchedule, t: Timestep, s: Timestep) -> Scalar:
    """Return equation (3) for eta = 1, exactly 0 for the step to clean data."""
    _, sigma_t = schedule.alpha_sigma(t)
    _, sigma_s = schedule.alpha_sigma(s)
    return sigma_s / sigma_t * jnp.sqrt(step_variance(schedule, t, s))


@dataclass(frozen=True)
class DDIM(Sampler):
    """Equation (2).

    Attributes:
      eta: 0 for the deterministic process, 1 for DDPM's noise; an array gives every image its own.
    """

    eta: float | Float[Array, "B"] = 0.0

    def step(self, schedule, denoise, x_t, memory, move, draw):
        """Take one step of equation (2)."""
        prediction = denoise(x_t, move.t)
        if isinstance(self.eta, int | float) and self.eta == 0:
            return recombine(schedule, prediction, move.s), memory, prediction
        alpha_s, sigma_s = schedule.alpha_sigma(move.s)
        step_std = expand(self.eta * posterior_std(schedule, move.t, move.s), x_t)
        direction = jnp.sqrt(jnp.maximum(0.0, sigma_s**2 - step_std**2))
        return alpha_s * prediction.x_0 + direction * prediction.eps + step_std * draw(), memory, prediction


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling, equation (4), for any s < t and not only s = t - 1."""

    def step(self, schedule, denoise, x_t, memory, move, draw):
        """Draw x_s from equation (4)."""
        prediction = denoise(x_t, move.t)
        alpha_t, sigma_t = schedule.alpha_sigma(move.t)
        alpha_s, sigma_s = schedule.alpha_sigma(move.s)
        of_x_0 = alpha_s * step_variance(schedule, move.t, move.s) / sigma_t**2
        of_x_t = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
        noise = posterior_std(schedule, move.t, move.s) * draw()
        return of_x_0 * prediction.x_0 + of_x_t * x_t + noise, memory, prediction
