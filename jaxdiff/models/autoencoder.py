"""The autoencoder of latent diffusion: images to a normal distribution over latents, and back (arXiv 2112.10752).

    (1)  q(z | x) = N(mean, std^2),   [mean | log std^2] = encoder(x),   log std^2 kept in [-30, 20]
    (2)  what diffusion sees is scaling_factor * z, whose values have about unit variance

The parameter tree is that of diffusers' last Flax class, `FlaxAutoencoderKL`, so that its
`diffusion_flax_model.msgpack` files load unchanged.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.attention import AttentionBlock
from jaxdiff.models.convolution import Conv
from jaxdiff.models.levels import DownBlock, MidBlock, UpBlock
from jaxdiff.models.normalization import GroupNorm
from jaxdiff.models.resnet import Downsample, ResnetBlock, Upsample
from jaxdiff.shapes import Images, PRNGKey

Latents = Float[Array, "B h w c"]
"""What diffusion works on: a few numbers for each patch of pixels, channels last."""

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that decides shapes and function; the defaults are Stable Diffusion 1's.

    Attributes:
      block_out_channels: channels of each level, from pixels to latents; each level halves the one before.
      layers_per_block: residual blocks of a level of the encoder; the decoder's have one more.
      scaling_factor: see equation (2).
      force_upcast: whether float16 is too narrow for its decoder; kept for other libraries, as nothing here decodes in
        less than float32 unless it is told to.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    force_upcast: bool = True

    def __post_init__(self):
        counts = (self.in_channels, self.out_channels, self.latent_channels, self.layers_per_block, self.sample_size)
        if not self.block_out_channels or min(*counts, *self.block_out_channels, self.norm_num_groups) < 1:
            raise ValueError("sizes, channels, layers and groups must all number at least 1")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"{channels} channels do not split into {self.norm_num_groups} groups")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor must be positive, got {self.scaling_factor}")

    @property
    def size_divisor(self) -> int:
        """Pixels on a side of the patch that one latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)


class LatentNormal(NamedTuple):
    """Equation (1), not scaled by equation (2)."""

    mean: Latents
    log_variance: Latents

    def sample(self, key: PRNGKey) -> Latents:
        """Draw latents."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(key, self.mean.shape)


class Autoencoder(nn.Module):
    """Encoder, decoder and the linear maps beside the latents."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Name the parts as the published parameters are named."""
        cfg = self.config
        self.encoder = Encoder(cfg, self.dtype)
        self.decoder = Decoder(cfg, self.dtype)
        self.quant_conv = Conv(2 * cfg.latent_channels, kernel_size=1, padding=0, dtype=self.dtype)
        self.post_quant_conv = Conv(cfg.latent_channels, kernel_size=1, padding=0, dtype=self.dtype)

    def encode(self, images: Images) -> LatentNormal:
        """Return equation (1) in float32; `images` are pixels in [-1, 1]."""
        moments = self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return LatentNormal(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latents: Latents) -> Images:
        """Return pixels, about in [-1, 1], in float32; `latents` are not scaled by equation (2)."""
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype))).astype(jnp.float32)

    def __call__(self, images: Images) -> Float[Array, "B H W D"]:
        """Return the decoded mean of each image."""
        return self.decode(self.encode(images).mean)


def make_parts(config: AutoencoderConfig, dtype: DTypeLike) -> tuple[list[partial], partial]:
    """Return what makes the residual blocks of each level and the attention in the middle."""
    groups = config.norm_num_groups
    resnets = [partial(ResnetBlock, channels, groups, NORM_EPS, dtype=dtype) for channels in config.block_out_channels]
    names = ("query", "key", "value", "proj_attn")
    return resnets, partial(AttentionBlock, None, groups, NORM_EPS, dtype, names)


class Encoder(nn.Module):
    """From pixels to mean and log variance, before the last linear map."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images) -> Latents:
        """Return twice as many channels as latents have."""
        cfg, channels = self.config, self.config.block_out_channels
        resnets, attention = make_parts(cfg, self.dtype)
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, resnet in enumerate(resnets):
            down = partial(Downsample, channels[i], 0, self.dtype) if i < len(resnets) - 1 else None
            x, _ = DownBlock(cfg.layers_per_block, resnet, None, down, name=f"down_blocks_{i}")(x)
        x = MidBlock(resnets[-1], attention, name="mid_block")(x)
        x = GroupNorm(cfg.norm_num_groups, NORM_EPS, "silu", self.dtype, name="conv_norm_out")(x)
        return Conv(2 * cfg.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """From latents, after the first linear map, to pixels."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Latents) -> Images:
        """Return pixels."""
        cfg, channels = self.config, self.config.block_out_channels[::-1]
        resnets, attention = make_parts(cfg, self.dtype)
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
        x = MidBlock(resnets[-1], attention, name="mid_block")(x)
        for i, resnet in enumerate(reversed(resnets)):
            up = partial(Upsample, channels[i], self.dtype) if i < len(resnets) - 1 else None
            x = UpBlock(cfg.layers_per_block + 1, resnet, None, up, name=f"up_blocks_{i}")(x)
        x = GroupNorm(cfg.norm_num_groups, NORM_EPS, "silu", self.dtype, name="conv_norm_out")(x)
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x)
