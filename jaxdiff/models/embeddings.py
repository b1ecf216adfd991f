"""What tells the network when and what: sinusoidal timesteps and learned conditions with a null token.

(1)  freq_j = max_period^(-j / (half - freq_shift)),  j = 0..half-1          (arXiv 2006.11239; 1706.03762)
(2)  emb(t) = [sin(t freq) | cos(t freq)]   or, with flip_sin_to_cos, [cos | sin]
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.shapes import Labels, Timesteps


def sinusoidal_embedding(
    t: Timesteps,
    features: int,
    flip_sin_to_cos: bool = False,
    freq_shift: float = 0.0,
    max_period: float = 10_000.0,
) -> Float[Array, "B F"]:
    """Return equations (1) and (2) in float32; `freq_shift` is 1 in DDPM's code and 0 in Stable Diffusion's."""
    half = features // 2
    freqs = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(waves, axis=-1)


class TimestepEmbedding(nn.Module):
    """Two dense layers with SiLU between them, from the sinusoid to the width that residual blocks read."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, waves: Float[Array, "B F"]) -> Float[Array, "B E"]:
        """Return the embedding of each timestep."""
        hidden = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(waves)
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(hidden))


class ConditionEmbedding(nn.Module):
    """One learned vector for each value of a condition, and one more, the last row, for "no condition"."""

    num_values: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, labels: Labels) -> Float[Array, "B E"]:
        """Look up labels in 0..num_values, where num_values itself is the null token."""
        table = self.param("embedding", nn.initializers.normal(1.0), (self.num_values + 1, self.features))
        one_hot = jax.nn.one_hot(labels, self.num_values + 1, dtype=self.dtype)
        return one_hot @ table.astype(self.dtype)
