"""Two-dimensional convolution with the parameters of `flax.linen.Conv`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.shapes import Images


class Conv(nn.Module):
    """Convolve with a square kernel, padded by `padding` zeros on every side.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel, in pixels.
      strides: pixels from one output to the next, in both directions.
      padding: zeros added on each of the four sides.
      dtype: type of the computation; the parameters stay float32.
      kernel_init: initialiser of the kernel.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int = 1
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, "B h w D"]:
        """Return features of (size + 2*padding - kernel_size) // strides + 1 pixels a side."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if (self.kernel_size, self.strides, self.padding) == (1, 1, 0):
            # The same numbers as a matrix product, whose gradients XLA computes faster on a CPU.
            y = x @ kernel[0, 0]
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.strides, self.strides),
                ((self.padding, self.padding),) * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return y + bias.astype(self.dtype)[None, None, None, :]
