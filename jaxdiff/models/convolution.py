"""Two-dimensional convolution with the parameters of `flax.linen.Conv`.

    (1)  y[h, w] = sum_ij  x[h + i - p, w + j - p] @ kernel[i, j]
    (2)  d kernel[i, j] = sum_hw  x[h, w]^T dy[h + p - i, w + p - j]         (of 1, h and w counted from x)

XLA computes (2) as a convolution whose output is the few pixels of the kernel, which its CPU code does slowly. On a CPU
(2) is therefore one matrix product with the shifted copies of dy side by side, which pays on large feature maps; and
where there are fewer pixels than features, as at the bottom of large UNets, (1) is one with those of x, because XLA's
convolution takes long to lay out a kernel that is larger than all else. GPUs keep XLA's own convolutions.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.shapes import Images

SHIFTED_PIXELS = 256
"""With fewer pixels than this, a height times a width, the copies cost what the product saves."""
SHIFTED_BYTES = 2**22
"""Most memory that the shifted copies take at a time, so that they stay in the processor's cache."""

Kernel = Float[Array, "size size C D"]


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
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.padding)
        return y + bias.astype(self.dtype)[None, None, None, :]


def convolve(x: Images, kernel: Kernel, strides: int = 1, padding: int = 0) -> Float[Array, "B h w D"]:
    """Return equation (1), every `strides`-th pixel of it; `padding` is p.

    On a CPU, where the output has the size of the input, only reverse-mode derivatives are defined.
    """
    size = kernel.shape[0]
    if (size, strides, padding) == (1, 1, 0):
        # The same numbers as a matrix product, whose gradients XLA computes faster on a CPU.
        return x @ kernel[0, 0]
    keeps_size = strides == 1 and 2 * padding == size - 1
    if keeps_size and math.prod(x.shape[:3]) <= kernel.shape[3] and jax.default_backend() == "cpu":
        return _convolve_few_pixels(x, kernel)
    if keeps_size and x.shape[1] * x.shape[2] >= SHIFTED_PIXELS and jax.default_backend() == "cpu":
        return _convolve_shifting(x, kernel)
    return _convolve(x, kernel, strides, padding)


def _convolve(x: Images, kernel: Kernel, strides: int, padding: int) -> Float[Array, "B h w D"]:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_few_pixels(x: Images, kernel: Kernel) -> Float[Array, "B H W D"]:
    size, height, width = kernel.shape[0], *x.shape[1:3]
    padding = size // 2
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    beside = jnp.concatenate(
        [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)], axis=-1
    )
    return beside @ kernel.reshape(-1, kernel.shape[3])


@jax.custom_vjp
def _convolve_shifting(x: Images, kernel: Kernel) -> Float[Array, "B H W D"]:
    return _convolve(x, kernel, 1, kernel.shape[0] // 2)


def _forward(x: Images, kernel: Kernel):
    return _convolve_shifting(x, kernel), (x, kernel)


def _backward(saved: tuple[Images, Kernel], dy: Float[Array, "B H W D"]) -> tuple[Images, Kernel]:
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _convolve(x, kernel, 1, kernel.shape[0] // 2), x)(dy)
    return dx, kernel_gradient(x, dy, kernel.shape[0])


_convolve_shifting.defvjp(_forward, _backward)


def kernel_gradient(x: Images, dy: Float[Array, "B H W D"], size: int) -> Kernel:
    """Return equation (2) for stride 1 and p = (size - 1) / 2, summed over images in float32."""
    batch, height, width, features = dy.shape
    padding = size // 2
    padded = jnp.pad(dy, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    image_bytes = dy.dtype.itemsize * size**2 * height * width * features
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * image_bytes <= SHIFTED_BYTES))

    def add_part(total, part):
        x, padded = part
        starts = range(2 * padding, -1, -1)
        shifted = [padded[:, i : i + height, j : j + width] for i in starts for j in starts]
        beside = jnp.concatenate(shifted, axis=-1)
        product = jnp.einsum("bhwc,bhwe->ce", x, beside, preferred_element_type=jnp.float32)
        return total + product, None

    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, images, *leaf.shape[1:]), (x, padded))
    total, _ = jax.lax.scan(add_part, jnp.zeros((x.shape[-1], size**2 * features)), parts)
    return jnp.moveaxis(total.reshape(-1, size, size, features), 0, 2).astype(x.dtype)
