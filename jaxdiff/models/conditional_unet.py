"""The latent diffusion UNet of Stable Diffusion, conditioned on time and on a text (arXiv 2112.10752).

The parameter tree is that of diffusers' last Flax class, `FlaxUNet2DConditionModel`, so that its
`diffusion_flax_model.msgpack` files load unchanged.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.attention import AttentionKernel
from jaxdiff.models.convolution import Conv
from jaxdiff.models.embeddings import TimestepEmbedding, sinusoidal_embedding
from jaxdiff.models.levels import DownBlock, MidBlock, UpBlock
from jaxdiff.models.normalization import GroupNorm
from jaxdiff.models.resnet import Downsample, ResnetBlock, Upsample
from jaxdiff.models.spatial_transformer import Context, SpatialTransformer
from jaxdiff.shapes import Images, Timesteps


@dataclass(frozen=True)
class ConditionalUNetConfig:
    """Everything that decides shapes and function; the defaults are Stable Diffusion 1's.

    Attributes:
      sample_size: height and width of the latents it was trained on.
      block_out_channels: channels of each level, from full resolution down; each level halves the one before.
      attention: whether each level has a transformer after its residual blocks.
      layers_per_block: residual blocks of a down level; an up level has one more.
      cross_attention_dim: features of a token of the text.
      num_attention_heads: heads of the transformers of each level.
      use_linear_projection: see `SpatialTransformer.linear`.
      upcast_attention: whether scores of attention must be float32, as they always are here; kept for other libraries.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    downsample_padding: int = 1
    upcast_attention: bool = False

    def __post_init__(self):
        levels = len(self.block_out_channels)
        if not levels or len(self.attention) != levels or len(self.num_attention_heads) != levels:
            raise ValueError(
                f"every level needs channels, attention and heads: {levels}, {len(self.attention)} and "
                f"{len(self.num_attention_heads)} given"
            )
        counts = (self.sample_size, self.in_channels, self.out_channels, self.layers_per_block, self.norm_num_groups)
        if min(*counts, *self.block_out_channels, *self.num_attention_heads, self.cross_attention_dim) < 1:
            raise ValueError("sizes, channels, layers, groups and heads must all number at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        for channels, heads in zip(self.block_out_channels, self.num_attention_heads):
            if channels % self.norm_num_groups or channels % heads:
                raise ValueError(
                    f"{channels} channels do not split into {self.norm_num_groups} groups and {heads} heads"
                )

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Features of a head in each level that has transformers, and in the middle."""
        dims = [channels // heads for channels, heads in zip(self.block_out_channels, self.num_attention_heads)]
        return (*(dim for dim, attends in zip(dims, self.attention) if attends), dims[-1])


class ConditionalUNet(nn.Module):
    """Predict noise, clean latents or velocity from noisy latents, their timestep and a text."""

    config: ConditionalUNetConfig
    dtype: DTypeLike = jnp.float32
    kernel: AttentionKernel = "xla"

    def setup(self):
        """Lay out the levels; names give the published parameter tree."""
        cfg, top = self.config, self.config.block_out_channels[0]
        self.conv_in = Conv(top, dtype=self.dtype)
        self.time_embedding = TimestepEmbedding(4 * top, dtype=self.dtype)
        levels = [self._make_parts(level) for level in range(len(cfg.block_out_channels))]
        self.down_blocks = [
            DownBlock(cfg.layers_per_block, resnet, attention if attends else None, down)
            for (resnet, attention, down, _), attends in zip(levels, cfg.attention)
        ]
        self.mid_block = MidBlock(*levels[-1][:2])
        self.up_blocks = [
            UpBlock(cfg.layers_per_block + 1, resnet, attention if attends else None, up)
            for (resnet, attention, _, up), attends in zip(reversed(levels), reversed(cfg.attention))
        ]
        self.conv_norm_out = GroupNorm(cfg.norm_num_groups, epsilon=cfg.norm_eps, activation="silu", dtype=self.dtype)
        self.conv_out = Conv(cfg.out_channels, dtype=self.dtype)

    def _make_parts(self, level: int) -> tuple[partial, partial, partial | None, partial | None]:
        """Return what makes residual blocks, transformers, the step down and the step up of one level."""
        cfg, channels = self.config, self.config.block_out_channels[level]
        resnet = partial(ResnetBlock, channels, cfg.norm_num_groups, cfg.norm_eps, cfg.dropout, dtype=self.dtype)
        attention = partial(
            SpatialTransformer,
            cfg.num_attention_heads[level],
            cfg.norm_num_groups,
            cfg.use_linear_projection,
            self.dtype,
            self.kernel,
        )
        down = partial(Downsample, channels, cfg.downsample_padding, self.dtype)
        up = partial(Upsample, channels, self.dtype)
        lowest = level == len(cfg.block_out_channels) - 1
        return resnet, attention, None if lowest else down, None if level == 0 else up

    def __call__(
        self, x_t: Images, t: Timesteps, context: Context | None = None, train: bool = False
    ) -> Float[Array, "B H W D"]:
        """Return the prediction in float32, of the latents' height and width.

        Args:
          x_t: noisy latents.
          t: timestep of each, 0..T-1.
          context: the encoded text of each; None means that keys and values are given, see `project_context`.
          train: apply dropout (needs the "dropout" random stream).
        """
        cfg = self.config
        waves = sinusoidal_embedding(t, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift)
        embedding = self.time_embedding(waves)
        x = self.conv_in(x_t.astype(self.dtype))
        skips = [x]
        for block in self.down_blocks:
            x, pushed = block(x, embedding, train, (context,))
            skips.extend(pushed)
        x = self.mid_block(x, embedding, train, (context,))
        for up_block in self.up_blocks:
            split = len(skips) - cfg.layers_per_block - 1
            _, height, width, _ = skips[max(split - 1, 0)].shape
            x = up_block(x, skips[split:], embedding, train, (context,), (height, width))
            skips = skips[:split]
        return self.conv_out(self.conv_norm_out(x)).astype(jnp.float32)
