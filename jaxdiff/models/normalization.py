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
        flat = x.astype(jnp.float32).reshape(x.shape[0], -1, self.num_groups, channels // self.num_groups)
        centred = flat - jnp.mean(flat, axis=(1, 3), keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(centred**2, axis=(1, 3), keepdims=True) + self.epsilon)
        y = (centred * inverse).reshape(x.shape[0], -1, channels) * scale[None, None] + bias[None, None]
        if self.activation == "silu":
            y = jax.nn.silu(y)
        return y.reshape(x.shape).astype(self.dtype)
