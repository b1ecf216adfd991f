"""The levels of a UNet or an autoencoder: blocks at one resolution, then a step to the next (arXiv 1505.04597).

A level is given what makes its parts; names give the parameter trees of diffusers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.shapes import Images

Features = Float[Array, "_ _ _ _"]
"""Images of any size and number of channels."""
Make = Callable[..., Any]
"""From `name=` to a linen module."""


class Level(nn.Module):
    """What the blocks of one level are made of.

    Attributes:
      num_layers: residual blocks.
      resnet: makes a residual block.
      attention: makes what follows each residual block; None for nothing.
      resample: makes what leads to the next level; None in the last.
    """

    num_layers: int
    resnet: Make
    attention: Make | None = None
    resample: Make | None = None


class DownBlock(Level):
    """Residual blocks, then a downsampling."""

    @nn.compact
    def __call__(
        self, x: Images, embedding: Float[Array, "B E"] | None = None, train: bool = False, context: tuple = ()
    ) -> tuple[Features, list[Features]]:
        """Return the features and everything that the up path will want back; `context` is for the attention."""
        pushed = []
        for i in range(self.num_layers):
            x = self.resnet(name=f"resnets_{i}")(x, embedding, train)
            if self.attention:
                x = self.attention(name=f"attentions_{i}")(x, *context)
            pushed.append(x)
        if self.resample:
            x = self.resample(name="downsamplers_0")(x)
            pushed.append(x)
        return x, pushed


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    resnet: Make
    attention: Make

    @nn.compact
    def __call__(
        self, x: Images, embedding: Float[Array, "B E"] | None = None, train: bool = False, context: tuple = ()
    ) -> Float[Array, "B H W D"]:
        """Return features of the same shape."""
        x = self.resnet(name="resnets_0")(x, embedding, train)
        x = self.attention(name="attentions_0")(x, *context)
        return self.resnet(name="resnets_1")(x, embedding, train)


class UpBlock(Level):
    """Residual blocks, each fed one skip where there are any, then an upsampling."""

    @nn.compact
    def __call__(
        self,
        x: Images,
        skips: Sequence[Features] = (),
        embedding: Float[Array, "B E"] | None = None,
        train: bool = False,
        context: tuple = (),
        size: tuple[int, int] | None = None,
    ) -> Features:
        """Return the features.

        Args:
          x: from the level below.
          skips: what the down path pushed for this level, newest last.
          embedding: of the timestep.
          train: apply dropout.
          context: for the attention.
          size: height and width of the level above, where they may be odd; None means twice those of this one.
        """
        for i in range(self.num_layers):
            if skips:
                x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            x = self.resnet(name=f"resnets_{i}")(x, embedding, train)
            if self.attention:
                x = self.attention(name=f"attentions_{i}")(x, *context)
        if self.resample:
            x = self.resample(name="upsamplers_0")(x, size)
        return x
