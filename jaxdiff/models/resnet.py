"""Residual block, downsampling and upsampling of the diffusion UNets (arXiv 2006.11239, appendix B)."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.convolution import Conv
from jaxdiff.models.normalization import GroupNorm
from jaxdiff.shapes import Images


class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice around a shortcut; the embedding enters between the two halves.

    Attributes:
      scale_shift: the embedding scales and shifts the second norm (arXiv 2105.05233, "adaptive group
        normalization") instead of being added before it.
    """

    features: int
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    scale_shift: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Images, embedding: Float[Array, "B E"] | None = None, train: bool = False
    ) -> Float[Array, "B H W D"]:
        """Return features of the same height and width with `features` channels."""

        def norm(name: str, activation: Literal["silu"] | None = "silu") -> GroupNorm:
            return GroupNorm(
                self.norm_num_groups, epsilon=self.norm_eps, activation=activation, dtype=self.dtype, name=name
            )

        hidden = Conv(self.features, dtype=self.dtype, name="conv1")(norm("norm1")(x))
        if embedding is not None:
            width = 2 * self.features if self.scale_shift else self.features
            projected = nn.Dense(width, dtype=self.dtype, name="time_emb_proj")(nn.silu(embedding))[:, None, None, :]
        if embedding is not None and self.scale_shift:
            scale, shift = jnp.split(projected, 2, axis=-1)
            hidden = nn.silu(norm("norm2", activation=None)(hidden) * (1 + scale) + shift)
        else:
            hidden = norm("norm2")(hidden if embedding is None else hidden + projected)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        hidden = Conv(self.features, dtype=self.dtype, name="conv2")(hidden)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        return x + hidden


class Downsample(nn.Module):
    """Halve height and width with a strided 3x3 convolution.

    Attributes:
      padding: 1 for one pixel of zeros on every side, 0 for one at the bottom and one at the right.
    """

    features: int
    padding: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, "B h w D"]:
        """Return features of half the height and width, rounded up (with padding 0, down)."""
        if self.padding == 0:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return Conv(self.features, strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Enlarge by nearest neighbour, then a 3x3 convolution."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, size: tuple[int, int] | None = None) -> Float[Array, "B h w D"]:
        """Return features of this height and width; None means twice those of `x`."""
        height, width = x.shape[1:3]
        if size is None or size == (2 * height, 2 * width):
            x = repeat(x, "b h w c -> b (h two) (w too) c", two=2, too=2)
        else:
            rows, columns = (np.arange(new) * old // new for new, old in zip(size, (height, width)))
            x = x[:, rows][:, :, columns]
        return Conv(self.features, dtype=self.dtype, name="conv")(x)
