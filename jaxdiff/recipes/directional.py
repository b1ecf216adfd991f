"""Learning the direction of vectors whose norm is fixed (arXiv 2512.13672).

    (1)  e = m v,  |v| = 1,  m the mean norm of the model's own words
    (2)  g = dL/dv - kappa mu,  mu the direction of the initialiser       (a von Mises-Fisher prior of strength kappa)
    (3)  g <- g - <g, v> v,  g <- g / |g|                                 (along the sphere, one unit long)
    (4)  v <- (v - eta g) / |v - eta g|

Textual inversion lets norms grow to many times those of words, which drowns positions and the rest of the text. A step
turns each vector by arctan(eta). The paper's eta is constant; here it follows the schedule that every training has.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

Rows = Mapping[str, Float[Array | np.ndarray, "_ D"]]
LEAST = 1e-12
"""Length of a gradient below which it has no direction."""


def with_norm(rows: Rows, norm: float) -> dict[str, Array]:
    """Return the rows scaled to a norm; a row of zeros stays one."""
    return {
        word: jnp.asarray(row) * (norm / jnp.maximum(jnp.linalg.norm(row, axis=-1, keepdims=True), LEAST))
        for word, row in rows.items()
    }


def directional(learning_rate: optax.Schedule, norm: float, start: Rows, prior: float) -> optax.GradientTransformation:
    """Return equations (2) to (4) as an optimizer of the vectors e.

    Args:
      learning_rate: eta, by step.
      norm: m.
      start: the initialisers, whose directions are mu.
      prior: kappa.
    """
    towards = with_norm(start, 1.0)

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(gradients: Any, state: optax.ScaleByScheduleState, params: Any = None):
        rate = learning_rate(state.count)

        def turn(gradient: Array, vectors: Array, mu: Array) -> Array:
            v = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
            g = norm * gradient - prior * mu
            g = g - jnp.sum(g * v, axis=-1, keepdims=True) * v
            g = g / jnp.maximum(jnp.linalg.norm(g, axis=-1, keepdims=True), LEAST)
            turned = v - rate * g
            return norm * turned / jnp.linalg.norm(turned, axis=-1, keepdims=True) - vectors

        # What another optimizer sees to is here in name alone.
        mu = {word: towards.get(word, gradient) for word, gradient in gradients.items()}
        return jax.tree.map(turn, gradients, params, mu), state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
