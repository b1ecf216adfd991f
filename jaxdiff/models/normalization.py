"""Group normalization (arXiv 1803.08494) with the parameters of `flax.linen.GroupNorm`, and SiLU after it."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class GroupNorm(nn.Module):
    """Normalize groups of channels of each image, scale, shift, and apply the activation.

    Attributes:
      num_groups: groups that the channels split into.
      epsilon: added to the variance.
      activation: "silu" to apply x * sigmoid(x) to the result, None for nothing.
      dtype: type of the result; statistics are always float32.
    """

    num_groups: int = 32
    epsilon: float = 1e-5
    activation: Literal["silu"] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *spatial C"]) -> Float[Array, "B *spatial C"]:
        """Return features of the same shape."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        # Statistics of channels first, of groups from those: reducing over pixels and channels together takes XLA
        # three times as long on a CPU.
        pixels = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        of_channels, within = _statistics(pixels)
        mean = self._of_groups(of_channels)
        variance = self._of_groups(within + jnp.square(of_channels - mean))
        gain = jax.lax.rsqrt(variance + self.epsilon) * scale[None]
        shift = bias[None] - mean * gain
        y = pixels * gain[:, None] + shift[:, None]
        if self.activation == "silu":
            y = jax.nn.silu(y)
        return y.reshape(x.shape).astype(self.dtype)

    def _of_groups(self, of_channels: Float[Array, "B C"]) -> Float[Array, "B C"]:
        """Average a statistic over each group of channels and give it back to every channel of the group."""
        grouped = of_channels.reshape(of_channels.shape[0], self.num_groups, -1)
        return jnp.repeat(jnp.mean(grouped, axis=-1), grouped.shape[-1], axis=1)


def _statistics(pixels: Float[Array, "B N C"]) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Return the mean and the variance of every channel."""
    if jax.default_backend() == "cpu":
        mean = jnp.mean(pixels, axis=1)
        # No gradient by this mean: deviations from it sum to 0.
        return mean, jnp.mean(jnp.square(pixels - jax.lax.stop_gradient(mean)[:, None]), axis=1)
    # Elsewhere reading memory takes the time, so both come of one reading, of numbers near 0, whose squares are exact.
    # The middle one of three pixels, because one alone may be far from all others.
    first, second, third = (jax.lax.stop_gradient(pixels[:, number]) for number in (0, pixels.shape[1] // 2, -1))
    near = jnp.maximum(jnp.minimum(first, second), jnp.minimum(jnp.maximum(first, second), third))
    moved = pixels - near[:, None]
    mean = jnp.mean(moved, axis=1)
    return near + mean, jnp.maximum(jnp.mean(jnp.square(moved), axis=1) - jnp.square(mean), 0)
