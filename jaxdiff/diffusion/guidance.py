"""Guidance: a denoiser made of a denoiser. No sampler knows of it.

    (1)  D_g = (1 - g) D(nothing) + g D(c),   g = 1 + w of Ho & Salimans          (arXiv 2207.12598, eq. 6)
    (2)  D   = (1 - g_1) D(nothing) + (g_1 - g_2) D(c_1) + g_2 D(c_1, c_2)        (arXiv 2211.09800, eq. 3)
    (3)  guide only where low <= sigma_t / alpha_t <= high                        (arXiv 2404.07724, eq. 6)

(1) and (2) are linear in the prediction and their weights sum to 1, so x_0, eps and v may all be mixed alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.prediction import Prediction
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.shapes import Images, Timestep

Condition = Any
"""Any tree of arrays with one entry for each image."""
Denoiser = Callable[[Images, Timestep], Prediction]
ConditionalDenoiser = Callable[[Images, Timestep, Condition], Prediction]


def chain_weights(scales: Sequence[float]) -> tuple[float, ...]:
    """Return the weights of nothing, c_1, c_1 and c_2, ... in equation (2); one scale gives equation (1).

    Equal neighbouring scales make the weight between them exactly 0, and all scales 1 leave only the last branch.
    """
    outer = (1.0, *scales)
    return tuple(before - after for before, after in zip(outer, outer[1:])) + (float(outer[-1]),)


def guide(denoise: ConditionalDenoiser, branches: Sequence[tuple[float, Condition]]) -> Denoiser:
    """Return the weighted sum of a denoiser's predictions under several conditions.

    All branches run as one batch. A branch of weight exactly 0 is not run at all.

    Args:
      denoise: the conditional denoiser.
      branches: (weight, condition) pairs whose weights sum to 1.

    Raises:
      ValueError: the weights do not sum to 1.
    """
    branches = [(weight, condition) for weight, condition in branches if weight != 0.0]
    weights = [weight for weight, _ in branches]
    if abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"guidance weights must sum to 1, got {weights}")
    conditions = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(condition for _, condition in branches))

    def guided(x_t: Images, t: Timestep) -> Prediction:
        predictions = denoise(jnp.concatenate([x_t] * len(branches)), t, conditions)

        def mix(stacked):
            parts = jnp.split(stacked, len(branches))
            return sum(weight * part for weight, part in zip(weights, parts))

        return predictions if weights == [1.0] else jax.tree.map(mix, predictions)

    return guided


def within_interval(guided: Denoiser, unguided: Denoiser, schedule: NoiseSchedule, low: float, high: float) -> Denoiser:
    """Return equation (3): `guided` inside the interval of noise levels, `unguided`, which costs less, outside."""

    def denoise(x_t: Images, t: Timestep) -> Prediction:
        level = schedule.noise_level(t)
        return jax.lax.cond((low <= level) & (level <= high), guided, unguided, x_t, t)

    return denoise
