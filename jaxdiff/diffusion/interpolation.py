"""Ways from one starting noise to another, a in [0, 1].

    (1)  lerp         (1 - a) x + a y: too short in between, sqrt((1 - a)^2 + a^2) of a noise's norm
    (2)  slerp        sin((1 - a) theta) / sin(theta) x + sin(a theta) / sin(theta) y,
                      theta the angle between x and y as flat vectors                            (Shoemake 1985)
    (3)  normal       ((1 - a) x + a y) / sqrt((1 - a)^2 + a^2): normal noise again, where x and y are independent
                                                                                     (arXiv 2408.08558)

A standard normal noise of d values has a norm of sqrt(2) Gamma((d + 1) / 2) / Gamma(d / 2), about sqrt(d - 1/2).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

Noise = Float[Array, "*shape"]
Between = Float[Array, "A *shape"]
Alphas = Float[Array, "A"]


def lerp(x: Noise, y: Noise, alphas: Alphas) -> Between:
    """Return equation (1) for every alpha."""
    return _mix(1 - alphas, x, alphas, y)


def slerp(x: Noise, y: Noise, alphas: Alphas) -> Between:
    """Return equation (2) for every alpha; of parallel noises, for which it is not defined, equation (1)."""
    unit_x, unit_y = x / jnp.linalg.norm(x), y / jnp.linalg.norm(y)
    # Of small and of nearly opposite angles too, unlike arccos (Kahan 2006).
    theta = 2 * jnp.arctan2(jnp.linalg.norm(unit_x - unit_y), jnp.linalg.norm(unit_x + unit_y))
    sine = jnp.sin(theta)
    defined = sine > 1e-6
    safe = jnp.where(defined, sine, 1.0)
    of_x = jnp.where(defined, jnp.sin((1 - alphas) * theta) / safe, 1 - alphas)
    of_y = jnp.where(defined, jnp.sin(alphas * theta) / safe, alphas)
    return _mix(of_x, x, of_y, y)


def normal_lerp(x: Noise, y: Noise, alphas: Alphas) -> Between:
    """Return equation (3) for every alpha."""
    length = jnp.sqrt((1 - alphas) ** 2 + alphas**2)
    return _mix((1 - alphas) / length, x, alphas / length, y)


def expected_norm(size: int) -> float:
    """Return the mean norm of standard normal noise of `size` values."""
    return math.sqrt(2) * math.exp(math.lgamma((size + 1) / 2) - math.lgamma(size / 2))


def _mix(of_x: Alphas, x: Noise, of_y: Alphas, y: Noise) -> Between:
    of_x, of_y = (jnp.expand_dims(weights, tuple(range(1, x.ndim + 1))) for weights in (of_x, of_y))
    return of_x * x[None] + of_y * y[None]
